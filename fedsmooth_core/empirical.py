"""How a smoothed classifier fares against an attack: a sanity check of its certificates.

A certificate promises that nobody within its radius changes the smoothed prediction; projected gradient
descent on the smoothed classifier (Salman et al., NeurIPS 2019) is somebody who tries. It can refute a
certificate. It can never prove one: a stronger attack may come.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import bdtr
from torch import Tensor, nn

from fedsmooth_core.attack import smoothadv_attack
from fedsmooth_core.certification.bounds import p_a_lower
from fedsmooth_core.certification.certify import check_labels
from fedsmooth_core.certification.counting import (
    check_draws,
    check_sampling,
    count_group,
    unit_images,
)
from fedsmooth_core.certification.passes import Passes
from fedsmooth_core.certification.precision import in_precision
from fedsmooth_core.config import AttackConfig
from fedsmooth_core.errors import CertificationError
from fedsmooth_core.estimators import Classifier, Stochastic
from fedsmooth_core.seeding import Purpose, torch_generator

NOISY_COPIES = 256
"""Noisy images in a pass of the attack, about: many images with few draws, or few with many."""

CHANCE = 0.001
"""How likely it is, at most, that sampling alone makes good certificates look refuted."""


class FreshNoise:
    """A gradient estimator: eq. 3 with noise that is drawn anew in each step.

    With one set of draws in all steps the attack would overfit these draws, and look weaker than it is.

    Args:
        sigma: noise level in [0, 1] pixel units.
        generators: one an image, on its device; they move on with each step. Images beyond them keep the
            noise that they have.
    """

    def __init__(self, sigma: float, generators: Sequence[torch.Generator]) -> None:
        self._sigma = sigma
        self._generators = generators
        self._estimate = Stochastic()

    def __call__(self, model: Classifier, x: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
        for image, generator in enumerate(self._generators):
            noise[:, image].normal_(0.0, self._sigma, generator=generator)
        return self._estimate(model, x, labels, noise)


def attack_smoothed(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    indices: Sequence[int],
    *,
    max_value: float,
    radius: float,
    sigma: float,
    steps: int,
    num_noise_vectors: int,
    n: int,
    seed: int,
    precision: str,
    batch_size: int | None,
    device: torch.device | str,
) -> Iterator[tuple[slice, NDArray[np.int64]]]:
    """Attack the smoothed classifier at each image, and classify what the attack found with fresh draws.

    The attack is :func:`~fedsmooth_core.attack.smoothadv_attack` with :class:`FreshNoise`, epsilon =
    ``radius`` and normalised steps of 2 radius / steps, against the model as it is given. The point that
    it finds is never rounded to grey levels.

    An image's noise depends on (seed, purpose, index) alone, and all passes of the attack have one shape.
    So on a CPU its counts do not depend on the order of the images or on which of them share a pass.

    Args:
        model: from float32 images in [0, 1] (normalisation inside) to scores (batch, classes), on
            ``device``. It is left as it was.
        images: (N, C, H, W), of any number type and on any device.
        labels: (N,) true classes.
        indices: N dataset indices, which name the images' noise.
        max_value: the pixel value that means 1.0 (255 for 8-bit images, 1 for images in [0, 1]).
        radius: l2 budget in [0, 1] pixel units, in [0, 16); 0 attacks nothing.
        sigma: noise level in [0, 1] pixel units, > 0.
        steps: T, >= 0.
        num_noise_vectors: m, draws an image in each step, >= 1.
        n: fresh draws that classify, >= 1.
        seed: of the run.
        precision: that of the certificate, in which the draws are counted: as for
            :func:`~fedsmooth_core.certification.precision.in_precision`.
        batch_size: noisy images in a pass that counts, as for
            :class:`~fedsmooth_core.certification.passes.Passes`.
        device: where to compute.

    Yields:
        (group, counts): a slice of the images, in order, and how often each class was predicted at their
        points (images of the group, classes).

    Raises:
        CertificationError: for an argument outside these ranges, or scores that are not finite.
        ConfigError: for a radius or a number of steps outside its range.
    """
    check_sampling(images, indices, sigma)
    check_labels(images, labels)
    check_draws(Purpose.PREDICTION, n)
    check_draws(Purpose.EMPIRICAL_ATTACK, num_noise_vectors)
    config = AttackConfig(
        attack_steps=steps if radius else 0,
        step_rule="normalized",
        step_size=None,
        epsilon=radius,
        epsilon_255=None,
        estimator="stochastic",
    )
    passes = Passes(
        in_precision(model, precision),
        images.shape[1:],
        sigma=sigma,
        device=device,
        batch_size=batch_size,
    )
    size = max(1, NOISY_COPIES // num_noise_vectors)

    def found(x: Tensor, y: Tensor, names: Sequence[int]) -> Tensor:
        generators = [
            torch_generator(seed, Purpose.EMPIRICAL_ATTACK, index, device=x.device)
            for index in names
        ]
        # What fills the last pass: its points are nobody's.
        x, y = (_filled(values, size) for values in (x, y))
        # An image's draws lie side by side, so that one normal_ fills them wherever the image is.
        noise = x.new_zeros((size, num_noise_vectors, *x.shape[1:])).transpose(0, 1)
        points = smoothadv_attack(model, x, y, noise, FreshNoise(sigma, generators), config)
        return points[: len(names)]

    def groups() -> Iterator[tuple[slice, NDArray[np.int64]]]:
        for start in range(0, len(images), size):
            group = slice(start, min(start + size, len(images)))
            names = [int(index) for index in indices[group]]
            x = unit_images(images[group], max_value, passes.device)
            y = labels[group].to(passes.device)
            points = found(x, y, names)
            yield group, count_group(passes, points, names, [(Purpose.PREDICTION, n)], seed)[:, 0]

    return groups()


def _filled(values: Tensor, size: int) -> Tensor:
    """Repeat the last value until there are ``size``."""
    missing = size - len(values)
    return torch.cat([values, values[-1:].expand(missing, *values.shape[1:])])


def withstands(counts: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Tell for each image whether its true class was counted most, of equals the first.

    There is no abstention, as PREDICT has it: at the edge of its radius a certificate promises P >= 1/2
    and no more, where PREDICT would rightly abstain.

    Args:
        counts: (N, classes).
        labels: (N,) true classes.
    """
    return np.asarray(counts.argmax(1) == labels)


