"""One way to certify, whoever asks: what decides a row, and the call that does it."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsmooth_core.certification.bounds import MAX_SIGMA
from fedsmooth_core.certification.certify import check_labels, fixed_rows
from fedsmooth_core.certification.certify_sequential import sequential_rows
from fedsmooth_core.certification.counting import check_sampling
from fedsmooth_core.certification.handout import Handout, in_order
from fedsmooth_core.certification.passes import Passes
from fedsmooth_core.certification.precision import PRECISIONS, in_precision
from fedsmooth_core.certification.row_format import CertifiedRow
from fedsmooth_core.certification.sequential import check_grid, sequential_test
from fedsmooth_core.certification.sharding import rows_of_all
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
    batch_size: int | None,
    device: torch.device | str | Sequence[torch.device | str],
    compile: bool = False,
) -> Iterator[CertifiedRow]:
    """Certify the smoothed classifier at each image by a procedure, one row an image, in order.

    Rows of the method ``sequential`` say their n. The other arguments, the guarantee and what a row
    depends on are those of :func:`~fedsmooth_core.certification.certify.certify`.

    Args:
        model: as for ``certify``, and what :func:`in_precision` returned; it computes in that form.
        images: as for ``certify``.
        labels: as for ``certify``.
        indices: as for ``certify``.
        max_value: as for ``certify``.
        procedure: what decides a row.
        batch_size: as for ``certify``, on each device.
        device: where to compute. Of several devices each takes images in a thread of its own; a CPU that
            is named k times computes with k threads of one core each. Rows are the same.
        compile: try ``torch.compile``, and keep it where it gains. It may round scores otherwise.

    Raises:
        CertificationError: as ``certify``, at the call or as rows are taken.
    """
    check_sampling(images, indices, procedure.sigma)
    check_labels(images, labels)
    devices = [device] if isinstance(device, str | torch.device) else device

    def passes_of(model: nn.Module, device: torch.device) -> Passes:
        return Passes(
            model,
            images.shape[1:],
            sigma=procedure.sigma,
            device=device,
            batch_size=batch_size,
            compile=compile,
        )

    def rows_of(passes: Passes, handout: Handout) -> Iterator[tuple[int, CertifiedRow]]:
        what: dict[str, Any] = {"max_value": max_value, "n0": procedure.n0, "seed": procedure.seed}
        work = passes, handout, images, labels, indices
        if procedure.method == "sequential":
            test = sequential_test(
                procedure.sigma, procedure.n, procedure.alpha, procedure.radius_step
            )
            return sequential_rows(*work, test=test, **what)
        return fixed_rows(
            *work, sigma=procedure.sigma, n=procedure.n, alpha=procedure.alpha, **what
        )

    model = in_precision(model, procedure.precision)
    where = [torch.device(device) for device in devices]
    if len(where) == 1:
        return in_order(rows_of(passes_of(model, where[0]), Handout(len(images))))
    return rows_of_all(where, model, len(images), passes_of, rows_of)
