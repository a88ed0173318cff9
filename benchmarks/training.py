"""Local training of a cohort in the paper's setting: the plain loop beside each of our engines.

The plain loop is LocalTrain, client after client, with all of PyTorch's threads. The engines get the
same clients and as many threads. How far their weights end from the plain loop's is part of the table,
as a share of the update's length. Memory is what a call needs at most beyond what was there before.

    python benchmarks/training.py [--quick] [--device cpu] [-o FILE]
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import workload
from harness import Headline, Section, Size, fair_clock, interleaved, main, peak_memory

PLAIN = "plain loop, float32"
OURS = "our engine"
PAPER_STEPS = 100 * 20
"""Local steps of a round of the paper: 100 clients, E = 20."""
_TARGETS = {
    ("cpu", "float32"): ">= 1.3x",
    ("cpu", "bfloat16"): ">= 1.9x at 2 cores",
    ("cuda", "float32"): ">= 30x",
    ("cuda", "tf32"): ">= 30x",
    ("cuda", "bfloat16"): ">= 30x",
}


def difference(replies: workload.Replies, plain: workload.Replies, start: workload.State) -> float:
    """Return the largest ||theta_k - plain theta_k|| / ||plain theta_k - theta|| of a client."""

    def length(one: workload.State, other: workload.State) -> float:
        squares = (
            (one[name].double() - other[name].double()).square().sum().item() for name in start
        )
        return math.sqrt(math.fsum(squares))

    pairs = zip(replies, plain, strict=True)
    return max(length(reply, loop) / length(loop, start) for reply, loop in pairs)


def run(size: Size, device: torch.device) -> Section:
    """Time rounds of local training."""
    clients, steps, rounds = (2, 1, 1) if size is Size.QUICK else (4, 10, 5)
    if size is Size.FULL and device.type == "cuda":
        clients, steps, rounds = 100, 20, 3
    plan = workload.paper_plan(local_steps=steps)
    cohort = workload.Cohort.of(plan, clients, device)
    candidates: dict[str, Callable[[], workload.Replies]] = {}
    of_precision: dict[str, str] = {}
    for precision in workload.precisions(device):
        trainers: dict[str, Callable[[], workload.Replies]] = {}
        if precision != "tf32":  # on an accelerator the host sets the plain loop's pace
            trainers["plain loop"] = partial(cohort.plain_loop, precision)
        engines = workload.other_engines(device, precision)
        engines[OURS] = workload.default_engine(device, precision)
        trainers |= {name: partial(cohort.train, engine) for name, engine in engines.items()}
        for name, train in trainers.items():
            candidates[f"{name}, {precision}"] = train
            of_precision[f"{name}, {precision}"] = precision
    # What PyTorch loads and allocates once a process is nobody's memory.
    workload.Cohort.of(workload.paper_plan(local_steps=1), 1, device).plain_loop()
    # Before the clock starts: a first call plans, captures and allocates.
    memory: dict[str, int | None] = {}
    replies: dict[str, workload.Replies] = {}
    for name, train in candidates.items():

        def first(name: str = name, train: Callable[[], workload.Replies] = train) -> None:
            replies[name] = train()

        memory[name] = peak_memory(first, device)
    away = {name: difference(each, replies[PLAIN], cohort.state) for name, each in replies.items()}
    replies.clear()
    clock, unit = fair_clock(device)
    timings = interleaved(candidates, rounds, device, warm_ups=0, clock=clock)
    rows, headlines = [], []
    for name, timing in timings.items():
        ratio = timing.times_faster_than(timings[PLAIN])
        peak = memory[name]
        rows.append(
            {
                "what": name,
                "local_step_ms": 1000 * timing.median / cohort.num_steps,
                "ratio": str(ratio),
                "round_seconds": timing.median * PAPER_STEPS / cohort.num_steps,
                "difference": None if name == PLAIN else away[name],
                "memory_mb": None if peak is None else peak / 1e6,
                **timing.record(),
            }
        )
        if name.startswith(f"{OURS},"):
            target = _TARGETS[device.type, of_precision[name]]
            headlines.append(
                Headline(f"training, {name}, against the plain loop", str(ratio), target)
            )
    is_whole = cohort.num_steps == PAPER_STEPS
    return Section(
        title="Local training: AlexNet, m = 2, T = 2, B = 30, stochastic",
        columns={
            "what": "What",
            "local_step_ms": "ms a local step",
            "ratio": "Times as fast as the plain loop",
            "round_seconds": "Seconds a round of the paper"
            + ("" if is_whole else ", at this rate"),
            "difference": "Difference from the plain loop",
            "memory_mb": "Memory, MB",
            "runs": "Runs",
        },
        rows=rows,
        notes=[
            f"{clients} clients, E = {steps}; medians, with the least and the largest ratio; "
            f"{torch.get_num_threads()} CPU threads, {unit}. A round of the paper is {PAPER_STEPS} local "
            "steps. Difference: of the weights, as a share of the update's length, the largest of a client."
        ],
        headlines=headlines,
    )


if __name__ == "__main__":
    main(__doc__ or "", run)
