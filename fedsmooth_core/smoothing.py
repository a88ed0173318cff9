"""Gaussian smoothing: noisy copies of images and the soft scores of the smoothed classifier (eq. 1)."""

import math
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

NOISE_BYTES = 2**25
"""Noise that :func:`training_noise` draws in one launch, at most, unless one mini-batch needs more. Part
of what a client's noise is on CUDA, where draws depend on the size of a launch."""


def draw_noise(
    x: Tensor, sigma: float, num_noise_vectors: int, generator: torch.Generator
) -> Tensor:
    """Draw m noise vectors d ~ N(0, sigma^2 I) for each image of a batch.

    Args:
        x: images (B, C, H, W) in [0, 1]; only shape, dtype and device matter.
        sigma: noise level in [0, 1] pixel units. At 0 all copies are equal, so one is enough.
        num_noise_vectors: m.
        generator: on the device of ``x``.

    Returns:
        Noise (m, B, C, H, W), or zeros (1, B, C, H, W) when sigma is 0.
    """
    if sigma == 0:
        return x.new_zeros((1, *x.shape))
    noise = x.new_empty((num_noise_vectors, *x.shape))
    return noise.normal_(0.0, sigma, generator=generator)


def training_noise(
    like: Tensor,
    shape: tuple[int, ...],
    sigma: float,
    num_noise_vectors: int,
    num_steps: int,
    generator: torch.Generator,
) -> Iterator[Tensor]:
    """Draw the noise of a client's round: for each local step (m, B, C, H, W), as :func:`draw_noise`.

    As many steps as fit ``NOISE_BYTES`` are drawn in one launch. What a step gets depends on the
    generator and these arguments alone, so every engine that trains a client draws the same.

    Args:
        like: its dtype and device are the noise's.
        shape: (B, C, H, W) of a mini-batch.
        sigma: noise level in [0, 1] pixel units.
        num_noise_vectors: m.
        num_steps: E, mini-batches of the round.
        generator: on the device of ``like``.
    """
    if sigma == 0:
        zeros = like.new_zeros((1, *shape))
        yield from (zeros for _ in range(num_steps))
        return
    step = (num_noise_vectors, *shape)
    steps_at_once = max(1, NOISE_BYTES // (math.prod(step) * like.element_size()))
    for first in range(0, num_steps, steps_at_once):
        noise = like.new_empty((min(steps_at_once, num_steps - first), *step))
        yield from noise.normal_(0.0, sigma, generator=generator)


@runtime_checkable
class NoisyClassifier(Protocol):
    """A classifier with a quicker way to the logits of noisy copies than to make and pass each."""

    def noisy_logits(self, x: Tensor, noise: Tensor) -> Tensor: ...


def noisy_logits(model: nn.Module | NoisyClassifier, x: Tensor, noise: Tensor) -> Tensor:
    """Return F(x + d_i) for every copy: (m, B, classes), from x (B, ...) and noise (m, B, ...).

    The noisy copies are never clipped to [0, 1]: the certificate is about exactly this input.
    """
    if isinstance(model, NoisyClassifier):
        return model.noisy_logits(x, noise)
    copies = (x + noise).flatten(0, 1)
    logits: Tensor = model(copies)
    per_copy: Tensor = logits.unflatten(0, noise.shape[:2])
    return per_copy


def log_smoothed_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log G(x)_y with G(x) the MEAN over the copies of softmax F(x + d_i) (eq. 1).

    Computed as a log-sum-exp of log-probabilities, which is the log of the mean (not the mean of the
    logs) and stays finite where a mean of probabilities would round to 0.

    Args:
        logits: (m, B, classes).
        labels: (B,) int64.

    Returns:
        (B,) values <= 0.
    """
    log_probability = logits.log_softmax(-1)
    of_label = log_probability.gather(-1, labels.expand(logits.shape[:2]).unsqueeze(-1)).squeeze(-1)
    return of_label.logsumexp(0) - math.log(logits.shape[0])
