"""Which certificates a run has, and which its certification service still owes it: its directory tells."""

import functools
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedsmooth_core.config import RunConfig
from fedsmooth_core.durable import try_lock, write_atomically
from server.report import rows_sha256
from server.run_directory import CERTIFICATION, RunDirectory

ROWS = "rows.tsv"
SUMMARY = "summary.json"
CURVE = "curve"
"""The pictures in a run's directory, without their endings."""

COURIER_LOCK = ".courier"
"""Among the certificates; whoever carries models to the service holds it."""

_FAILURE = "failure.txt"
_DELIVERY = "delivery.json"


def failure_path(run: RunDirectory, server_round: int) -> Path:
    """Return the file that says why the model of this round will not be certified."""
    return run.certification(server_round) / _FAILURE


def is_filed(run: RunDirectory, server_round: int) -> bool:
    """Tell whether the certificates of this round's model are complete: the summary is written last."""
    folder = run.certification(server_round)
    return (folder / ROWS).is_file() and (folder / SUMMARY).is_file()


def filed(run: RunDirectory) -> list[int]:
    """Return the rounds whose certificates are complete, in ascending order."""
    return [number for number in sorted(_rounds_with(run, SUMMARY)) if is_filed(run, number)]


def _rounds_with(run: RunDirectory, name: str) -> list[int]:
    """Return the rounds with a file of this name among their certificates."""
    found = (run.path / CERTIFICATION).glob(f"round-*/{name}")
    numbers = [path.parent.name.removeprefix("round-") for path in found]
    return [int(number) for number in numbers if number.isdecimal()]


def last_filed(run: RunDirectory) -> int | None:
    """Return the last round with any certificates, if those are complete."""
    last = max(_rounds_with(run, ROWS), default=None)
    return last if last is not None and is_filed(run, last) else None


def is_certified(run: RunDirectory, server_round: int) -> bool:
    """Tell whether the certificates of this round's model are complete, and the curve is drawn of them."""
    png, svg = (run.path / f"{CURVE}.{suffix}" for suffix in ("png", "svg"))
    if not (is_filed(run, server_round) and png.is_file() and svg.is_file()):
        return False
    # The one written last may be half-written, or that of another round. File times say nothing, for
    # a copy has others.
    drawn = svg.read_bytes().rstrip()
    digest = rows_sha256(run.certification(server_round) / ROWS)
    return drawn.endswith(b"</svg>") and digest.encode() in drawn


def due(run: RunDirectory, config: RunConfig) -> list[int]:
    """Return the rounds, newest first, whose models are on the disk and are to be certified.

    With ``at_end`` those are the final model, and what was the final one before the run got more rounds.
    """
    every, last = config.certification.every, config.federation.num_rounds
    rounds = {
        server_round
        for server_round in range(every, last + 1, every or 1)
        if every and run.has_checkpoint(server_round)
    }
    if config.certification.at_end:
        on_disk = [number for number in range(last + 1) if run.has_checkpoint(number)]
        rounds.update(number for number in on_disk if number == last or _was_final(run, number))
    return sorted(rounds, reverse=True)


def _was_final(run: RunDirectory, server_round: int) -> bool:
    """Tell whether this model was to be the last one, and certified, when it was written."""
    sidecar = run.checkpoint(server_round).with_suffix(".json")
    try:
        return _planned_end(sidecar, sidecar.stat().st_mtime_ns) == server_round
    except (OSError, ValueError):
        return False


@functools.lru_cache(maxsize=4096)
def _planned_end(sidecar: Path, _written: int) -> int | None:
    """Return after how many rounds a run was to end with a certificate, when it wrote this checkpoint."""
    match json.loads(sidecar.read_bytes()):
        case {
            "metadata": {
                "config": {
                    "federation": {"num_rounds": int(num_rounds)},
                    "certification": {"at_end": True},
                }
            }
        }:
            return num_rounds
    return None


def owed(run: RunDirectory, config: RunConfig, also: Collection[int] = ()) -> list[int]:
    """Return the rounds that the service owes certificates of, newest first.

    Those are the rounds that are due, but for what has come and what was given up. It is computed anew each
    time, so no crash can make it wrong.

    Args:
        run: the directory.
        config: the run's settings.
        also: rounds that are wanted, too, whether they are due or not.
    """
    if config.service.address is None:
        return []
    return [
        server_round
        for server_round in sorted({*due(run, config), *also}, reverse=True)
        if not is_filed(run, server_round) and not failure_path(run, server_round).is_file()
    ]


def failures(run: RunDirectory) -> dict[int, str]:
    """Return, by round, why models were given up, newest first, whether they are due any more or not."""
    return {
        server_round: failure_path(run, server_round).read_text().strip()
        for server_round in sorted(_rounds_with(run, _FAILURE), reverse=True)
        if not is_filed(run, server_round)
    }


def is_collecting(run: RunDirectory) -> bool:
    """Whether a process deals with the service now."""
    try:
        with (run.path / CERTIFICATION / COURIER_LOCK).open() as lock:
            return not try_lock(lock)
    except FileNotFoundError:
        return False


def rounds_text(rounds: Collection[int]) -> str:
    """Return e.g. ``round 3`` or ``rounds 3, 6``."""
    numbers = ", ".join(str(number) for number in sorted(rounds))
    return f"round{'s' if len(rounds) > 1 else ''} {numbers}"


@dataclass
class Delivery:
    """How the dealings with the service stand, for people to read: no process depends on it."""

    problem: str | None = None
    """Why nothing comes; None while the service answers."""
    since: float | None = None
    """Seconds since the epoch: when that began."""
    under_way: dict[str, list[int]] = field(default_factory=dict)
    """By round, images done and images wanted of its job."""

    @classmethod
    def read(cls, run: RunDirectory) -> "Delivery":
        """Return what is recorded; nothing, where that is missing or damaged."""
        try:
            found: Any = json.loads((run.path / CERTIFICATION / _DELIVERY).read_bytes())
        except (OSError, ValueError):
            return cls()
        match found:
            case {
                "problem": None | str() as problem,
                "since": None | float() | int() as since,
                "under_way": dict() as under_way,
            } if all(_is_progress(value) for value in under_way.values()):
                return cls(problem, since, under_way)
        return cls()

    def write(self, run: RunDirectory) -> None:
        """Record it, atomically."""
        folder = run.path / CERTIFICATION
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / _DELIVERY, f"{json.dumps(asdict(self))}\n".encode())


def _is_progress(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(n, int) for n in value)
