"""The ServerApp: compose the configuration once and run the federation over Flower's grid."""

import shlex

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from server.configuration import compose
from server.federation import run_federation
from server.observers import standard_observers
from server.progress import TrainingProgress

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what the run-config's ``overrides`` describe."""
    config = compose(shlex.split(str(context.run_config.get("overrides", ""))))
    console = Console()
    run_federation(config, grid, console, standard_observers(TrainingProgress(console), console))
