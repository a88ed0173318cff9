"""What a run's certificates depend on, but for the weights that are certified."""

from pathlib import Path
from typing import Any

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


def terms_at_service(config: RunConfig, metadata: dict[str, Any]) -> dict[str, Scalar]:
    """Return, by name, what a checkpoint's ``metadata`` and its run's settings say of a service's rows.

    Those are the terms of :func:`certification_terms`, but for the device, which is the service's.

    Raises:
        ConfigError: when the settings name another data set than the model was trained on.
    """
    match metadata:
        case {"config": {"dataset": {"name": str(name), "image_size": size}}}:
            trained_on = (name, size)
            if trained_on != (config.dataset.name, config.dataset.image_size):
                raise ConfigError(
                    f"dataset.name={config.dataset.name} dataset.image_size={config.dataset.image_size}: a "
                    f"certification service takes the images that a model was trained on, here {name} and "
                    f"{size}: leave these out, or certify on this machine with service.address=null."
                )
    terms: dict[str, Scalar] = dict(procedure_of(config).terms)
    match metadata:
        case {
            "dataset": {"fingerprint": str(fingerprint), "num_test_images": int(num_test_images)}
        }:
            terms["dataset"] = fingerprint
            indices = subset_indices(num_test_images, config.certification.num_images)
            terms["num_images"] = len(indices)
    return terms


def refuse_other_terms(rows: Path, terms: dict[str, Scalar]) -> None:
    """Refuse to go on with a run of which a model is certified on other terms already.

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
