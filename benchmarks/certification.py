"""Certification's speed: noisy images a second of this engine, of the bare model, and of others.

    python benchmarks/certification.py [--quick] [--device cpu] [-o FILE]

For each model, in turns:

    bare        the model as it is on images that are there already, at its best batch size and in its
                better memory order (searched first)
    ours        certify_images, fixed n
    Cohen       CERTIFY as Cohen et al. (2019) publish it: the image repeated, randn_like times sigma,
                argmax, counts on the host, 400 or 1,000 images a batch as in their scripts; in float32
    ART         certify of IBM's adversarial-robustness-toolbox, where it is installed; in float32

and what each option of ours gains on the forward pass. Weights are random: no speed depends on them.
One CPU thread is timed in CPU seconds, which other processes hardly disturb; all threads, and CUDA, in
seconds of the clock.
"""

import copy
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from harness import Headline, Section, Size, Timing, interleaved, main
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsmooth_core.certification.fold import folded
from fedsmooth_core.certification.passes import NOISE_BLOCK, Passes
from fedsmooth_core.certification.precision import in_precision
from fedsmooth_core.certification.procedure import Procedure, certify_images
from fedsmooth_core.models import ModelSpec, build_model

SHAPE = (3, 32, 32)
SIGMA = 0.25
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COHEN_BATCHES = (400, 1000)
TARGET_OF_BARE = 0.92
TARGETS_OF_COHEN = {
    ("alexnet", "float32"): 1.05,
    ("alexnet", "bfloat16"): 1.7,
    ("resnet20", "float32"): 1.5,
    ("resnet20", "bfloat16"): 2.9,
}
DRAWS_OF_10_000_IMAGES = 10_000 * NOISE_BLOCK * (1 + -(-100_000 // NOISE_BLOCK))


def network(name: str, device: torch.device) -> nn.Module:
    """Build an architecture for CIFAR-10 with initial weights, in eval mode."""
    spec = ModelSpec(name, "he", 10, *SHAPE)
    model = build_model(spec, (0.5,) * 3, (0.25,) * 3, torch.Generator().manual_seed(0))
    return model.to(device).eval()


def bare(model: Callable[[Tensor], Tensor], images: Tensor, num_draws: int) -> None:
    """Pass the same images until as many were passed as there are to be draws."""
    with torch.inference_mode():
        for _ in range(num_draws // len(images)):
            model(images)


def cohen(model: nn.Module, image: Tensor, num_draws: int, batch_size: int) -> NDArray[np.int64]:
    """Sample under noise as Cohen et al. (2019) do."""
    counts = np.zeros(10, np.int64)
    with torch.no_grad():
        for first in range(0, num_draws, batch_size):
            batch = image.repeat((min(batch_size, num_draws - first), 1, 1, 1))
            noise = torch.randn_like(batch) * SIGMA
            predictions = model(batch + noise).argmax(1).cpu().numpy()
            counts += np.bincount(predictions, minlength=10)
    return counts


def art(model: nn.Module, device: torch.device) -> Callable[[int, int], object]:
    """Return ART's certify, of a number of draws and a batch size."""
    from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing

    smoothed = PyTorchRandomizedSmoothing(
        model,
        loss=nn.CrossEntropyLoss(),
        input_shape=SHAPE,
        nb_classes=10,
        device_type="gpu" if device.type == "cuda" else "cpu",
        sample_size=NOISE_BLOCK,
        scale=SIGMA,
    )
    image = np.random.default_rng(0).random((1, *SHAPE), dtype=np.float32)
    return lambda num_draws, batch: smoothed.certify(image, num_draws - NOISE_BLOCK, batch)


def ours(
    model: nn.Module, images: Tensor, num_draws: int, precision: str, devices: list[torch.device]
) -> None:
    """Certify as many images as devices, with so many draws each."""
    n = num_draws // len(devices) - NOISE_BLOCK
    rows = certify_images(
        model,
        images[: len(devices)],
        torch.zeros(len(devices), dtype=torch.int64),
        range(len(devices)),
        max_value=1,
        procedure=Procedure(sigma=SIGMA, n0=NOISE_BLOCK, n=n, precision=precision),
        batch_size=None,
        device=devices,
    )
    assert len(list(rows)) == len(devices)


class Workload:
    """One model on one device with so many threads, and what is measured of it."""

    def __init__(self, name: str, size: Size, device: torch.device, threads: int) -> None:
        self.name, self.size, self.device, self.threads = name, size, device, threads
        self.model = network(name, device)
        self.images = torch.rand((1 << (15 if device.type == "cuda" else 10), *SHAPE))
        self.images = self.images.to(device)
        self.is_quick = size is Size.QUICK
        if device.type == "cuda":
            self.num_draws = 1 << (15 if self.is_quick else 20)
            self.batches = [1024, 4096, 16384, 32768]
        else:
            # Whole passes of every size in question: what fills up the last one is no work.
            quick, full = (1536, 3072) if name == "alexnet" else (256, 1024)
            self.num_draws = threads * (quick if self.is_quick else full)
            self.batches = [128] if self.is_quick else [128, 256, 512, 1024]
        self.rounds = 1 if self.is_quick else 5
        self.left_out: dict[str, str] = {}

    def timed(
        self, candidates: dict[str, tuple[Callable[[], object], int]], rounds: int
    ) -> dict[str, Timing]:
        """Time candidates, each with its number of draws; the seconds are of as many draws each."""
        clock = time.perf_counter
        if self.device.type == "cpu" and self.threads == 1:
            clock = time.process_time
        calls = {name: call for name, (call, _) in candidates.items()}
        timings = interleaved(calls, rounds, self.device, clock=clock)
        return {
            name: Timing(tuple(s * self.num_draws / candidates[name][1] for s in timing.seconds))
            for name, timing in timings.items()
        }

    def best_bare(self, precision: str) -> tuple[str, Callable[[], object]]:
        """Search the batch size and memory order at which the model itself is fastest."""
        dtype = DTYPES[precision]
        candidates: dict[str, Callable[[], object]] = {}
        for order, layout in (("NCHW", torch.contiguous_format), ("NHWC", torch.channels_last)):
            model = copy.deepcopy(self.model).to(dtype).to(memory_format=layout)
            for batch in self.batches:
                x = self.images[:batch].to(dtype).contiguous(memory_format=layout)
                candidates[f"batch {batch}, {order}"] = partial(bare, model, x, self.num_draws)
        draws = {name: (call, self.num_draws) for name, call in candidates.items()}
        timings = self.timed(draws, 1)
        best = min(timings, key=lambda name: min(timings[name].seconds))
        return best, candidates[best]

    def rows(self) -> list[dict[str, Any]]:
        """Measure ours beside the bare pass and the other programs."""
        devices = [self.device] * (self.threads if self.device.type == "cpu" else 1)
        candidates: dict[str, tuple[Callable[[], object], int]] = {}
        details: dict[str, str] = {}
        for precision in DTYPES:
            computing = in_precision(self.model, precision)  # first: it switches TF32 off
            details[f"bare {precision}"], call = self.best_bare(precision)
            candidates[f"bare {precision}"] = (call, self.num_draws)
            candidates[f"ours {precision}"] = (
                partial(ours, computing, self.images, self.num_draws, precision, devices),
                self.num_draws,
            )
            blocks = Passes(
                computing, torch.Size(SHAPE), sigma=SIGMA, device=self.device, batch_size=None
            ).num_blocks
            details[f"ours {precision}"] = f"batch {blocks * NOISE_BLOCK}"
        for batch in COHEN_BATCHES:
            draws = max(batch, self.num_draws // batch * batch)
            candidates[f"Cohen et al. {batch}"] = (
                partial(cohen, self.model, self.images[0], draws, batch),
                draws,
            )
        if find_spec("art") is None or find_spec("statsmodels") is None:
            self.left_out["IBM ART"] = (
                "adversarial-robustness-toolbox and statsmodels, which it needs, are not installed."
            )
        else:
            certify = art(copy.deepcopy(self.model), self.device)
            draws = min(self.num_draws, 4096)  # it keeps all noisy images: 59 KB a draw
            for batch in (128, 512):
                candidates[f"IBM ART {batch}"] = (partial(certify, draws, batch), draws)
        timings = self.timed(candidates, self.rounds)
        least = {
            who: min(
                (timings[name] for name in timings if name.startswith(who)), key=lambda t: t.median
            )
            for who in ("Cohen et al.", "IBM ART")
            if any(name.startswith(who) for name in timings)
        }
        rows = []
        for name, timing in timings.items():
            row: dict[str, Any] = {
                "model": self.name,
                "threads": self.threads if self.device.type == "cpu" else None,
                "what": name,
                "how": details.get(name, ""),
                "per_second": self.num_draws / timing.median,
                **timing.record(),
            }
            if name.startswith("ours"):
                against = timings[name.replace("ours", "bare")]
                row["of_bare"] = timing.times_faster_than(against).median
                row["of_cohen"] = timing.times_faster_than(least["Cohen et al."]).median
                if "IBM ART" in least:
                    row["of_art"] = timing.times_faster_than(least["IBM ART"]).median
            rows.append(row)
        return rows

    def options(self) -> list[dict[str, Any]]:
        """Measure the forward pass without and with each option, at our pass size."""
        rows = []
        for precision, dtype in DTYPES.items():
            computing = in_precision(self.model, precision)
            passes = Passes(
                computing, torch.Size(SHAPE), sigma=SIGMA, device=self.device, batch_size=None
            )
            images = self.images[: passes.num_blocks * NOISE_BLOCK]
            plain, fold = (m.to(dtype) for m in (copy.deepcopy(self.model), folded(self.model)))
            models = {"none": plain, "NHWC": _in_nhwc(plain)}
            if self.name != "alexnet":  # it has no batch normalisation
                models |= {"folded": fold, "folded, NHWC": _in_nhwc(fold)}
            draws = -(-self.num_draws // 2 // len(images)) * len(images)
            candidates: dict[str, tuple[Callable[[], object], int]] = {
                name: (partial(bare, model, images.to(dtype), draws), draws)
                for name, model in models.items()
            }
            candidates["ours"] = (partial(bare, computing, images, draws), draws)
            if not self.is_quick:
                compiled = torch.compile(computing, dynamic=False)
                try:
                    bare(compiled, images, len(images))
                    candidates["ours, compiled"] = (partial(bare, compiled, images, draws), draws)
                except Exception as error:
                    reason = (str(error) or type(error).__name__).splitlines()[0]
                    self.left_out[f"torch.compile, {self.name}, {precision}"] = reason
            if self.device.type == "cuda":
                for name, module in (
                    ("certified, CUDA graph", computing),
                    ("certified, no graph", nn.Sequential(computing)),
                ):
                    call = partial(ours, module, self.images, draws, precision, [self.device])
                    candidates[name] = (call, draws)
            timings = self.timed(candidates, self.rounds)
            rows += [
                {
                    "model": self.name,
                    "threads": self.threads if self.device.type == "cpu" else None,
                    "what": f"pass {precision}",
                    "how": name,
                    "per_second": self.num_draws / timing.median,
                    "of_none": timing.times_faster_than(timings["none"]).median,
                    **timing.record(),
                }
                for name, timing in timings.items()
            ]
        return rows


def _in_nhwc(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(memory_format=torch.channels_last)


def headlines(rows: Sequence[dict[str, Any]], device: torch.device) -> list[Headline]:
    """Set what was measured of ours beside the targets."""
    lines = []
    for row in rows:
        if not str(row["what"]).startswith("ours"):
            continue
        precision = str(row["what"]).split()[1]
        where = "CUDA" if row["threads"] is None else f"CPU threads: {row['threads']}"
        what = f"certification, {row['model']} {precision}, {where}"
        lines.append(
            Headline(f"{what}: of the bare pass", f"{row['of_bare']:.2f}", f">= {TARGET_OF_BARE}")
        )
        target = TARGETS_OF_COHEN[row["model"], precision]
        lines.append(
            Headline(
                f"{what}: of Cohen et al.",
                f"{row['of_cohen']:.2f}x",
                f">= {target}x" if device.type == "cpu" else "",
            )
        )
        if device.type == "cuda":
            minutes = DRAWS_OF_10_000_IMAGES / row["per_second"] / 60
            lines.append(
                Headline(
                    f"{what}: 10,000 images at n = 100,000, estimated from the rate",
                    f"{minutes:.1f} min",
                    "< 10 min (H200)" if row["model"] == "alexnet" else "",
                )
            )
    return lines


def run(size: Size, device: torch.device) -> Section:
    """Measure both models with one thread and with all; on CUDA once."""
    all_threads = torch.get_num_threads()
    threads = sorted({1, all_threads}) if device.type == "cpu" else [all_threads]
    if size is Size.QUICK:
        threads = threads[:1]
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for number, name in itertools.product(threads, ("alexnet", "resnet20")):
        torch.set_num_threads(number)
        workload = Workload(name, size, device, number)
        rows += workload.rows()
        if number == threads[0]:
            rows += workload.options()
        left_out |= workload.left_out
    torch.set_num_threads(all_threads)
    notes = [
        "Noisy images a second; ratios are medians of the ratios within a round. Cohen et al. and ART: "
        "the better of their batch sizes, in float32. Options: forward passes alone, against none.",
    ]
    columns = {
        "model": "Model",
        "threads": "Threads",
        "what": "What",
        "how": "How",
        "per_second": "Images a second",
        "of_bare": "Of bare",
        "of_cohen": "Of Cohen's",
        "of_art": "Of ART's",
        "of_none": "Of no option",
    }
    return Section("Certification", columns, rows, notes, left_out, headlines(rows, device))


if __name__ == "__main__":
    main(__doc__ or "", run)
