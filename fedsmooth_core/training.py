"""LocalTrain: what one client does in one round (the paper's Algorithm, client side)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsmooth_core.attack import smoothadv_attack
from fedsmooth_core.config import TrainingPlan
from fedsmooth_core.data import ClientData, training_batches
from fedsmooth_core.estimators import make_estimator
from fedsmooth_core.seeding import Purpose, torch_generator
from fedsmooth_core.smoothing import draw_noise, log_smoothed_probability, noisy_logits

_BATCHES, _NOISE = 0, 1  # the two streams of a client's round


@dataclass(frozen=True)
class LocalMetrics:
    """Means over the round's local steps."""

    loss: float
    accuracy: float
    """Share of noisy adversarial copies that the model in training classified correctly."""


def smoothed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Eq. 2: the batch mean of J = -log G(x)_y, from logits (m, B, classes)."""
    return -log_smoothed_probability(logits, labels).mean()


def copies_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over all noisy copies, as in Salman et al. and Cohen et al."""
    return F.cross_entropy(logits.flatten(0, 1), labels.repeat(logits.shape[0]))


LOSSES = {"smoothed": smoothed_loss, "cross_entropy": copies_cross_entropy}


def local_train(
    model: nn.Module, data: ClientData, plan: TrainingPlan, server_round: int, client: int
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

    Returns:
        Mean loss and accuracy over the round.
    """
    device = data.images.device
    batch_stream = torch_generator(
        plan.seed, Purpose.LOCAL_TRAINING, server_round, client, _BATCHES
    )
    noise_stream = torch_generator(
        plan.seed, Purpose.LOCAL_TRAINING, server_round, client, _NOISE, device=device
    )
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
    )
    model.train()
    for x, labels in batches:
        noise = draw_noise(x, smoothing.sigma, smoothing.num_noise_vectors, noise_stream)
        x_adv = smoothadv_attack(model, x, labels, noise, estimator, plan.attack)
        logits = noisy_logits(model, x_adv, noise)  # the attack's own noise once more
        loss = loss_function(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        # Kept on the device: one copy to the host a round, not two a step.
        total_loss += loss.detach()
        total_accuracy += (logits.detach().argmax(-1) == labels).float().mean()
    return LocalMetrics(
        loss=total_loss.item() / config.local_steps,
        accuracy=total_accuracy.item() / config.local_steps,
    )
