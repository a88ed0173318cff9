"""The one-point estimator (eq. 4) against the stochastic one (eq. 3): seconds of a whole local step.

The stochastic one is back-propagated to the images alone, without the gradients of the weights: a
baseline that wastes those would make one-point look faster than it is. Accuracy is another question.

    python benchmarks/one_point.py [--quick] [--device cpu] [-o FILE]
"""

from collections.abc import Callable
from functools import partial

import torch
import workload
from harness import Headline, Section, Size, fair_clock, interleaved, main

ATTACK_STEPS = (2, 4, 10)


def run(size: Size, device: torch.device) -> Section:
    """Time a cohort's local training with either estimator, for several T."""
    clients, steps, rounds = (2, 1, 1) if size is Size.QUICK else (2, 4, 5)
    if size is Size.FULL and device.type == "cuda":
        clients, steps, rounds = 100, 20, 5
    cohort = workload.Cohort.of(workload.paper_plan(local_steps=steps), clients, device)
    few = workload.Cohort.of(cohort.plan, min(clients, 2), device)
    candidates: dict[tuple[str, int, str], Callable[[], object]] = {}
    num_steps = {}
    for attack_steps in ATTACK_STEPS:
        for estimator in ("stochastic", "one_point"):
            plan = workload.paper_plan(attack_steps, estimator, steps)
            candidates["plain loop", attack_steps, estimator] = few.with_plan(plan).plain_loop
            num_steps["plain loop"] = few.num_steps
            engine = workload.default_engine(device)
            train = partial(cohort.with_plan(plan).train, engine)
            candidates["our engine", attack_steps, estimator] = train
            num_steps["our engine"] = cohort.num_steps
    named = {" ".join(map(str, key)): call for key, call in candidates.items()}
    clock, unit = fair_clock(device)
    results = interleaved(named, rounds, device, clock=clock)
    timings = dict(zip(candidates, results.values(), strict=True))
    rows, headlines = [], []
    for (name, attack_steps, estimator), timing in timings.items():
        if estimator == "one_point":
            continue
        one_point = timings[name, attack_steps, "one_point"]
        ratio = str(one_point.times_faster_than(timing))
        rows.append(
            {
                "what": name,
                "attack_steps": attack_steps,
                "stochastic_ms": 1000 * timing.median / num_steps[name],
                "one_point_ms": 1000 * one_point.median / num_steps[name],
                "ratio": ratio,
                "stochastic": timing.record(),
                "one_point": one_point.record(),
            }
        )
        headlines.append(
            Headline(f"one-point against stochastic, T = {attack_steps}, {name}", ratio)
        )
    rows.sort(key=lambda row: (row["what"], row["attack_steps"]))
    return Section(
        title="One-point against stochastic: a whole local step",
        columns={
            "what": "What",
            "attack_steps": "T",
            "stochastic_ms": "Stochastic, ms",
            "one_point_ms": "One-point, ms",
            "ratio": "One-point is faster by",
        },
        rows=rows,
        notes=[
            f"AlexNet, m = 2, B = 30, float32; {rounds} rounds, medians, "
            f"{torch.get_num_threads()} CPU threads, {unit}."
        ],
        headlines=headlines,
    )


if __name__ == "__main__":
    main(__doc__ or "", run)
