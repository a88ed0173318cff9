"""The last part of a run: certify the final model, show the table, draw the curve."""

from rich.console import Console

from fedsmooth_core.config import RunConfig
from server.certify import certify_checkpoint
from server.report import show
from server.run_directory import RunDirectory


def certify_run(config: RunConfig, run: RunDirectory, console: Console) -> None:
    """Certify the final checkpoint into the run's directory and report on it.

    Does nothing when ``certification.at_end`` is false. A run killed here continues here.
    """
    if not config.certification.at_end:
        return
    final = run.checkpoint(config.federation.num_rounds)
    folder = run.certification(config.federation.num_rounds)
    certify_checkpoint(final, config, folder, console)
    show([run.path], run.path / "curve", config.certification.radius_step, console)
    console.print(f"Run directory: {run.path}", soft_wrap=True, markup=False)
