"""Certify a checkpoint on this machine: rows on disk as they come, then a summary."""

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from fedsmooth_core.certification.analysis import summary
from fedsmooth_core.certification.procedure import certify_images
from fedsmooth_core.certification.rows import Parameters, RowFile
from fedsmooth_core.certification.subset import subset_indices
from fedsmooth_core.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    load_model,
    state_sha256,
)
from fedsmooth_core.config import RunConfig
from fedsmooth_core.data import ArrayDataset, load_dataset
from fedsmooth_core.device import choose_device
from fedsmooth_core.durable import write_atomically
from fedsmooth_core.errors import CertificationError, CheckpointError
from server.owed import ROWS, SUMMARY
from server.progress import counting
from server.report import load_curve, table_radii
from server.terms import certification_terms, procedure_of


def find_checkpoint(path: Path) -> Path:
    """Return the weights that a path means: itself, or the latest checkpoint of a run directory.

    Raises:
        CheckpointError: when there is none.
    """
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist: give a .safetensors file or a run directory."
        )
    if not path.is_dir():
        return path
    latest = latest_checkpoint(path / "checkpoints") or latest_checkpoint(path)
    if latest is None:
        raise CheckpointError(
            f"{path} holds no complete checkpoint: give a .safetensors file or a run directory."
        )
    return latest


def certify_checkpoint(
    path: Path, config: RunConfig, folder: Path, console: Console | None = None
) -> Path:
    """Certify the model in ``path`` on the configured test images, continuing what is in ``folder``.

    Args:
        path: a checkpoint's .safetensors file.
        config: says the data set, the noise level and CERTIFY's parameters.
        folder: receives ``rows.tsv`` (the published format) and ``summary.json``.
        console: where progress is shown.

    Returns:
        The path of the rows.

    Raises:
        FedSmoothError: when the checkpoint, the data or rows that are there do not fit together.
    """
    if config.runtime.threads is not None:
        torch.set_num_threads(config.runtime.threads)
    checkpoint = load_checkpoint(path)
    test_set = load_dataset(config.dataset, "test")
    loaded = load_model(checkpoint)
    check_fit(checkpoint, test_set, path)
    device = choose_device(config.runtime.device)
    model = loaded.to(device)
    settings = config.certification
    indices = subset_indices(len(test_set), settings.num_images)
    parameters = certification_terms(config, test_set, device)
    parameters["weights"] = state_sha256(checkpoint.state)
    with RowFile(folder / ROWS, parameters) as file:
        todo = [index for index in indices if index not in file.done]
        _certify_into(file, model, test_set, todo, config, device, console)
    write_summary(folder, parameters, len(test_set), settings.radius_step)
    return folder / ROWS


def write_summary(
    folder: Path, parameters: Parameters, num_test_images: int | None, radius_step: float
) -> dict[str, Any]:
    """Write and return all figures of the rows in a folder: they are complete if this file is there."""
    curve = load_curve(folder / ROWS)
    figures = summary(curve.rows, table_radii([curve], radius_step))
    content = {"parameters": parameters, "num_test_images": num_test_images} | figures
    write_atomically(folder / SUMMARY, (json.dumps(content, indent=2) + "\n").encode())
    return content


def _certify_into(
    file: RowFile,
    model: nn.Module,
    test_set: ArrayDataset,
    todo: list[int],
    config: RunConfig,
    device: torch.device,
    console: Console | None,
) -> None:
    rows = certify_images(
        model,
        torch.from_numpy(test_set.images[todo]),
        torch.from_numpy(test_set.labels[todo]),
        todo,
        max_value=test_set.info.max_value,
        procedure=procedure_of(config),
        batch_size=config.certification.batch_size,
        device=_all_like(device, len(todo)),
        compile=config.certification.compile,
    )
    correct = 0
    title = f"Certifying at sigma {config.certified_sigma:g}"
    with counting(console, title, len(todo)) as advance:
        for done, row in enumerate(rows, start=1):
            file.append(row)
            correct += row.correct
            advance(f"certified accuracy at radius 0: {correct / done:.1%}")


def _all_like(device: torch.device, num_images: int) -> list[torch.device]:
    """Return all CUDA devices for ``cuda``, and the CPU once for each thread that it may use."""
    if device.type == "cuda":
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    # Threads that each certify an image wait for nobody; threads within one pass do, layer by layer.
    return [device] * max(1, min(torch.get_num_threads(), num_images))


def check_fit(checkpoint: Checkpoint, test_set: ArrayDataset, path: Path) -> None:
    """Refuse a model of other images or classes than the test set's.

    Raises:
        CertificationError: saying what both are.
    """
    spec = checkpoint.metadata.get("model", {})
    wanted = tuple(spec.get(key) for key in ("channels", "height", "width", "num_classes"))
    found = (*test_set.info.shape, test_set.info.num_classes)
    if wanted != found:
        raise CertificationError(
            f"{path} classifies images of (channels, height, width) {wanted[:3]} into {wanted[3]} "
            f"classes, but {test_set.info.name} has {found[:3]} and {found[3]}: certify it on "
            "what it was trained for."
        )
