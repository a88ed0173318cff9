"""One way to certify, whoever asks: what decides a row, and the call that does it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsmooth_core.certification.certify import certify
from fedsmooth_core.certification.row_format import CertifiedRow
from fedsmooth_core.config import (
    Scalar,
    Section,
    above,
    at_least,
    one_of,
    setting,
    strictly_between,
    within,
)


@dataclass(frozen=True)
class Procedure(Section):
    """All that decides an image's row, but for the weights, the image and the kind of device.

    Raises:
        ConfigError: for a value that is out of range, naming it.
    """

    sigma: float = setting(0.25, above(0))
    """Noise level of the certified classifier, in [0, 1] pixel units."""
    n0: int = setting(100, at_least(1))
    """Draws that select a class."""
    n: int = setting(100_000, at_least(1))
    """Fresh draws that count that class; with ``sequential`` the most that an image may take."""
    alpha: float = setting(0.001, strictly_between(0, 1))
    """Failure probability of each image's certificate."""
    method: str = setting("fixed", one_of("fixed"))
    """``fixed``: n draws for every image, CERTIFY."""
    radius_step: float = setting(0.25, above(0))
    """Step of the radii that ``sequential`` decides about; ``fixed`` has no use for it."""
    seed: int = setting(0, within(0, 2**62))
    """Names the noise, together with the image's index."""
    precision: str = setting("float32", one_of("float32"))
    """In which the model computes its scores."""

    @property
    def terms(self) -> dict[str, Scalar]:
        """What decides a row, by name, as it is recorded beside rows."""
        return {
            "method": self.method,
            "sigma": self.sigma,
            "n0": self.n0,
            "n": self.n,
            "alpha": self.alpha,
            "seed": self.seed,
            "precision": self.precision,
        }


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

    Arguments, the guarantee and what a row depends on are those of
    :func:`~fedsmooth_core.certification.certify.certify`.

    Raises:
        CertificationError: as ``certify``, at the call or as rows are taken.
    """
    return certify(
        model,
        images,
        labels,
        indices,
        max_value=max_value,
        sigma=procedure.sigma,
        n0=procedure.n0,
        n=procedure.n,
        alpha=procedure.alpha,
        seed=procedure.seed,
        batch_size=batch_size,
        device=device,
    )
