"""Sequential certification beside fixed n: draws, seconds, and certified accuracy on the grid.

Three parts:

    published   The published logs of centralised CIFAR-10 models say how likely each image's class is.
                Both methods are simulated with binomial draws at those chances, many times over. Left
                out where ../shared/data/certify_reference is not.
    trained     A small network, trained on the digits with noise for some seconds, certified by both
                methods with the same noise.
    replayed    A real model at n = 100,000: its draws are counted once, block by block, and both methods
                are replayed on them, the sequential one in many orders of the blocks. Draws are
                independent, so any order is as likely, and each order of the same draws has the same
                fixed n beside it. The model is that of --checkpoint at its own sigma, else the small
                network on the digits at three sigmas.

    python benchmarks/sequential.py [--quick] [--checkpoint FILE] [-o FILE]

Prints tables and writes JSON. Seconds are of one CPU thread and depend on the machine; all else is
seeded.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr

from fedsmooth_core.certification.analysis import Rows, certified_accuracy, read_rows
from fedsmooth_core.certification.bounds import p_a_lower
from fedsmooth_core.certification.counting import counted_of_blocks, unit_images
from fedsmooth_core.certification.passes import NOISE_BLOCK, Block, Passes
from fedsmooth_core.certification.precision import in_precision
from fedsmooth_core.certification.procedure import Procedure, certify_images
from fedsmooth_core.certification.sequential import SequentialTest, sequential_test
from fedsmooth_core.certification.subset import subset_indices
from fedsmooth_core.checkpoint import load_checkpoint, load_model
from fedsmooth_core.config import (
    AttackConfig,
    DatasetConfig,
    ModelConfig,
    SmoothingConfig,
    TrainingConfig,
    TrainingPlan,
)
from fedsmooth_core.data import ArrayDataset, ClientData, load_dataset
from fedsmooth_core.models import ModelSpec, build_model
from fedsmooth_core.seeding import Purpose, torch_generator
from fedsmooth_core.training import local_train

REPOSITORY = Path(__file__).resolve().parents[1]
REFERENCE = REPOSITORY.parent / "shared" / "data" / "certify_reference"
LOGS = {
    "cohen_resnet110_sigma_0.12": 0.12,
    "cohen_resnet110_sigma_0.25": 0.25,
    "salman_pgd2_m8_eps255_sigma_0.25": 0.25,
}
ALPHA = 0.001
CHANCE_OF_ABSTAINED = 0.45
"""What a log's abstention stands for: its p is somewhere below 1/2."""


def simulate(
    test: SequentialTest, p: NDArray[np.float64], rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
    """Certify sequentially where the selected class comes with chance p at each draw.

    Returns:
        For each p: the certified radius, whether it is certified at all, the draws used, and the
        count that all of n draws would have had.
    """
    new = np.stack([rng.binomial(num_new, p) for num_new in np.diff(test.looks, prepend=0)])
    counts = new.cumsum(axis=0)
    return *decided(test, counts), counts[-1]


def decided(
    test: SequentialTest, counts: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.int64]]:
    """Certify sequentially, given the counts (looks, images) that each look would find.

    Returns:
        For each image: the certified radius, whether it is certified at all, and the draws used.
    """
    num_images = counts.shape[1]
    level, look = np.zeros(num_images, np.int64), np.zeros(num_images, np.int64)
    count, going_on = np.zeros(num_images, np.int64), np.ones(num_images, bool)
    for i, count_so_far in enumerate(counts):
        at = np.flatnonzero(going_on)
        look[at], count[at] = i, count_so_far[at]
        level[at], is_decided = test.decide(look[at], level[at], count[at])
        going_on[at] = ~is_decided
    radius, is_certified = test.certificate(look, level, count)
    return radius, is_certified, test.looks[look]


def published(name: str, sigma: float, step: float, n: int, repeats: int) -> dict[str, Any]:
    """Simulate both methods on a published log, with the same draws."""
    rows = read_rows(REFERENCE / f"{name}.tsv")
    chance = np.where(rows.predict < 0, CHANCE_OF_ABSTAINED, ndtr(rows.radius / sigma))
    p = np.repeat(chance, repeats)
    correct = np.repeat(rows.correct == 1, repeats)
    test = sequential_test(sigma, n, ALPHA, step)
    radius, is_certified, used, count = simulate(test, p, np.random.default_rng(0))
    bound = p_a_lower(count, n, ALPHA)
    losses = []
    for r, t in zip(test.radii, test.thresholds, strict=True):
        by_fixed = np.mean(correct & (bound >= t))
        losses.append(float(by_fixed - np.mean(correct & is_certified & (radius >= r))))
    return {
        "log": name,
        "sigma": sigma,
        "radius_step": step,
        "n": n,
        "mean_n": round(float(used.mean()), 1),
        "factor": round(n / float(used.mean()), 2),
        "largest_loss_points": round(100 * max(losses), 3),
        "images_times_repeats": len(p),
    }


