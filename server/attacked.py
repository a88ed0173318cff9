"""Attack a checkpoint's smoothed classifier on this machine, and hold its certificates against it."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from fedsmooth_core.certification.bounds import ABSTAIN
from fedsmooth_core.certification.rows import read_parameters, read_rows
from fedsmooth_core.certification.subset import subset_indices
from fedsmooth_core.checkpoint import load_checkpoint, load_model, state_sha256
from fedsmooth_core.config import RunConfig
from fedsmooth_core.data import ArrayDataset, load_dataset
from fedsmooth_core.device import choose_device
from fedsmooth_core.durable import write_atomically
from fedsmooth_core.empirical import accuracy_interval, attack_smoothed, compare, withstands
from fedsmooth_core.errors import CertificationError, ConfigError
from server.certify import check_fit
from server.progress import counting
from server.report import rows_sha256

ATTACK = "attack.json"
"""Beside the rows that were attacked."""

_FEWEST_DRAWS = 50  # of a certificate that is wrong, fewer might not be told from bad luck
_MOST_RADIUS = 16  # as for attack.epsilon: more is no small perturbation


@dataclass(frozen=True)
class AttackTerms:
    """How hard an attack tries, and on how many images.

    Raises:
        ConfigError: for a value that is out of range, naming it.
    """

    radii: tuple[float, ...] | None = None
    """l2 budgets in [0, 1] pixel units; None takes sigma/2, sigma and 2 sigma."""
    steps: int = 20
    """Steps of the attack."""
    draws: int = 16
    """Noise draws of an image in each step."""
    n: int = 1000
    """Fresh draws that classify what the attack found."""
    images: int = 100
    """How many images at most, evenly spaced."""

    def __post_init__(self) -> None:
        for radius in self.radii or ():
            if not (math.isfinite(radius) and 0 <= radius < _MOST_RADIUS):
                raise ConfigError(
                    f"--radius {radius:g} is out of range: allowed is a number in [0, {_MOST_RADIUS}), in "
                    "[0, 1] pixel units."
                )
        lowest = {"--steps": 1, "--draws": 1, "-n": _FEWEST_DRAWS, "--images": 1}
        given = (self.steps, self.draws, self.n, self.images)
        for (name, low), value in zip(lowest.items(), given, strict=True):
            if value < low:
                raise ConfigError(f"{name} {value} is out of range: allowed is {low} or more.")


class _Certified(NamedTuple):
    """Rows that belong to the model: what was certified, and on what terms."""

    indices: list[int]
    is_correct: NDArray[np.bool_]
    radii: NDArray[np.float64]
    sigma: float
    precision: str


def attack_checkpoint(
    checkpoint: Path,
    config: RunConfig,
    rows: Path | None,
    terms: AttackTerms,
    console: Console | None,
    output: Path | None = None,
) -> dict[str, Any]:
    """Attack the model in ``checkpoint``, and compare with its certificates where it has some.

    Args:
        checkpoint: a .safetensors file.
        config: says the data set, the device and the seed; without rows also noise level and precision.
        rows: certificates of this model: its images, noise level and precision are theirs. None attacks
            evenly spaced test images, and compares with nothing.
        terms: how hard the attack tries.
        console: where progress is shown.
        output: where the figures go, as JSON; None: ``attack.json`` beside the rows, or nowhere.

    Returns:
        What is written: the parameters, the figures of each radius, and whether the certificates hold (None
        without rows).

    Raises:
        FedSmoothError: when the checkpoint, the data and the rows do not fit together.
    """
    if config.runtime.threads is not None:
        torch.set_num_threads(config.runtime.threads)
    loaded = load_checkpoint(checkpoint)
    test_set = load_dataset(config.dataset, "test")
    model = load_model(loaded)
    check_fit(loaded, test_set, checkpoint)
    weights = state_sha256(loaded.state)
    certified = None if rows is None else _certified(rows, weights, test_set, terms.images)
    if certified is not None:
        indices, sigma, precision = certified.indices, certified.sigma, certified.precision
    else:
        indices = list(subset_indices(len(test_set), min(terms.images, len(test_set))))
        sigma, precision = config.certified_sigma, config.certification.precision
    if terms.radii is None:
        terms = replace(terms, radii=(sigma / 2, sigma, 2 * sigma))
    assert terms.radii is not None
    device = choose_device(config.runtime.device)
    model = model.to(device)
    images, labels = test_set.images[indices], test_set.labels[indices]
    figures = []
    title, total = f"Attacking at sigma {sigma:g}", len(terms.radii) * len(indices)
    with counting(console, title, total) as advance:
        for radius in terms.radii:
            found = attack_smoothed(
                model,
                torch.from_numpy(images),
                torch.from_numpy(labels),
                indices,
                max_value=test_set.info.max_value,
                radius=radius,
                sigma=sigma,
                steps=terms.steps,
                num_noise_vectors=terms.draws,
                n=terms.n,
                seed=config.seed,
                precision=precision,
                batch_size=config.certification.batch_size,
                device=device,
            )
            groups = []
            for _, counts in found:
                groups.append(counts)
                advance(f"radius {radius:g}", len(counts))
            figures.append(_figures(radius, np.concatenate(groups), labels, certified))
    content: dict[str, Any] = {
        "parameters": {
            "weights": weights,
            "dataset": test_set.info.fingerprint,
            "rows": None if rows is None else rows_sha256(rows),
            "sigma": sigma,
            "precision": precision,
            "steps": terms.steps,
            "draws": terms.draws,
            "n": terms.n,
            "seed": config.seed,
            "device": device.type,
            "num_images": len(indices),
        },
        "radii": figures,
        "holds": None if certified is None else all(one["holds"] for one in figures),
    }
    if output is None and rows is not None:
        output = rows.with_name(ATTACK)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
    return content


def refuse_terms_of_rows(rows: Path, overrides: Sequence[str]) -> None:
    """Refuse settings in which certificates have their own say.

    Raises:
        ConfigError: naming the setting.
    """
    for override in overrides:
        if override.partition("=")[0] in ("certification.sigma", "certification.precision"):
            raise ConfigError(
                f"{override} has no say, for {rows} says at which noise level and precision the model was "
                "certified: leave it out, or name other certificates with --rows."
            )


def _certified(rows: Path, weights: str, test_set: ArrayDataset, num_images: int) -> _Certified:
    """Read the certificates of a model; where there are more than wanted, take evenly spaced ones."""
    found, parameters = read_rows(rows), read_parameters(rows)
    if not len(found):
        raise CertificationError(
            f"{rows} has no rows yet: attack the model once an image is certified."
        )
    match parameters:
        case {
            "weights": str(of_weights),
            "dataset": str(of_images),
            "sigma": float() | int() as sigma,
            "precision": str(precision),
        }:
            pass
        case _:
            raise CertificationError(
                f"{rows} cannot be compared, because it is not recorded beside it what its rows were "
                "certified with: certify the model with fedsmooth certify."
            )
    if of_weights != weights:
        raise CertificationError(
            f"{rows} holds certificates of other weights ({of_weights[:12]}, not {weights[:12]}): name "
            "those of this checkpoint with --rows, or certify it with fedsmooth certify."
        )
    chosen = np.asarray(subset_indices(len(found), min(num_images, len(found))))
    indices = found.idx[chosen]
    is_known = (indices >= 0) & (indices < len(test_set))
    if of_images != test_set.info.fingerprint or not is_known.all():
        raise CertificationError(
            f"{rows} holds certificates of other images than the test set of {test_set.info.name}: set "
            "dataset.name, dataset.root and dataset.image_size to those that were certified."
        )
    is_correct = (found.correct == 1) & (found.predict != ABSTAIN)
    radii = found.radius[chosen]
    return _Certified(indices.tolist(), is_correct[chosen], radii, float(sigma), precision)


def _figures(
    radius: float,
    counts: NDArray[np.int64],
    labels: NDArray[np.int64],
    certified: _Certified | None,
) -> dict[str, Any]:
    is_right = withstands(counts, labels)
    figures: dict[str, Any] = {
        "radius": radius,
        "empirical_accuracy": float(is_right.mean()),
        "confidence_interval_95": list(accuracy_interval(is_right)),
    }
    if certified is None:
        return figures
    compared = compare(counts, labels, certified.is_correct, certified.radii, radius)

    def named(mask: NDArray[np.bool_]) -> list[int]:
        return [index for index, is_meant in zip(certified.indices, mask, strict=True) if is_meant]

    return figures | {
        "certified_accuracy": compared.certified_accuracy,
        "num_certified": int(compared.is_certified.sum()),
        "broken": named(compared.is_broken),
        "broken_beyond_sampling_error": named(compared.is_refuted),
        "holds": compared.holds,
    }


def print_attack(content: dict[str, Any], console: Console) -> None:
    """Print what :func:`attack_checkpoint` returned: a table, and a sentence for each radius."""
    of = content["parameters"]
    table = Table(
        title=f"Under attack, at sigma {of['sigma']:g} (%)",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for name in ("l2 radius", "empirical accuracy", "95 % interval", "certified accuracy"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in content["radii"]:
        low, high = one["confidence_interval_95"]
        table.add_row(
            f"{one['radius']:g}",
            f"{100 * one['empirical_accuracy']:.1f}",
            f"{100 * low:.1f} to {100 * high:.1f}",
            f"{100 * one['certified_accuracy']:.1f}" if "holds" in one else "",
        )
    # As wide as it needs: rich would shorten numbers to fit a narrow terminal.
    unlimited = console.options.update(max_width=100_000)
    table.width = console.measure(table, options=unlimited).maximum
    console.print(table, soft_wrap=True)
    if content["holds"] is None:
        console.print(
            "This model has no certificates to compare with: fedsmooth certify makes them.",
            soft_wrap=True,
        )
        return
    for one in content["radii"]:
        style = None if one["holds"] else "bold red"
        console.print(_verdict(one), style=style, soft_wrap=True, highlight=False)


def _verdict(one: dict[str, Any]) -> str:
    if not one["num_certified"]:
        return f"Radius {one['radius']:g}: no image is certified, so nothing is promised."
    where = f"Radius {one['radius']:g}: of {one['num_certified']} certified images"
    refuted, broken = one["broken_beyond_sampling_error"], one["broken"]
    if refuted:
        return (
            f"{where} {len(broken)} are misclassified, {_listed(refuted)} beyond sampling error: "
            "THE CERTIFICATES ARE BROKEN."
        )
    if broken:
        return (
            f"{where} {len(broken)} are misclassified ({_listed(broken)}), within sampling error: the "
            "certificates hold."
        )
    return f"{where} none is misclassified: the certificates hold."


def _listed(indices: Sequence[int]) -> str:
    return f"image{'s' if len(indices) > 1 else ''} {', '.join(str(index) for index in indices)}"
