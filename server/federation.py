"""A federated run from its first message to its certificate, whatever the runtime behind the grid."""

from collections.abc import Sequence

from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import Grid
from rich.console import Console

from fedsmooth_core.config import RunConfig
from fedsmooth_core.errors import TrainingError
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
    try:
        _train(recorder, grid)
        certify_run(config, recorder.run, console)
    finally:
        recorder.run.close()
    return recorder.run


def _train(recorder: Recorder, grid: Grid) -> None:
    config, completed = recorder.config, recorder.completed_rounds
    remaining = config.federation.num_rounds - completed
    if remaining > 0:
        names, size = recorder.train_set.info.class_names, len(recorder.train_set)
        max_num_examples = config.federation.max_num_examples or size
        strategy = SmoothAdvFedAvg(config, recorder.spec, names, max_num_examples, completed)

        def record(loop_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            # Flower calls this before the first round too, as round 0 of its own loop.
            if loop_round > 0:
                state = arrays.to_torch_state_dict()
                recorder.round_finished(loop_round + completed, state, strategy.trained)
            return None

        with recorder:
            strategy.start(
                grid=grid,
                initial_arrays=ArrayRecord(recorder.state),
                num_rounds=remaining,
                timeout=config.federation.reply_timeout_seconds,
                evaluate_fn=record,
            )
    rounds = recorder.run.read_metrics()
    if rounds and not any(line.get("num_examples") for line in rounds):
        reasons = [refusal["reason"] for line in rounds for refusal in line.get("refused", [])]
        raise TrainingError(
            f"No client's reply could be used in any of {len(rounds)} rounds, so the model is untrained "
            f"and not certified; the last reason was: {reasons[-1] if reasons else 'no reply'}."
        )
