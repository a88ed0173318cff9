"""``fedsmooth reproduce``: do what is left of the plan, then draw its figures and say what holds."""

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedsmooth_core.durable import try_lock
from fedsmooth_core.errors import ConfigError, TrainingError
from server.reproduction.figures import figures_named
from server.reproduction.plan import FigurePlan, make_plan
from server.reproduction.tasks import Task
from server.reproduction.timing import Log, measured_rate, seconds_left


def reproduce(
    words: Sequence[str],
    scale: str,
    num_seeds: int,
    root: Path | None,
    only_plan: bool,
    console: Console,
) -> None:
    """Reproduce figures of the paper; continue what an earlier process did of them.

    Args:
        words: names of figures, and settings as ``key=value``.
        scale: ``paper``, or a file of conf/scale.
        num_seeds: models of each series.
        root: folder of all models, certificates and figures; None is ``runs/reproduce-<scale>``.
        only_plan: show what is left and how long it takes, and do nothing.
        console: for the plan, progress and results.

    Raises:
        FedSmoothError: one sentence about what cannot be done, before anything is.
    """
    names = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
    root = (root or Path("runs", f"reproduce-{scale}")).expanduser().resolve()
    plans = make_plan(figures_named(names), scale, num_seeds, overrides, root)
    root.mkdir(parents=True, exist_ok=True)
    log = Log(root / "tasks.jsonl")
    rates = log.rates() or {"": measured_rate(plans[0].config)}
    _show_plan(plans, rates, console)
    if only_plan:
        return
    with (root / ".lock").open("w") as lock:
        if not try_lock(lock):
            raise ConfigError(
                f"Another process works in {root}: wait until it ends, or name another folder with -o."
            )
        for plan in plans:
            _work(plan, plans, log, rates, console)


def _work(
    plan: FigurePlan,
    plans: Sequence[FigurePlan],
    log: Log,
    rates: dict[str, float],
    console: Console,
) -> None:
    for task in plan.tasks:
        work = task.work_left()
        if not work:
            continue
        left = _tasks_left(plans)
        remaining = _duration(seconds_left(left, log.rates() or rates))
        console.rule(f"{len(left)} tasks left, about {remaining}: {task.title}")
        started = time.perf_counter()
        try:
            task.run(console)
        except TrainingError as error:  # it diverged: the other models may not
            console.print(f"{task.title} failed: {error}", soft_wrap=True, markup=False)
            continue
        log.append(task, work, time.perf_counter() - started)


def _tasks_left(plans: Sequence[FigurePlan]) -> list[Task]:
    """Return what is to be done, each task once, whatever number of figures wants it."""
    tasks = {task.title: task for plan in plans for task in plan.tasks}
    return [task for task in tasks.values() if task.work_left()]


def _show_plan(plans: Sequence[FigurePlan], rates: dict[str, float], console: Console) -> None:
    table = Table("figure", "task", "left", title="What is left", title_justify="left")
    said: set[str] = set()
    for plan in plans:
        for task in plan.tasks:
            if task.title in said or not task.work_left():
                continue
            said.add(task.title)
            table.add_row(plan.figure.name, task.title, _duration(seconds_left([task], rates)))
    left = _tasks_left(plans)
    if left:
        console.print(table)
        console.print(f"{len(left)} tasks, about {_duration(seconds_left(left, rates))}.")
    else:
        console.print("Nothing is left to train or certify.")


def _duration(seconds: float) -> str:
    """Say a duration for people, to the minute or, below two of them, to the second."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
