"""One way to certify, whoever asks: what decides a row, and the call that does it."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsmooth_core.certification.bounds import MAX_SIGMA
from fedsmooth_core.certification.certify import certify
from fedsmooth_core.certification.certify_sequential import certify_sequential
from fedsmooth_core.certification.precision import PRECISIONS, in_precision
from fedsmooth_core.certification.row_format import CertifiedRow
from fedsmooth_core.certification.sequential import check_grid
from fedsmooth_core.config import (
    Scalar,
    Section,
    above_up_to,
    at_least,
    one_of,
    setting,
    strictly_between,
    within,
)


@dataclass(frozen=True)
class Procedure(Section):
    """All that decides an image's row, but for the weights, the image and the kind of device.

    The key of a job of the certification service is a hash over all fields. Another field, or another
    name, changes every key: raise ``_VERSION`` in server/certification/store.py with it.

    Raises:
        ConfigError: for a value that is out of range, naming it.
        CertificationError: for a ``sequential`` grid of too many radii.
    """

    sigma: float = setting(0.25, above_up_to(0, MAX_SIGMA))
    """Noise level of the certified classifier, in [0, 1] pixel units."""
    n0: int = setting(100, at_least(1))
    """Draws that select a class."""
    n: int = setting(100_000, at_least(1))
    """Fresh draws that count that class; with ``sequential`` the most that an image may take."""
    alpha: float = setting(0.001, strictly_between(0, 1))
    """Failure probability of each image's certificate."""
    method: str = setting("fixed", one_of("fixed", "sequential"))
    """``fixed``: n draws for every image, CERTIFY. ``sequential``: as many as the grid needs."""
    radius_step: float = setting(0.25, above_up_to(0, MAX_SIGMA))
    """Step of the grid of radii that ``sequential`` decides about; ``fixed`` has no use for it."""
    seed: int = setting(0, within(0, 2**62))
    """Names the noise, together with the image's index."""
    precision: str = setting("float32", one_of(*PRECISIONS))
    """In which the model computes its scores: see
    :func:`~fedsmooth_core.certification.precision.in_precision`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == "sequential":
            check_grid(self.sigma, self.n, self.alpha, self.radius_step)

    @property
    def terms(self) -> dict[str, Scalar]:
        """What decides a row, by name, as it is recorded beside rows."""
        terms: dict[str, Scalar] = dataclasses.asdict(self)
        if self.method == "fixed":
            del terms["radius_step"]
        return terms


def certify_images(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    indices: Sequence[int],
    *,
    max_value: float,
    procedure: Procedure,
    batch_size: int,
    device: torch.device | str,
) -> Iterator[CertifiedRow]:
    """Certify the smoothed classifier at each image by a procedure, one row an image, in order.

    Rows of the method ``sequential`` say their n. The other arguments, the guarantee and what a row
    depends on are those of :func:`~fedsmooth_core.certification.certify.certify`.

    Raises:
        CertificationError: as ``certify``, at the call or as rows are taken.
    """
    shared: dict[str, Any] = {
        "max_value": max_value,
        "sigma": procedure.sigma,
        "n0": procedure.n0,
        "n": procedure.n,
        "alpha": procedure.alpha,
        "seed": procedure.seed,
        "batch_size": batch_size,
        "device": device,
    }
    model = in_precision(model, procedure.precision)
    if procedure.method == "sequential":
        return certify_sequential(
            model, images, labels, indices, radius_step=procedure.radius_step, **shared
        )
    return certify(model, images, labels, indices, **shared)
