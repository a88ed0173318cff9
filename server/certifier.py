"""Certify a run's final model when it comes, beside the process that trains it."""

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fedsmooth_core.checkpoint import load_checkpoint
from fedsmooth_core.durable import write_atomically
from server import configuration
from server.certify import ROWS, SUMMARY
from server.finish import CURVE, certify_round
from server.run_directory import RunDirectory

_POLL_SECONDS = 1.0


def failure_path(run: RunDirectory, server_round: int) -> Path:
    """Return the file that says why the model of this round could not be certified."""
    return run.certification(server_round) / "failure.txt"


def is_certified(run: RunDirectory, server_round: int) -> bool:
    """Tell whether the rows, summary and curve of this round's model are there."""
    folder = run.certification(server_round)
    pictures = [run.path / f"{CURVE}.{suffix}" for suffix in ("png", "svg")]
    if not all(path.is_file() for path in (folder / ROWS, folder / SUMMARY, *pictures)):
        return False
    # A picture that is older than the summary was drawn of fewer rounds; the last one may be half-written.
    summary = (folder / SUMMARY).stat().st_mtime
    is_whole = pictures[-1].read_bytes().rstrip().endswith(b"</svg>")
    return is_whole and all(picture.stat().st_mtime >= summary for picture in pictures)


def certify_when_trained(path: Path, overrides: Sequence[str], console: Console) -> None:
    """Wait for the checkpoint of a run's last round, certify it into the run, draw the curve.

    Args:
        path: the run directory; it need not exist yet.
        overrides: settings of the certification alone.
        console: where progress is shown.

    Raises:
        FedSmoothError: as ``certify_checkpoint``; whoever waits for the certificate finds the reason
            in the run directory too.
    """
    run = RunDirectory(path.expanduser().resolve())
    last = _wait_for_last_round(run, console)
    failure = failure_path(run, last)
    failure.unlink(missing_ok=True)
    try:
        checkpoint = run.checkpoint(last)
        recorded = load_checkpoint(checkpoint).metadata.get("config")
        config = configuration.with_overrides(recorded, overrides, str(checkpoint))
        certify_round(last, config, run, console)
    except Exception as error:
        failure.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(failure, f"{error}\n".encode())
        raise


def _wait_for_last_round(run: RunDirectory, console: Console) -> int:
    console.print(f"Waiting for the last round of {run.path}", soft_wrap=True, markup=False)
    while True:
        # Read every time: a resumed run may have more rounds.
        if (run.path / "config.yaml").is_file():
            last = configuration.load(run.path).federation.num_rounds
            if run.checkpoint(last).with_suffix(".json").is_file():
                return last
        time.sleep(_POLL_SECONDS)
