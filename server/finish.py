"""The last part of a run: certify the final model, show the table, draw the curve."""

from rich.console import Console

from fedsmooth_core.config import RunConfig
from server.certify import certify_checkpoint
from server.collection import collect
from server.owed import CURVE
from server.report import show
from server.run_directory import RunDirectory


def certify_run(config: RunConfig, run: RunDirectory, console: Console) -> None:
    """Have the run's models certified into its directory and report on them.

    With a certification service, wait for what it owes, ``service.patience_seconds`` at most without an
    answer. Else certify the final checkpoint here, unless ``certification.at_end`` is false. A run killed
    here continues here.

    Raises:
        FedSmoothError: when the final model cannot be certified.
    """
    if config.service.address is not None:
        collect(config, run, console, patience=config.service.patience_seconds)
    elif config.certification.at_end:
        certify_round(config.federation.num_rounds, config, run, console)
    else:
        return
    console.print(f"Run directory: {run.path}", soft_wrap=True, markup=False)


def certify_round(
    server_round: int, config: RunConfig, run: RunDirectory, console: Console
) -> None:
    """Certify the checkpoint after a round into the run's directory; show the table, draw the curve."""
    folder = run.certification(server_round)
    certify_checkpoint(run.checkpoint(server_round), config, folder, console)
    show([run.path], run.path / CURVE, config.certification.radius_step, console)
