"""The paper's baseline: SmoothAdv on the pooled training set, with the clients' own training step."""

import math
import time
from collections.abc import Sequence

import torch
from rich.console import Console

from fedsmooth_core import wire
from fedsmooth_core.aggregation import update_norm
from fedsmooth_core.cohort import CohortTrainer, Member
from fedsmooth_core.config import RunConfig
from fedsmooth_core.data import ClientData
from fedsmooth_core.errors import TrainingError
from fedsmooth_core.limits import DeviceLimits
from fedsmooth_core.models import build_model
from server.finish import certify_run
from server.recorder import Observer, Recorder, TrainedRound
from server.run_directory import RunDirectory

_POOL = 0  # the number that the one trainer's random streams carry


def run_centralized(
    config: RunConfig, console: Console, observers: Sequence[Observer]
) -> RunDirectory:
    """Train on all samples, ``training.local_steps`` mini-batches a round, then certify.

    A round is LocalTrain itself, so the momentum restarts with it, and a federation of one client that
    holds all data does exactly the same.

    Raises:
        FedSmoothError: one sentence about what is wrong with the configuration, data or run.
    """
    recorder = Recorder(config, "centralized", observers)
    try:
        _train(recorder)
        certify_run(config, recorder.run, console)
    finally:
        recorder.run.close()
    return recorder.run


def _train(recorder: Recorder) -> None:
    config, info = recorder.config, recorder.train_set.info
    data = ClientData.from_dataset(recorder.train_set, None, recorder.device)
    model = build_model(recorder.spec, info.mean, info.std, torch.Generator())
    model.to(recorder.device)
    state = {name: tensor.to(recorder.device) for name, tensor in recorder.state.items()}
    precision = config.runtime.precision
    limits = DeviceLimits(bf16=precision == "bfloat16", tf32=precision == "tf32")
    trainer = CohortTrainer(recorder.device, config.runtime.engine, limits, is_kept=True)
    with recorder:
        for server_round in range(recorder.completed_rounds + 1, config.federation.num_rounds + 1):
            started = time.perf_counter()
            members = [Member(_POOL, data)]
            ((_, result),) = trainer.train(model, state, members, config.plan, server_round)
            if isinstance(result, Exception):
                raise result
            if not math.isfinite(result.metrics.loss):
                raise TrainingError(
                    f"Training diverged in round {server_round}: lower training.learning_rate="
                    f"{config.training.learning_rate} and start a new run."
                )
            before, state = state, result.state
            trained = TrainedRound(
                cohort=[_POOL],
                aggregated=[_POOL],
                attempts=1,
                metrics={
                    wire.TRAIN_LOSS: result.metrics.loss,
                    wire.TRAIN_ACCURACY: result.metrics.accuracy,
                },
                num_examples=data.num_examples,
                update_norm=update_norm(state, before),
                seconds={"train": time.perf_counter() - started},
            )
            recorder.round_finished(server_round, state, trained)