def trained_model(sigma: float, steps: int) -> torch.nn.Module:
    """Train the small network on the digits, with noise of this level, on one thread."""
    plan = TrainingPlan(
        model=ModelConfig(name="small_cnn"),
        smoothing=SmoothingConfig(sigma=sigma, num_noise_vectors=2),
        attack=AttackConfig(attack_steps=0),
        training=TrainingConfig(local_steps=steps, batch_size=60, learning_rate=0.05),
    )
    train_set = load_dataset(plan.dataset, "train")
    spec = ModelSpec.of(plan.model, train_set.info)
    generator = torch_generator(plan.seed, Purpose.MODEL_INIT)
    model = build_model(spec, train_set.info.mean, train_set.info.std, generator)
    local_train(model, ClientData.from_dataset(train_set), plan, 1, 0)
    return model.eval()


def certified(
    model: torch.nn.Module, test_set: ArrayDataset, num_images: int, procedure: Procedure
) -> tuple[Rows, float]:
    """Certify evenly spaced test images; return the rows and the CPU seconds that it took."""
    indices = list(subset_indices(len(test_set), num_images))
    started = time.process_time()
    rows = certify_images(
        model,
        torch.from_numpy(test_set.images[indices]),
        torch.from_numpy(test_set.labels[indices]),
        indices,
        max_value=test_set.info.max_value,
        procedure=procedure,
        batch_size=512,
        device="cpu",
    )
    return Rows.of(rows), time.process_time() - started


def compare(
    sigma: float, steps: list[float], n: int, num_images: int, training_steps: int
) -> list[dict[str, Any]]:
    """Train a model and certify it by both methods, the sequential one with each grid step."""
    model = trained_model(sigma, training_steps)
    test_set = load_dataset(DatasetConfig(), "test")
    procedure = Procedure(sigma=sigma, n=n, alpha=ALPHA)
    fixed, fixed_seconds = certified(model, test_set, num_images, procedure)
    results = []
    for step in steps:
        sequential = replace(procedure, method="sequential", radius_step=step)
        rows, seconds = certified(model, test_set, num_images, sequential)
        assert rows.n is not None
        radii = sequential_test(sigma, n, ALPHA, step).radii
        by_fixed, by_rows = certified_accuracy(fixed, radii), certified_accuracy(rows, radii)
        results.append(
            {
                "sigma": sigma,
                "radius_step": step,
                "n": n,
                "num_images": len(rows),
                "mean_n": round(float(rows.n.mean()), 1),
                "factor": round(n / float(rows.n.mean()), 2),
                "fixed_seconds": round(fixed_seconds, 1),
                "sequential_seconds": round(seconds, 1),
                "radii": radii.tolist(),
                "fixed_accuracy": by_fixed.round(4).tolist(),
                "sequential_accuracy": by_rows.round(4).tolist(),
                "largest_loss_points": round(100 * float((by_fixed - by_rows).max()), 3),
            }
        )
    return results


