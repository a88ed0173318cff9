"""LocalTrain: what one client does in one round (the paper's Algorithm, client side)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsmooth_core.attack import smoothadv_attack
from fedsmooth_core.config import TrainingPlan
from fedsmooth_core.data import ClientData, training_batches
from fedsmooth_core.errors import ConfigError
from fedsmooth_core.estimators import make_estimator
from fedsmooth_core.limits import DeviceLimits
from fedsmooth_core.seeding import Purpose, torch_generator
from fedsmooth_core.smoothing import log_smoothed_probability, noisy_logits, training_noise

_BATCHES, _NOISE = 0, 1  # the two streams of a client's round


@dataclass(frozen=True)
class LocalMetrics:
    """Means over the round's local steps."""

    loss: float
    accuracy: float
    """Share of noisy adversarial copies that the model in training classified correctly."""


def smoothed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Eq. 2: J = -log G(x)_y of each image (B,), from logits (m, B, classes)."""
    return -log_smoothed_probability(logits, labels)


def copies_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over each image's noisy copies (B,), as in Salman et al. and Cohen et al."""
    of_copy = F.cross_entropy(
        logits.flatten(0, 1), labels.repeat(logits.shape[0]), reduction="none"
    )
    return of_copy.view(logits.shape[:2]).mean(0)


_NO_LIMITS = DeviceLimits()
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "smoothed": smoothed_loss,
    "cross_entropy": copies_cross_entropy,
}


def training_streams(
    plan: TrainingPlan, server_round: int, client: int, device: torch.device
) -> tuple[torch.Generator, torch.Generator]:
    """Return the generators of a client's mini-batches (on the CPU) and of its noise (on ``device``)."""
    name = (plan.seed, Purpose.LOCAL_TRAINING, server_round, client)
    return torch_generator(*name, _BATCHES), torch_generator(*name, _NOISE, device=device)


def local_train(
    model: nn.Module,
    data: ClientData,
    plan: TrainingPlan,
    server_round: int,
    client: int,
    limits: DeviceLimits = _NO_LIMITS,
) -> LocalMetrics:
    """Train ``model`` in place: E mini-batches of SmoothAdv, SGD.

    All draws depend on (plan.seed, server_round, client) alone, never on global random state, so a
    client's result is the same in every cohort, process and runtime.

    Args:
        model: starts with the global weights; on the device of ``data``; left in train mode.
        data: the client's own samples.
        plan: hyper-parameters, federation-wide.
        server_round: >= 1.
        client: the client's stable number (its partition).
        limits: what fits on this device.

    Returns:
        Mean loss and accuracy over the round.

    Raises:
        DataError: when there is no sample.
        ConfigError: when the model cannot be trained within the limits.
    """
    plan = plan.in_round(server_round)
    device = data.images.device
    dtype = next(model.parameters()).dtype
    batch_stream, noise_stream = training_streams(plan, server_round, client, device)
    config, smoothing = plan.training, plan.smoothing
    estimator = make_estimator(plan.attack, smoothing.sigma)
    loss_function = LOSSES[config.loss]
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    total_loss = torch.zeros((), device=device)
    total_accuracy = torch.zeros((), device=device)
    batches = training_batches(
        data,
        config.batch_size,
        config.local_steps,
        batch_stream,
        plan.dataset.flip,
        plan.dataset.crop_padding,
        dtype,
    )
    batch_size = min(config.batch_size, len(data))
    noises = training_noise(
        torch.empty((), dtype=dtype, device=device),
        (batch_size, *data.images.shape[1:]),
        smoothing.sigma,
        smoothing.num_noise_vectors,
        config.local_steps,
        noise_stream,
    )
    part_size = _part_size(model, batch_size, plan, limits)
    classifier = InBfloat16(model) if limits.bf16 else model
    model.train()
    for (x, labels), noise in zip(batches, noises, strict=True):
        optimizer.zero_grad(set_to_none=True)
        for part in _parts(len(x), part_size):
            share = len(x[part]) / len(x)
            x_adv = smoothadv_attack(
                classifier, x[part], labels[part], noise[:, part], estimator, plan.attack
            )
            logits = noisy_logits(
                classifier, x_adv, noise[:, part]
            )  # the attack's own noise once more
            loss = loss_function(logits, labels[part]).mean() * share
            loss.backward()
            # Kept on the device: one copy to the host a round, not two a step.
            total_loss += loss.detach()
            total_accuracy += (logits.detach().argmax(-1) == labels[part]).float().mean() * share
        optimizer.step()
    return LocalMetrics(
        loss=total_loss.item() / config.local_steps,
        accuracy=total_accuracy.item() / config.local_steps,
    )


def _part_size(model: nn.Module, batch_size: int, plan: TrainingPlan, limits: DeviceLimits) -> int:
    """Return how many images of a mini-batch go through the model together."""
    copies = plan.smoothing.num_noise_vectors if plan.smoothing.sigma > 0 else 1
    if limits.max_batch is None or limits.max_batch >= batch_size * copies:
        return batch_size
    if limits.max_batch < copies:
        raise ConfigError(
            f"max-batch={limits.max_batch} has no room for the {copies} noisy copies of one image: this "
            f"device needs max-batch={copies} or more to take part."
        )
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise ConfigError(
            f"max-batch={limits.max_batch} would divide a mini-batch, but {plan.model.name} has batch "
            f"normalisation over all of it: this device needs max-batch={batch_size * copies} or more."
        )
    return limits.max_batch // copies


def _parts(batch_size: int, part_size: int) -> Iterator[slice]:
    for start in range(0, batch_size, part_size):
        yield slice(start, start + part_size)


class InBfloat16(nn.Module):
    """The same model with the same weights, computed in bfloat16; its logits are float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            logits: Tensor = self.model(x)
        return logits.float()