def accuracy_interval(is_right: NDArray[np.bool_], confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided Clopper-Pearson interval of an accuracy, over the choice of at least one image."""
    right, total = int(is_right.sum()), len(is_right)
    tail = (1 - confidence) / 2
    return p_a_lower(right, total, tail), 1 - p_a_lower(total - right, total, tail)


@dataclass(frozen=True, eq=False)
class Comparison:
    """What certificates say of a radius beside what an attack of that radius did, image by image."""

    is_certified: NDArray[np.bool_]
    """Correct, and its certified radius is at least the attack's."""
    is_broken: NDArray[np.bool_]
    """Certified, and misclassified under the attack."""
    is_refuted: NDArray[np.bool_]
    """Broken beyond sampling error."""

    @property
    def certified_accuracy(self) -> float:
        """Share of the images that are certified."""
        return float(self.is_certified.mean())

    @property
    def holds(self) -> bool:
        """Whether no certificate is refuted."""
        return not self.is_refuted.any()


def compare(
    counts: NDArray[np.int64],
    labels: NDArray[np.int64],
    is_correct: NDArray[np.bool_],
    certified_radii: NDArray[np.float64],
    radius: float,
) -> Comparison:
    """Compare certificates with an attack on the same images.

    A certificate of at least ``radius`` promises P >= 1/2 for the true class at the attacked point. So of n
    fresh draws at least Binomial(n, 1/2) are of that class. A broken certificate is refuted where so few
    have a chance of at most ``CHANCE`` / certified images (Bonferroni's correction). A certificate itself
    may be wrong with its own probability alpha, which is not in this account.

    Args:
        counts: (N, classes), each image's with the same sum n >= 1, at the attacked points.
        labels: (N,) true classes.
        is_correct: (N,) whether the certified class is the true one.
        certified_radii: (N,) in [0, 1] pixel units.
        radius: of the attack, in [0, 1] pixel units.

    Raises:
        CertificationError: unless there are images, and one of each for all of them.
    """
    if not len(counts) == len(labels) == len(is_correct) == len(certified_radii) > 0:
        raise CertificationError(
            f"{len(counts)} counts, {len(labels)} labels and {len(certified_radii)} certificates cannot "
            "be compared: give one of each for at least one image."
        )
    is_certified = is_correct & (certified_radii >= radius)
    is_broken = is_certified & ~withstands(counts, labels)
    of_label = np.take_along_axis(counts, labels[:, None], axis=1)[:, 0]
    # P(Binomial(n, 1/2) <= k)
    chance = bdtr(of_label.astype(np.float64), counts.sum(1), 0.5)
    is_refuted = is_broken & (chance <= CHANCE / max(1, is_certified.sum()))
    return Comparison(is_certified, is_broken, is_refuted)
