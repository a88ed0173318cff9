"""A federated run from its first message to its certificate, whatever the runtime behind the grid."""

from collections.abc import Sequence

from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import Grid
from rich.console import Console

from fedsmooth_core.config import RunConfig
from server.finish import certify_run
from server.recorder import Observer, Recorder
from server.run_directory import RunDirectory
from server.strategy import SmoothAdvFedAvg


def run_federation(
    config: RunConfig, grid: Grid, console: Console, observers: Sequence[Observer]
) -> RunDirectory:
    """Train over the grid's clients, then certify the aggregated model and draw its curve.

    Raises:
        FedSmoothError: one sentence about what is wrong with the configuration, data or run.
    """
    recorder = Recorder(config, "federated", observers)
    remaining = config.federation.num_rounds - recorder.completed_rounds
    if remaining > 0:
        strategy = SmoothAdvFedAvg(
            config, recorder.spec, recorder.train_set.info.class_names, recorder.completed_rounds
        )

        def record(loop_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            # Flower calls this before the first round too, as round 0 of its own loop.
            if loop_round > 0:
                server_round = loop_round + recorder.completed_rounds
                recorder.round_finished(
                    server_round, arrays.to_torch_state_dict(), strategy.trained
                )
            return None

        with recorder:
            strategy.start(
                grid=grid,
                initial_arrays=ArrayRecord(recorder.state),
                num_rounds=remaining,
                timeout=config.federation.reply_timeout_seconds,
                evaluate_fn=record,
            )
    certify_run(config, recorder.run, console)
    return recorder.run
