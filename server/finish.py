"""The last part of a run: certify the final model, show the table, draw the curve."""

from rich.console import Console

from fedsmooth_core.config import RunConfig
from server.certify import certify_checkpoint
from server.report import show
from server.run_directory import RunDirectory

CURVE = "curve"
"""The pictures in a run's directory, without their endings."""


def certify_run(config: RunConfig, run: RunDirectory, console: Console) -> None:
    """Certify the final checkpoint into the run's directory and report on it.

    Does nothing when ``certification.at_end`` is false. A run killed here continues here.
    """
    if config.certification.at_end:
        certify_round(config.federation.num_rounds, config, run, console)
        console.print(f"Run directory: {run.path}", soft_wrap=True, markup=False)


def certify_round(
    server_round: int, config: RunConfig, run: RunDirectory, console: Console
) -> None:
    """Certify the checkpoint after a round into the run's directory; show the table, draw the curve."""
    folder = run.certification(server_round)
    certify_checkpoint(run.checkpoint(server_round), config, folder, console)
    show([run.path], run.path / CURVE, config.certification.radius_step, console)
