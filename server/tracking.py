"""TensorBoard events of a run."""

import os
from collections.abc import Mapping
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from fedsmooth_core.config import RunConfig
from server.recorder import RoundRecord, TrainedRound
from server.run_directory import RunDirectory


class TensorBoard:
    """An observer that writes losses, accuracies, update norm, refusals and seconds per phase."""

    def run_started(self, config: RunConfig, run: RunDirectory, completed_rounds: int) -> None:
        # A resumed run does rounds again that an earlier process drew already: those are purged.
        self._writer = SummaryWriter(str(run.tensorboard), purge_step=completed_rounds + 1)

    def cohort_asked(self, server_round: int, trained: TrainedRound) -> None:
        """There is no curve to draw before the round is over."""

    def round_finished(self, record: RoundRecord) -> None:
        trained = record.trained
        scalars = {f"train/{name.removeprefix('train-')}": v for name, v in trained.metrics.items()}
        scalars |= {f"test/{name}": value for name, value in record.evaluation.items()}
        scalars |= {f"seconds/{phase}": value for phase, value in trained.seconds.items()}
        scalars["server/update-norm"] = trained.update_norm
        scalars["server/refused-clients"] = float(len(trained.refused))
        scalars["server/attempts"] = float(trained.attempts)
        if record.on_devices is not None:
            scalars["devices/num-examples"] = float(record.on_devices.num_examples)
            scalars["devices/refused-clients"] = float(len(record.on_devices.refused))
            shares = record.on_devices.accuracy or []
            for radius, share in zip(record.on_devices.radii, shares, strict=False):
                scalars[f"devices/certified-accuracy-at-{radius:g}"] = share
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, record.server_round)

    def run_finished(self) -> None:
        self._writer.close()


def write_certified(run: RunDirectory, certified: Mapping[int, Mapping[str, Any]]) -> None:
    """Write the figures of all certified models (``analysis.summary``), by round, as scalars.

    The newest model is certified first, and TensorBoard draws points in the order of the file, or drops
    those that an earlier step follows. So the whole is written again in ascending order, into a new file
    in a folder of its own.
    """
    folder = run.tensorboard / "certified"
    before = list(folder.glob("events.*"))
    # A TensorBoard that has read an earlier file forgets what it read there.
    with SummaryWriter(str(folder), purge_step=0) as writer:
        for server_round in sorted(certified):
            for name, value in _scalars(certified[server_round]).items():
                writer.add_scalar(name, value, server_round)
    # Emptied, not deleted: a TensorBoard that reads one of them would never come to the next.
    for path in before:
        if path.stat().st_size:
            os.truncate(path, 0)


def _scalars(figures: Mapping[str, Any]) -> dict[str, float]:
    scalars = {
        "certified/average-radius": figures["average_certified_radius"],
        "certified/abstention-rate": figures["abstention_rate"],
    }
    for point in figures["certified_accuracy"]:
        scalars[f"certified/accuracy-at-{point['radius']:g}"] = point["accuracy"]
    return scalars