def counted_by_block(
    model: torch.nn.Module, test_set: ArrayDataset, num_images: int, sigma: float, n: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Count the selected class in each block of an image's draws.

    Returns:
        (images, blocks) counts, the last block holding what is left of n, and whether the class is right.
    """
    indices = list(subset_indices(len(test_set), num_images))
    images = torch.from_numpy(test_set.images[indices])
    x = unit_images(images, test_set.info.max_value, "cpu")
    computing = in_precision(model, "float32")
    passes = Passes(computing, images.shape[1:], sigma=sigma, device="cpu", batch_size=None)
    counts, classes = [], []
    for row, index in enumerate(indices):
        selection, estimation = (
            torch_generator(0, purpose, index)
            for purpose in (Purpose.SELECTION, Purpose.ESTIMATION)
        )
        draws = list(counted_of_blocks(n))
        blocks = [Block(0, selection, 0, 100)]
        blocks += [Block(0, estimation, 1 + i, draws[i]) for i in range(len(draws))]
        by_block = passes.count(x[row : row + 1], blocks, len(blocks), [index])
        classes.append(int(by_block[0].argmax()))
        counts.append(by_block[1:, classes[-1]])
    return np.array(counts), np.array(classes) == test_set.labels[indices]


def replayed(
    what: str,
    by_block: NDArray[np.int64],
    correct: NDArray[np.bool_],
    sigma: float,
    steps: list[float],
    n: int,
    repeats: int,
) -> list[dict[str, Any]]:
    """Replay both methods on counted draws, the sequential one in many orders of the blocks."""
    rng = np.random.default_rng(0)
    num_images, num_blocks = by_block.shape
    bound = p_a_lower(by_block.sum(axis=1), n, ALPHA)
    results = []
    for step in steps:
        test = sequential_test(sigma, n, ALPHA, step)
        by_fixed = np.array([np.mean(correct & (bound >= t)) for t in test.thresholds])
        used, by_orders = 0.0, np.zeros(len(test.radii))
        for _ in range(repeats):
            order = rng.permuted(np.tile(np.arange(num_blocks - 1), (num_images, 1)), axis=1)
            # A last block that is not full stays the last.
            order = np.column_stack([order, np.full(num_images, num_blocks - 1)])
            so_far = np.take_along_axis(by_block, order, axis=1).cumsum(axis=1)
            at_looks = so_far[:, -(-test.looks // NOISE_BLOCK) - 1].T
            radius, is_certified, draws = decided(test, at_looks)
            used += float(draws.mean()) / repeats
            certified = correct & is_certified & (radius >= test.radii[:, np.newaxis])
            by_orders += certified.mean(axis=1) / repeats
        results.append(
            {
                "what": what,
                "sigma": sigma,
                "radius_step": step,
                "n": n,
                "num_images": num_images,
                "orders": repeats,
                "mean_n": round(used, 1),
                "factor": round(n / used, 2),
                "radii": test.radii.tolist(),
                "fixed_accuracy": by_fixed.round(4).tolist(),
                "sequential_accuracy": by_orders.round(4).tolist(),
                "largest_loss_points": round(100 * float((by_fixed - by_orders).max()), 3),
            }
        )
    return results


def real_models(
    checkpoint: Path | None, training_steps: int
) -> Iterator[tuple[str, torch.nn.Module, ArrayDataset, float]]:
    """Yield what to replay: its name, the model, its test images, sigma."""
    if checkpoint is None:
        for sigma in (0.12, 0.25, 0.5):
            test_set = load_dataset(DatasetConfig(), "test")
            yield "small_cnn, digits", trained_model(sigma, training_steps), test_set, sigma
        return
    loaded = load_checkpoint(checkpoint)
    config = loaded.metadata["config"]
    test_set = load_dataset(DatasetConfig(**config["dataset"]), "test")
    name = f"{loaded.metadata['model']['name']}, {test_set.info.name}"
    yield name, load_model(loaded), test_set, config["smoothing"]["sigma"]


def table(results: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Render some of the results' entries as Markdown."""
    lines = [f"| {' | '.join(columns.values())} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(str(row[key]) for key in columns)} |" for row in results]
    return "\n".join(lines)


COMMON = {
    "sigma": "sigma",
    "radius_step": "Grid step",
    "n": "n",
    "mean_n": "Draws an image",
    "factor": "Times fewer",
    "largest_loss_points": "Largest loss, points",
}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("sequential.json"))
    parser.add_argument(
        "--checkpoint", type=Path, help="the model to replay; else one on the digits"
    )
    parser.add_argument("--images", type=int, default=40, help="how many images are replayed (40)")
    parser.add_argument("--quick", action="store_true", help="a few seconds: does it run?")
    options = parser.parse_args()
    torch.set_num_threads(1)
    repeats, n, num_images, training_steps = 200, 10_000, 120, 600
    full_n, num_replayed = 100_000, options.images
    if options.quick:
        repeats, n, num_images, training_steps = 4, 1_000, 20, 60
        full_n, num_replayed = 3_000, 10
    steps = [0.25, 0.125, 0.05]
    report: dict[str, Any] = {
        "what": "draws of sequential certification against fixed n, at alpha .001",
        "machine": {
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "cores": os.cpu_count(),
            "threads": 1,
            "python": platform.python_version(),
            "torch": version("torch"),
        },
    }
    if REFERENCE.is_dir():
        report["published"] = [
            published(name, sigma, step, draws, repeats)
            for name, sigma in LOGS.items()
            for draws, step in [*((100_000, step) for step in steps), (10_000, steps[0])]
        ]
        print(table(report["published"], {"log": "Published log", **COMMON}), end="\n\n")
    else:
        print("No published logs: ../shared/data/certify_reference is not here.", end="\n\n")
    report["trained"] = [
        row
        for sigma in (0.25, 0.5)
        for row in compare(sigma, steps[:2], n, num_images, training_steps)
    ]
    times = {
        "fixed_seconds": "CPU seconds, fixed",
        "sequential_seconds": "CPU seconds, sequential",
    }
    print(table(report["trained"], COMMON | times))
    print(f"\n{num_images} digits a row of this table.", end="\n\n")
    report["replayed"] = []
    for what, model, test_set, sigma in real_models(options.checkpoint, training_steps):
        started = time.process_time()
        by_block, correct = counted_by_block(model, test_set, num_replayed, sigma, full_n)
        rows = replayed(what, by_block, correct, sigma, steps, full_n, repeats)
        seconds = round(time.process_time() - started, 1)
        report["replayed"] += [row | {"cpu_seconds_of_all_steps": seconds} for row in rows]
    print(table(report["replayed"], {"what": "Replayed", **COMMON}))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{num_replayed} images a row; written to {options.output}")


if __name__ == "__main__":
    main()
