"""How near to the machine: operations and bytes of a local step and of a certificate, and their floor.

Operations are counted by walking the model: two for a multiply-add of a convolution or a linear layer,
nothing else. Bytes are those that must come from memory and go back although all activations stay in
a cache. The floor is the longer of the two times that this machine's peak and copying imply. The peak is
the faster of torch.mm and a large convolution, for neither is always it: on an AMD processor PyTorch's
float32 products come from MKL, its convolutions from oneDNN, which is faster there. All of it is measured
in the same turns as what is judged by it.

    python benchmarks/roofline.py [--quick] [--device cpu] [-o FILE]

A share may exceed what the count allows: an engine that needs fewer operations than the straightforward
way, with conv(x + d) = conv(x) + conv(d) for example, is judged by the straightforward count.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import workload
from harness import Headline, Section, Size, Timing, fair_clock, interleaved, main
from torch import Tensor, nn

from fedsmooth_core.certification.procedure import Procedure, certify_images
from fedsmooth_core.config import TrainingPlan


@dataclass(frozen=True)
class Counts:
    """What something costs on any machine."""

    operations: float
    """Floating-point operations: two for each multiply-add."""
    bytes: float
    """Read from memory and written to it, with every activation in a cache."""

    def floor(self, operations_per_second: float, bytes_per_second: float) -> float:
        """Return the seconds that it cannot be done in less than."""
        return max(self.operations / operations_per_second, self.bytes / bytes_per_second)


@dataclass(frozen=True)
class Layers:
    """A model's multiply-adds, walked layer by layer."""

    first: int
    """Multiply-adds of the first layer, for one image."""
    all: int
    """Of all layers, for one image."""
    weight_bytes: int
    """Of the trainable parameters, in float32."""
    image_bytes: int
    """Of one image, in float32."""

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, image: Tensor) -> "Layers":
        """Walk a model on one image (1, C, H, W)."""
        counts: list[int] = []

        def count(layer: nn.Module, _: Any, out: Tensor) -> None:
            weight = layer.weight
            assert isinstance(weight, Tensor)
            # Each output value sums over the weights of its output channel.
            counts.append(out.numel() * weight[0].numel())

        hooks = [
            layer.register_forward_hook(count)
            for layer in model.modules()
            if isinstance(layer, nn.Conv2d | nn.Linear)
        ]
        model(image)
        for hook in hooks:
            hook.remove()
        weights = sum(4 * weight.numel() for weight in model.parameters())
        return cls(counts[0], sum(counts), weights, 4 * image.numel())

    def local_step(self, plan: TrainingPlan) -> Counts:
        """Count one mini-batch of SmoothAdv training with momentum.

        Forward, to the input and to the weights each take all multiply-adds once. An attack step is
        forward and to the input (one-point: forward alone); the training step is all three, but for
        the gradient to the image. Weights are read once a pass; their gradients are written; the
        update reads weights, gradients and momentum and writes weights and momentum.
        """
        passes = 1 if plan.attack.estimator == "one_point" else 2
        passes *= plan.attack.attack_steps
        images = plan.training.batch_size * plan.smoothing.num_noise_vectors
        multiply_adds = images * ((passes + 3) * self.all - self.first)
        return Counts(2.0 * multiply_adds, float((passes + 2 + 1 + 5) * self.weight_bytes))

    def certificate(self, draws: int, batch_size: int) -> Counts:
        """Count one certificate: a forward pass a draw, whose noise is written and read once."""
        batches = -(-draws // batch_size)
        traffic = 2 * draws * self.image_bytes + batches * self.weight_bytes
        return Counts(2.0 * draws * self.all, float(traffic))


@dataclass(frozen=True)
class Case:
    """Something to judge: what one call does, and in which precision."""

    what: str
    precision: str
    call: Callable[[], object]
    counts: Counts
    """Of one call."""
    units: int
    """Local steps or certificates in one call."""


def _peaks(size: Size, device: torch.device) -> dict[str, tuple[Callable[[], object], float]]:
    """Return what measures the machine: by name, the call and its operations or bytes."""
    side, repeats, values = (256, 1, 1 << 20) if size is Size.QUICK else (2048, 1, 1 << 26)
    if size is Size.FULL and device.type == "cuda":
        side, repeats, values = 8192, 10, 1 << 29
    peaks: dict[str, tuple[Callable[[], object], float]] = {}

    def repeated(call: Callable[[], object], precision: str) -> Callable[[], object]:
        @torch.no_grad()
        def calls() -> None:
            with workload.in_precision(device, precision):
                for _ in range(repeats):
                    call()

        return calls

    channels, map_side, kernel = 384, 8, 3
    images = side // 8
    products = 2.0 * images * map_side**2 * channels**2 * kernel**2
    for name in workload.precisions(device):
        dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
        a, b, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
        peaks[f"torch.mm, {name}"] = (
            repeated(partial(torch.mm, a, b, out=out), name),
            2.0 * repeats * side**3,
        )
        maps = torch.randn(images, channels, map_side, map_side, device=device).to(dtype)
        weight = torch.randn(channels, channels, kernel, kernel, device=device).to(dtype)
        convolve = partial(F.conv2d, maps, weight, padding=1)
        peaks[f"conv2d, {name}"] = (repeated(convolve, name), repeats * products)
    source = torch.zeros(values, device=device)
    target = torch.empty_like(source)

    copy = repeated(partial(target.copy_, source), "float32")
    peaks["copying"] = (copy, 2.0 * 4 * values * repeats)
    return peaks


def _steps(size: Size, device: torch.device, layers: Layers) -> list[Case]:
    """Return the local steps to judge: the plain loop and every engine, in both precisions."""
    clients, steps = (2, 1) if size is Size.QUICK else (4, 5)
    if size is Size.FULL and device.type == "cuda":
        clients, steps = 100, 20
    plan = workload.paper_plan(local_steps=steps)
    cohort = workload.Cohort.of(plan, clients, device)
    # One after the other: on an accelerator a whole cohort would take the most of the time here.
    few = workload.Cohort.of(plan, 2, device)
    step = layers.local_step(plan)

    def case(what: str, precision: str, call: Callable[[], object], count: int) -> Case:
        total = Counts(count * step.operations, count * step.bytes)
        return Case(f"local step, {what}", precision, call, total, count)

    cases = []
    for precision in workload.precisions(device):
        cases.append(
            case(
                "plain loop",
                precision,
                partial(few.plain_loop, precision),
                few.num_steps,
            )
        )
        engine = workload.default_engine(device, precision)
        train = partial(cohort.train, engine)
        cases.append(case("our engine", precision, train, cohort.num_steps))
    return cases


def _certificates(size: Size, device: torch.device, layers: Layers, model: nn.Module) -> list[Case]:
    draws, batch_size = (200, 100) if size is Size.QUICK else (4_000, 512)
    if size is Size.FULL and device.type == "cuda":
        draws, batch_size = 1_000_000, 10_000
    dataset = workload.random_images(1, "test")
    images, labels = torch.from_numpy(dataset.images), torch.from_numpy(dataset.labels)
    n0 = 100
    cases = []
    for precision in ("float32", "bfloat16"):
        procedure = Procedure(n0=n0, n=draws, precision=precision)

        def certify(procedure: Procedure = procedure) -> None:
            rows = certify_images(
                model,
                images,
                labels,
                [0],
                max_value=dataset.info.max_value,
                procedure=procedure,
                batch_size=batch_size,
                device=device,
            )
            with workload.in_precision(device, procedure.precision):
                list(rows)

        counts = layers.certificate(n0 + draws, batch_size)
        cases.append(Case(f"certificate, n = {draws:,}", precision, certify, counts, 1))
    return cases


def _row(case: Case, timing: Timing, rate: dict[str, float]) -> dict[str, Any]:
    """Judge a case by the floor in its precision."""
    best = min(timing.seconds)
    peak = max(rate[f"torch.mm, {case.precision}"], rate[f"conv2d, {case.precision}"])
    floor = case.counts.floor(peak, rate["copying"])
    return {
        "what": case.what,
        "precision": case.precision,
        "giga_operations": case.counts.operations / case.units / 1e9,
        "megabytes": case.counts.bytes / case.units / 1e6,
        "floor_ms": 1000 * floor / case.units,
        "measured_ms": 1000 * best / case.units,
        "giga_per_second": case.counts.operations / best / 1e9,
        "share": floor / best,
        **timing.record(),
    }


def run(size: Size, device: torch.device) -> Section:
    """Measure the machine, and how near to it training and certification come."""
    rounds = 1 if size is Size.QUICK else 5
    plan = workload.paper_plan()
    dataset = workload.random_images(1)
    model = workload.new_model(workload.model_spec(plan, dataset), dataset.info, device).eval()
    layers = Layers.of(model, torch.zeros(1, *workload.SHAPE, device=device))
    peaks = _peaks(size, device)
    cases = [*_steps(size, device, layers), *_certificates(size, device, layers, model)]
    names = [f"{case.what}, {case.precision}" for case in cases]
    calls = {name: call for name, (call, _) in peaks.items()}
    calls |= {name: case.call for name, case in zip(names, cases, strict=True)}
    clock, unit = fair_clock(device)
    timings = interleaved(calls, rounds, device, clock=clock)
    # Both sides by their best round: what else the machine does is no part of a limit.
    rate = {name: amount / min(timings[name].seconds) for name, (_, amount) in peaks.items()}
    rows: list[dict[str, Any]] = [
        {
            "what": name,
            "giga_per_second": rate[name] / 1e9,
            "measured_ms": 1000 * min(timings[name].seconds),
            **timings[name].record(),
        }
        for name in peaks
    ]
    rows += [_row(case, timings[name], rate) for name, case in zip(names, cases, strict=True)]
    headlines = [
        Headline(f"share of the roofline: {row['what']}, {row['precision']}", f"{row['share']:.0%}")
        for row in itertools.islice(rows, len(peaks), None)
    ]
    return Section(
        title="Roofline: AlexNet, m = 2, T = 2, B = 30",
        columns={
            "what": "What",
            "precision": "Precision",
            "giga_operations": "G operations",
            "megabytes": "MB",
            "floor_ms": "Floor, ms",
            "measured_ms": "Measured, ms",
            "giga_per_second": "G operations (copying: GB) a second",
            "share": "Share of the roofline",
        },
        rows=rows,
        notes=[
            f"Of one local step or one certificate; the best of {rounds} rounds of each; "
            f"{torch.get_num_threads()} CPU threads, {unit}. A multiply-add is two operations. MB: with "
            "every activation in a cache."
        ],
        headlines=headlines,
    )


if __name__ == "__main__":
    main(__doc__ or "", run)
