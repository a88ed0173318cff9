"""How long the rest of a plan takes: measured on its finished tasks, or on a few steps before the first."""

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedsmooth_core.cohort import CohortTrainer, Member
from fedsmooth_core.config import RunConfig, TrainingPlan
from fedsmooth_core.data import ClientData, load_dataset
from fedsmooth_core.data.partition import client_indices
from fedsmooth_core.device import choose_device
from fedsmooth_core.durable import append_durably
from fedsmooth_core.limits import DeviceLimits
from fedsmooth_core.models import ModelSpec, build_model
from server.reproduction.tasks import Task, passes_of_round

_PROBED_STEPS = 3
_MOST_PROBED_CLIENTS = 100


class Log:
    """What tasks took, one JSON line a task and process."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, task: Task, work: int, seconds: float) -> None:
        """Remember that ``work`` forward passes of a task took ``seconds``."""
        line = {"task": task.title, "category": task.category, "work": work, "seconds": seconds}
        append_durably(self._path, json.dumps(line))

    def seconds_of(self, title: str) -> float | None:
        """Return what a task took, but for processes that were killed over it; None if none ended it."""
        found = [line["seconds"] for line in self._lines() if line["task"] == title]
        return sum(found) if found else None

    def rates(self) -> dict[str, float]:
        """Return forward passes a second by category, and over all under the name ``""``."""
        work: dict[str, float] = defaultdict(float)
        seconds: dict[str, float] = defaultdict(float)
        for line in self._lines():
            for category in (line["category"], ""):
                work[category] += line["work"]
                seconds[category] += line["seconds"]
        return {category: work[category] / seconds[category] for category in work if work[category]}

    def _lines(self) -> list[dict[str, Any]]:
        lines = []
        for text in self._path.read_bytes().splitlines() if self._path.is_file() else []:
            try:
                line = json.loads(text)
            except ValueError:  # torn by a crash
                continue
            match line:
                case {
                    "task": str(),
                    "category": str(),
                    "work": int(work),
                    "seconds": float(seconds),
                } if work >= 0 and 0 < seconds < math.inf:
                    lines.append(line)
        return lines


def seconds_left(tasks: Iterable[Task], rates: dict[str, float]) -> float:
    """Estimate what tasks still take, given forward passes a second (``""``: of any category).

    NaN where nothing is known yet.
    """
    if not rates:
        return math.nan
    return sum(task.work_left() / rates.get(task.category, rates[""]) for task in tasks)


def now(device: torch.device) -> float:
    """Read the clock, in seconds, once a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def num_probed_clients(config: RunConfig) -> int:
    """Return how many of a run's clients are trained to measure its speed here: as many as at once."""
    if choose_device(config.runtime.device).type == "cuda":
        return min(config.cohort_size, _MOST_PROBED_CLIENTS)
    return min(config.cohort_size, config.runtime.threads or torch.get_num_threads())


@dataclass(frozen=True, eq=False)
class ProbedCohort:
    """The first clients of a run, with their data on this machine's device, to measure its speed."""

    device: torch.device
    model: torch.nn.Module
    """Of the run's architecture; its weights are every round's global model."""
    members: list[Member]
    limits: DeviceLimits
    engine: str
    threads: int
    """Of PyTorch."""

    @classmethod
    def of(cls, config: RunConfig, local_steps: int | None = None) -> "ProbedCohort":
        """Load the data and build the model; ``local_steps`` in place of the run's own."""
        if config.runtime.threads is not None:
            torch.set_num_threads(config.runtime.threads)
        device = choose_device(config.runtime.device)
        train_set = load_dataset(config.dataset, "train")
        info = train_set.info
        model = build_model(
            ModelSpec.of(config.model, info), info.mean, info.std, torch.Generator().manual_seed(0)
        ).to(device)
        members = [
            Member(
                client,
                ClientData.from_dataset(
                    train_set,
                    client_indices(train_set.labels, config.partition, config.seed, client),
                    device,
                ),
                local_steps,
            )
            for client in range(num_probed_clients(config))
        ]
        precision = config.runtime.precision
        limits = DeviceLimits(bf16=precision == "bfloat16", tf32=precision == "tf32")
        return cls(device, model, members, limits, config.runtime.engine, torch.get_num_threads())

    def trainer(self) -> CohortTrainer:
        """Return a trainer as a simulation has it; close it."""
        workers = min(self.threads, len(self.members))
        return CohortTrainer(self.device, self.engine, self.limits, workers, is_kept=True)

    def seconds_of_round(
        self, trainer: CohortTrainer, plan: TrainingPlan, server_round: int
    ) -> float:
        """Train all members for a round.

        Raises:
            Exception: whatever the first of them failed with.
        """
        started = now(self.device)
        state = self.model.state_dict()
        for _, result in trainer.train(self.model, state, self.members, plan, server_round):
            if isinstance(result, Exception):
                raise result
        return now(self.device) - started


def measured_rate(config: RunConfig) -> float:
    """Train a cohort for a few steps on this machine; return forward passes a second."""
    cohort = ProbedCohort.of(config, _PROBED_STEPS)
    with closing(cohort.trainer()) as trainer:
        seconds = [
            cohort.seconds_of_round(trainer, config.plan, server_round) for server_round in (1, 2)
        ]
    steps = len(cohort.members) * _PROBED_STEPS
    return steps * passes_of_round(config) / config.training.local_steps / seconds[-1]
