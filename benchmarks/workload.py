"""What the training benchmarks train: the paper's setting, on random images of CIFAR-10's shape.

AlexNet, m = 2, T = 2, B = 30, E = 20, stochastic estimator, momentum 0.9 (docs/algorithm.md). How long
a step takes does not depend on what the images show; each class here has a pattern of its own, so
that a model that trains can be told from one that does not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from fedsmooth_core.config import AttackConfig, ModelConfig, TrainingConfig, TrainingPlan
from fedsmooth_core.data import ArrayDataset, ClientData, DatasetInfo
from fedsmooth_core.limits import DeviceLimits
from fedsmooth_core.models import ModelSpec, build_model
from fedsmooth_core.training import local_train

SHAPE = (3, 32, 32)
NUM_CLASSES = 10
PRECISIONS = ("float32", "bfloat16")
HAS_ENGINES = False
NO_ENGINES = "fedsmooth_core.cohort is not in this revision."
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
    """Draw images of ten classes: a pattern for each class, and as much noise."""
    patterns = np.random.default_rng(0).integers(0, 128, (NUM_CLASSES, *SHAPE), dtype=np.uint8)
    rng = np.random.default_rng([1, split == "test"])
    labels = rng.integers(0, NUM_CLASSES, count, dtype=np.int64)
    images = rng.integers(0, 128, (count, *SHAPE), dtype=np.uint8)
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
        return cls(plan, spec, model, state, clients)

    def with_plan(self, plan: TrainingPlan) -> "Cohort":
        """Return the same clients, who train by another plan."""
        return replace(self, plan=plan)

    @property
    def num_steps(self) -> int:
        """Local steps of the whole cohort."""
        return len(self.clients) * self.plan.training.local_steps

    def plain_loop(self, precision: str = "float32") -> Replies:
        """Train client after client with LocalTrain; return their weights, on the device."""
        limits = DeviceLimits(bf16=precision == "bfloat16")
        replies = []
        for client, data in enumerate(self.clients):
            self.model.load_state_dict(self.state)
            local_train(self.model, data, self.plan, 1, client, limits)
            replies.append({k: v.clone() for k, v in self.model.state_dict().items()})
        return replies


def engines(
    cohort: Cohort, device: torch.device, precision: str = "float32"
) -> dict[str, Callable[[], Replies]]:
    """Return what trains the cohort in each of our engines that this device has, by name."""
    return {}
