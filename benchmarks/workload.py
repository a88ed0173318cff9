"""What the training benchmarks train: the paper's setting, on random images of CIFAR-10's shape.

AlexNet, m = 2, T = 2, B = 30, E = 20, stochastic estimator, momentum 0.9 (docs/algorithm.md). How long
a step takes does not depend on what the images show; each class here has a pattern of its own, so
that a model that trains can be told from one that does not.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from fedsmooth_core.cohort import CohortTrainer, Member
from fedsmooth_core.cohort.trainer import arithmetic
from fedsmooth_core.config import AttackConfig, ModelConfig, TrainingConfig, TrainingPlan
from fedsmooth_core.data import ArrayDataset, ClientData, DatasetInfo
from fedsmooth_core.limits import DeviceLimits
from fedsmooth_core.models import ModelSpec, build_model
from fedsmooth_core.training import local_train

SHAPE = (3, 32, 32)
NUM_CLASSES = 10
State = dict[str, Tensor]
Replies = list[State]


def paper_plan(
    attack_steps: int = 2,
    estimator: str = "stochastic",
    local_steps: int = 20,
    batch_size: int = 30,
) -> TrainingPlan:
    """Return the paper's hyper-parameters, with those that a benchmark varies."""
    return TrainingPlan(
        model=ModelConfig("alexnet"),
        attack=AttackConfig(attack_steps=attack_steps, estimator=estimator),
        training=TrainingConfig(local_steps=local_steps, batch_size=batch_size),
    )


def random_images(count: int, split: str = "train") -> ArrayDataset:
    """Draw images of ten classes: sixteen random squares for each class, and noise."""
    blocks = np.random.default_rng(0).integers(0, 192, (NUM_CLASSES, 3, 4, 4), dtype=np.uint8)
    patterns = blocks.repeat(8, axis=2).repeat(8, axis=3)
    rng = np.random.default_rng([1, split == "test"])
    labels = rng.integers(0, NUM_CLASSES, count, dtype=np.int64)
    images = rng.integers(0, 64, (count, *SHAPE), dtype=np.uint8)
    images += patterns[labels]
    info = DatasetInfo(
        name="random",
        class_names=tuple(f"class{label}" for label in range(NUM_CLASSES)),
        shape=SHAPE,
        max_value=255,
        mean=(0.5,) * 3,
        std=(0.2,) * 3,
        fingerprint="",
    )
    return ArrayDataset(info, split, images, labels)


def model_spec(plan: TrainingPlan, dataset: ArrayDataset) -> ModelSpec:
    """Return the architecture for a data set's images."""
    return ModelSpec.of(plan.model, dataset.info)


def new_model(spec: ModelSpec, info: DatasetInfo, device: torch.device) -> nn.Module:
    """Build the model with its initial weights."""
    model = build_model(spec, info.mean, info.std, torch.Generator().manual_seed(0))
    return model.to(device)


@dataclass(frozen=True)
class Cohort:
    """Clients that train from the same weights by the same plan."""

    plan: TrainingPlan
    spec: ModelSpec
    model: nn.Module
    """Scratch: what the plain loop trains in place."""
    state: State
    """The global weights."""
    clients: Sequence[ClientData]
    numbers: Sequence[int]
    """The clients' numbers, which name their random streams."""
    server_round: int = 1

    @classmethod
    def of(cls, plan: TrainingPlan, num_clients: int, device: torch.device) -> "Cohort":
        """Make clients with E * B random images each."""
        samples = plan.training.local_steps * plan.training.batch_size
        dataset = random_images(num_clients * samples)
        spec = model_spec(plan, dataset)
        model = new_model(spec, dataset.info, device)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        clients = [
            ClientData.from_dataset(dataset, np.arange(k * samples, (k + 1) * samples), device)
            for k in range(num_clients)
        ]
        return cls(plan, spec, model, state, clients, range(num_clients))

    def with_plan(self, plan: TrainingPlan) -> "Cohort":
        """Return the same clients, who train by another plan."""
        return replace(self, plan=plan)

    @property
    def num_steps(self) -> int:
        """Local steps of the whole cohort."""
        return len(self.clients) * self.plan.training.local_steps

    def plain_loop(self, precision: str = "float32") -> Replies:
        """Train client after client with LocalTrain; return their weights, on the device."""
        limits = _limits(precision)
        replies = []
        with in_precision(self.clients[0].images.device, precision):
            for client, data in zip(self.numbers, self.clients, strict=True):
                self.model.load_state_dict(self.state)
                local_train(self.model, data, self.plan, self.server_round, client, limits)
                replies.append({k: v.clone() for k, v in self.model.state_dict().items()})
        return replies

    def train(self, trainer: CohortTrainer) -> Replies:
        """Train all clients by an engine; return their weights, on the device."""
        members = [Member(k, data) for k, data in zip(self.numbers, self.clients, strict=True)]
        replies: list[State] = [{}] * len(members)
        outcomes = trainer.train(self.model, self.state, members, self.plan, self.server_round)
        for place, outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
            replies[place] = outcome.state
        return replies


def _limits(precision: str) -> DeviceLimits:
    return DeviceLimits(bf16=precision == "bfloat16", tf32=precision == "tf32")


def in_precision(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Let CUDA use TF32 if that is the precision, and else not; PyTorch's convolutions would."""
    return arithmetic(device, _limits(precision))


def precisions(device: torch.device) -> tuple[str, ...]:
    """Return the precisions that training has on a device."""
    return ("float32", "tf32", "bfloat16") if device.type == "cuda" else ("float32", "bfloat16")


def default_engine(device: torch.device, precision: str = "float32") -> CohortTrainer:
    """Return the engine that a simulation takes, with as many threads as PyTorch has here."""
    return CohortTrainer(
        device, limits=_limits(precision), workers=torch.get_num_threads(), is_kept=True
    )


def other_engines(device: torch.device, precision: str) -> dict[str, CohortTrainer]:
    """Return the engines that it does not take: slower ones, which show what the default gains by what."""
    limits = _limits(precision)
    if device.type == "cuda":
        return {"vmap": CohortTrainer(device, "vmap", limits, is_kept=True)}
    workers = torch.get_num_threads()
    return {
        "plain loop in workers": CohortTrainer(device, "plain", limits, workers),
        "engine without workers": CohortTrainer(device, "stacked", limits),
    }
