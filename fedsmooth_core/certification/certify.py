"""CERTIFY (Cohen, Rosenfeld and Kolter, ICML 2019): a class and a radius that provably keeps it."""

import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fedsmooth_core.certification.bounds import (
    ABSTAIN,
    certified_radius,
    check_alpha,
    p_a_lower,
)
from fedsmooth_core.certification.counting import (
    check_draws,
    check_sampling,
    count_group,
    images_per_group,
    unit_images,
)
from fedsmooth_core.certification.handout import Handout
from fedsmooth_core.certification.passes import Passes
from fedsmooth_core.certification.row_format import CertifiedRow
from fedsmooth_core.errors import CertificationError
from fedsmooth_core.seeding import Purpose

__all__ = ["CertifiedRow", "certify", "fixed_rows"]


def certify(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    indices: Sequence[int],
    *,
    max_value: float,
    sigma: float,
    n0: int,
    n: int,
    alpha: float,
    seed: int,
    batch_size: int | None,
    device: torch.device | str,
) -> Iterator[CertifiedRow]:
    """Certify the smoothed classifier at each image, one row an image, in order.

    n0 draws select a class; n FRESH draws count it; p is its one-sided Clopper-Pearson bound; the
    radius is sigma * Phi^-1(p), or the row abstains where p < 1/2. With probability at least
    1 - alpha for each image, the smoothed classifier predicts the row's class everywhere within its
    radius.

    A row depends on the weights, the image, sigma, n0, n, alpha, seed and the image's dataset index
    alone; ``batch_size`` and the company an image is certified in change the speed. Arguments are
    checked at the call. Rows come in groups of images, as soon as a group's draws are counted.

    Args:
        model: from float32 images in [0, 1] (normalisation inside) to scores (batch, classes), on
            ``device``. It runs in eval mode without gradients; its own modes are restored.
        images: (N, C, H, W), of any number type and on any device.
        labels: (N,) integers, the true classes.
        indices: N dataset indices: they name the rows and the images' noise.
        max_value: the pixel value that means 1.0 (255 for 8-bit images, 1 for images in [0, 1]).
        sigma: noise level in [0, 1] pixel units, > 0.
        n0: draws that select the class, >= 1.
        n: draws that estimate its probability, >= 1.
        alpha: failure probability, in (0, 1).
        seed: of the run.
        batch_size: noisy images in one forward pass, rounded down to whole blocks of
            ``NOISE_BLOCK``, at least one; None takes what suits the model and the kind of device
            (:class:`~fedsmooth_core.certification.passes.Passes`).
        device: where to compute.

    Raises:
        CertificationError: for an argument outside these ranges, or a model whose scores are not
            (batch, classes >= 2) or not finite.
    """
    check_sampling(images, indices, sigma)
    check_labels(images, labels)
    check_draws(Purpose.SELECTION, n0)
    check_draws(Purpose.ESTIMATION, n)
    check_alpha(alpha)
    passes = Passes(model, images.shape[1:], sigma=sigma, device=device, batch_size=batch_size)
    rows = fixed_rows(
        passes,
        Handout(len(images)),
        images,
        labels,
        indices,
        max_value=max_value,
        sigma=sigma,
        n0=n0,
        n=n,
        alpha=alpha,
        seed=seed,
    )
    return (row for _, row in rows)


def check_labels(images: Tensor, labels: Tensor) -> None:
    """Refuse other than one label an image with a :class:`CertificationError`."""
    if labels.shape != images.shape[:1]:
        raise CertificationError(
            f"labels of shape {tuple(labels.shape)} do not belong to {len(images)} images: give "
            "one label per image."
        )


def fixed_rows(
    passes: Passes,
    handout: Handout,
    images: Tensor,
    labels: Tensor,
    indices: Sequence[int],
    *,
    max_value: float,
    sigma: float,
    n0: int,
    n: int,
    alpha: float,
    seed: int,
) -> Iterator[tuple[int, CertifiedRow]]:
    """Certify what is handed out, as :func:`certify`, whose arguments were checked.

    Yields:
        Position among the images and row, in the order of what is handed out here.
    """
    streams = [(Purpose.SELECTION, n0), (Purpose.ESTIMATION, n)]
    while positions := handout.take(images_per_group(passes, streams), wait=True):
        started = time.perf_counter()
        x = unit_images(images[positions], max_value, passes.device)
        group = [int(indices[position]) for position in positions]
        counts = count_group(passes, x, group, streams, seed)
        selection, estimation = counts[:, 0], counts[:, 1]
        top_class = selection.argmax(axis=1)
        k = np.take_along_axis(estimation, top_class[:, np.newaxis], axis=1)[:, 0]
        p_a = p_a_lower(k, n, alpha)
        radius = certified_radius(p_a, sigma)
        predict = np.where(p_a < 0.5, ABSTAIN, top_class)
        # What the caller does with the rows is not the images' time.
        seconds = (time.perf_counter() - started) / len(counts)
        true_classes = labels[positions].tolist()
        for row, position in enumerate(positions):
            yield (
                position,
                CertifiedRow(
                    idx=group[row],
                    label=true_classes[row],
                    predict=int(predict[row]),
                    radius=float(radius[row]),
                    correct=int(predict[row] == true_classes[row]),
                    time=seconds,
                ),
            )
