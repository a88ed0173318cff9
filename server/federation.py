"""A federated run from its first message to its certificate, whatever the runtime behind the grid."""

from collections.abc import Callable, Sequence

from flwr.app import ArrayRecord
from flwr.serverapp import Grid
from rich.console import Console
from torch import Tensor

from fedsmooth_core.config import RunConfig
from fedsmooth_core.errors import TrainingError
from server.conduct import Conduct
from server.finish import certify_run
from server.recorder import Observer, Recorder
from server.replies import state_of
from server.roster import Roster
from server.run_directory import RunDirectory
from server.strategy import SmoothAdvFedAvg

_RECONNECT_SECONDS = 75.0
"""A node that outlived an interruption is back by then: Flower's lease is 60 s."""


def run_federation(
    config: RunConfig,
    grid: Grid,
    console: Console,
    observers: Sequence[Observer],
    record_of: Callable[[dict[str, Tensor]], ArrayRecord] = ArrayRecord.from_torch_state_dict,
) -> RunDirectory:
    """Train over the grid's clients, then certify the aggregated model and draw its curve.

    Args:
        config: of the run.
        grid: how to reach the clients.
        console: where the certificate's progress is shown.
        observers: they watch the rounds.
        record_of: makes the record that the model is sent in; see ``SmoothAdvFedAvg``.

    Raises:
        FedSmoothError: one sentence about what is wrong with the configuration, data or run.
    """
    recorder = Recorder(config, "federated", observers)
    try:
        _train(recorder, grid, record_of)
        certify_run(config, recorder.run, console)
    finally:
        recorder.run.close()
    return recorder.run


def _train(
    recorder: Recorder, grid: Grid, record_of: Callable[[dict[str, Tensor]], ArrayRecord]
) -> None:
    config, run = recorder.config, recorder.run
    strategy = _strategy(recorder, record_of)
    arrays = record_of(recorder.state)
    with recorder:
        for server_round in range(recorder.completed_rounds + 1, config.federation.num_rounds + 1):
            arrays = strategy.train_round(server_round, arrays, grid, recorder)
            trained = strategy.trained
            certified = strategy.on_devices.certify_round(server_round, arrays, grid, trained)
            recorder.round_finished(server_round, state_of(arrays), trained, certified)
    rounds = run.read_metrics()
    if rounds and not any(line.get("num_examples") for line in rounds):
        reasons = [refusal["reason"] for line in rounds for refusal in line.get("refused", [])]
        raise TrainingError(
            f"No round of {len(rounds)} had enough good replies, so the model is untrained and not "
            f"certified; the last reason was: {reasons[-1] if reasons else 'no reply'}."
        )


def _strategy(
    recorder: Recorder, record_of: Callable[[dict[str, Tensor]], ArrayRecord]
) -> SmoothAdvFedAvg:
    config, run = recorder.config, recorder.run
    names, size = recorder.train_set.info.class_names, len(recorder.train_set)
    roster = Roster(config.partition.num_clients, run.read_clients(), run.write_clients)
    conduct = Conduct(config.federation.strikes, config.federation.suspension_rounds)
    # A resumed run leaves out whom the interrupted one would have left out, and waits for as many.
    rounds = run.read_metrics()
    conduct.replay(rounds)
    num_awaited, patience = config.partition.num_clients, config.federation.connect_timeout_seconds
    if rounds:
        num_awaited = rounds[-1].get("num_connected", num_awaited)
        patience = min(patience, _RECONNECT_SECONDS)
    return SmoothAdvFedAvg(
        config,
        recorder.spec,
        names,
        config.federation.most_examples(size),
        roster,
        conduct,
        num_awaited,
        patience,
        recorder.judge,
        record_of,
    )
