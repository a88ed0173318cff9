"""SmoothAdv's inner maximisation: a few projected steps against the smoothed classifier.

Salman et al., NeurIPS 2019, with the paper's two gradient estimators. The loop is here; the estimator
and the step rule are parts that are passed in. Without steps it returns the clean images, without
noise it is the classic l2 PGD attack: the paper's ablations need no other code.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from fedsmooth_core.config import AttackConfig
from fedsmooth_core.estimators import GradientEstimator
from fedsmooth_core.smoothing import NoisyClassifier

StepRule = Callable[[Tensor, float], Tensor]


def _norms(x: Tensor) -> Tensor:
    """L2 norm of each image of (B, C, H, W), shaped (B, 1, 1, 1)."""
    # Scaled by the largest entry: the squares of a confident model's gradients vanish in float32.
    largest = x.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    norms: Tensor = torch.linalg.vector_norm(x / largest, dim=(1, 2, 3), keepdim=True)
    return largest * norms


def gradient_step(gradient: Tensor, step_size: float) -> Tensor:
    """Move by ``step_size`` times the gradient: the paper's 'inner learning rate'."""
    return step_size * gradient


def normalized_step(gradient: Tensor, step_size: float) -> Tensor:
    """Move by an l2 length of ``step_size`` (Salman et al. take 2 epsilon / T); a zero gradient stays."""
    return step_size * gradient / _norms(gradient).clamp_min(torch.finfo(gradient.dtype).tiny)


STEP_RULES: dict[str, StepRule] = {"gradient": gradient_step, "normalized": normalized_step}


def project_l2(x: Tensor, center: Tensor, epsilon: float) -> Tensor:
    """Return the nearest point of each image's l2 ball of radius ``epsilon`` around ``center``."""
    delta = x - center
    norms = _norms(delta)
    # Inside the ball nothing may change, not even by rounding.
    return torch.where(norms > epsilon, center + epsilon / norms.clamp_min(1e-30) * delta, x)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Attack the classifier as it will be used: running statistics fixed, no weight gradients."""
    modes = {module: module.training for module in model.modules()}
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    model.eval()
    for weight in trainable:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in trainable:
            weight.requires_grad_(True)
        for module, training in modes.items():
            module.training = training


def smoothadv_attack(
    model: nn.Module | NoisyClassifier,
    x: Tensor,
    labels: Tensor,
    noise: Tensor,
    estimator: GradientEstimator,
    config: AttackConfig,
) -> Tensor:
    """Return adversarial images against the smoothed classifier.

    Args:
        model: the base classifier F. A module is evaluated in eval mode and left as it was.
        x: clean images (B, C, H, W) in [0, 1].
        labels: (B,) int64.
        noise: (m, B, C, H, W), the same draws in every step.
        estimator: gives an ascent direction of J.
        config: T, step rule, step size and l2 budget.

    Returns:
        Images (B, C, H, W) in [0, 1] within the l2 budget of ``x``. The noisy copies are not clipped.
    """
    step_rule = STEP_RULES[config.step_rule]
    x_adv = x
    with _frozen(model) if isinstance(model, nn.Module) else nullcontext():
        for _ in range(config.attack_steps):
            gradient = estimator(model, x_adv, labels, noise)
            x_adv = x_adv + step_rule(gradient, config.step)
            # Clipping to [0, 1] moves no pixel away from x, so the point stays in the ball.
            x_adv = project_l2(x_adv, x, config.l2_budget).clamp(0, 1)
    return x_adv
