"""What a run's certificates depend on, but for the weights that are certified."""

from pathlib import Path

import torch

from fedsmooth_core.certification.procedure import Procedure
from fedsmooth_core.certification.rows import read_parameters
from fedsmooth_core.certification.subset import subset_indices
from fedsmooth_core.config import RunConfig, Scalar
from fedsmooth_core.data import ArrayDataset
from fedsmooth_core.errors import ConfigError


def procedure_of(config: RunConfig) -> Procedure:
    """Return how a run's models are certified.

    Raises:
        CertificationError: for a ``sequential`` grid of too many radii.
    """
    settings = config.certification
    return Procedure(
        method=settings.method,
        sigma=config.certified_sigma,
        n0=settings.n0,
        n=settings.n,
        alpha=settings.alpha,
        radius_step=settings.radius_step,
        seed=config.seed,
        precision=settings.precision,
    )


def certification_terms(
    config: RunConfig, test_set: ArrayDataset, device: torch.device
) -> dict[str, Scalar]:
    """Return, by name, everything but the weights that determines the rows of a certification."""
    return {
        "dataset": test_set.info.fingerprint,
        **procedure_of(config).terms,
        "num_images": len(subset_indices(len(test_set), config.certification.num_images)),
        # CPU and CUDA draw different noise from one seed: both are valid, a mixture is not one file.
        "device": device.type,
    }


def refuse_other_terms(rows: Path, terms: dict[str, Scalar]) -> None:
    """Refuse to go on with a run whose final model is certified on other terms already.

    Raises:
        ConfigError: naming what differs.
    """
    known = read_parameters(rows)
    # A file without a row binds nobody.
    if known is None or not rows.is_file() or rows.read_bytes().count(b"\n") < 2:
        return
    different = [
        f"{name} ({known[name]!r} there, {value!r} now)"
        for name, value in terms.items()
        if name in known and known[name] != value
    ]
    if different:
        raise ConfigError(
            f"{rows} holds certificates on other terms, namely {', '.join(different)}: leave these as they "
            "were, or certify into another folder with fedsmooth certify -o."
        )
