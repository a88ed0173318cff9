"""``fedsmooth reproduce``: do what is left of the plan, then draw its figures and say what holds."""

import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedsmooth_core.durable import try_lock, write_atomically
from fedsmooth_core.errors import (
    CertificationError,
    ConfigError,
    DataError,
    FedSmoothError,
    TrainingError,
)
from server.reproduction.checks import checks_in
from server.reproduction.drawing import draw
from server.reproduction.figures import figures_named
from server.reproduction.page import page_of, print_figure
from server.reproduction.plan import FigurePlan, make_plan, refuse_differences, results_folder
from server.reproduction.results import (
    FigureResult,
    gather,
    refuse_other_data,
    shared_settings,
)
from server.reproduction.tasks import Task
from server.reproduction.timing import Log, measured_rate, seconds_left


def reproduce(
    words: Sequence[str],
    scale: str,
    num_seeds: int,
    root: Path | None,
    data: str | None,
    only_plan: bool,
    console: Console,
) -> None:
    """Reproduce figures of the paper; continue what an earlier process did of them.

    Args:
        words: names of figures, and settings as ``key=value``.
        scale: ``paper``, or a file of conf/scale.
        num_seeds: models of each series.
        root: folder of all models, certificates and figures; None is ``runs/reproduce-<scale>``.
        data: what to call the data set in the results; None keeps the name that a figure's results have,
            or else takes the one in the settings.
        only_plan: show what is left and how long it takes, and do nothing.
        console: for the plan, progress and results.

    Raises:
        FedSmoothError: one sentence about what cannot be done, before anything is.
    """
    names = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
    root = (root or Path("runs", f"reproduce-{scale}")).expanduser().resolve()
    plans = make_plan(figures_named(names), scale, num_seeds, overrides, root)
    for plan in plans:
        _refuse_to_lose_results(plan, results_folder(root, scale))
    log = Log(root / "tasks.jsonl")
    rates = log.rates()
    if _tasks_left(plans):
        try:
            refuse_other_data(plans)
            rates = rates or {"": measured_rate(plans[0].config)}
        except DataError:
            if not only_plan:
                raise
    _show_plan(plans, rates, console)
    if only_plan:
        return
    folder = results_folder(root, scale)
    folder.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as lock:
        if not try_lock(lock):
            raise ConfigError(
                f"Another process works in {root}: wait until it ends, or name another folder with -o."
            )
        reproduction = _Reproduction(scale, data, overrides, folder, log, console)
        for plan in plans:
            reproduction.work(plan, plans, rates)
        # Statements across figures know all of them only now.
        for plan in plans:
            reproduction.report(plan)
        page = root / "results.md"
        write_atomically(page, page_of(root / "results").encode())
        console.print(f"Written: {page}", soft_wrap=True, markup=False, highlight=False)
    if reproduction.failed:
        raise TrainingError(f"Failed, as said above: {', '.join(reproduction.failed)}.")


def _refuse_to_lose_results(plan: FigurePlan, folder: Path) -> None:
    """Refuse to overwrite what was measured with other settings, or of models that are gone."""
    path = folder / f"{plan.figure.name}.json"
    there = _recorded(path)
    if there is None:
        return
    # The step of the table's radii is no setting of what was measured.
    mine, theirs = (
        {key: value for key, value in settings.items() if key != "radius_step"}
        for settings in (shared_settings(plan.config), there.settings)
    )
    keeping = "move that file away (models and certificates stay), "
    refuse_differences(mine, theirs, f"{path} was measured", keeping)
    certified = {
        (label, member.seed)
        for label, members in plan.members.items()
        for member in members
        if not member.certifying.work_left()
    }
    for one in there.series:
        for model in one.models:
            if (one.label, model.seed) not in certified:
                raise ConfigError(
                    f"{path} shows a model that would be lost ({one.label}, seed {model.seed}), for its "
                    "certificates are not there or not of the seeds asked for: put them back, give --seeds "
                    f"{model.seed + 1} or more, or move that file away."
                )


def _recorded(path: Path) -> FigureResult | None:
    """Return the results in a file; None if there are none, or nothing that could be lost."""
    try:
        return FigureResult.load(path)
    except (OSError, CertificationError):
        return None


@dataclass(frozen=True)
class _Reproduction:
    scale: str
    data: str | None
    """What to call the data set; None leaves a name that was given before."""
    overrides: Sequence[str]
    folder: Path
    log: Log
    console: Console
    failed: list[str] = field(default_factory=list)
    """Titles of tasks that failed in this process."""

    def work(self, plan: FigurePlan, plans: Sequence[FigurePlan], rates: dict[str, float]) -> None:
        """Do what is left of a figure; its picture and numbers are kept up to date as models finish.

        What needs a task that failed is not begun; everything else goes on.
        """
        for chain in plan.chains:
            for task in chain:
                work = task.work_left()
                if not work:
                    continue
                if task.title in self.failed:  # for another figure
                    break
                left = _tasks_left(plans)
                remaining = _duration(seconds_left(left, self.log.rates() or rates))
                self.console.rule(f"{_tasks(len(left))} left, about {remaining}")
                self.console.print(task.title, soft_wrap=True, markup=False, highlight=False)
                started = time.perf_counter()
                try:
                    task.run(self.console)
                # Such as training that diverged, or a full GPU: the others may not.
                except Exception as error:
                    what = str(error)
                    if not isinstance(error, FedSmoothError):
                        what = repr(error)
                        self.console.print_exception()
                    self.console.print(
                        f"Failed: {task.title}: {what}", soft_wrap=True, markup=False
                    )
                    self.failed.append(task.title)
                    break
                self.log.append(task, work, time.perf_counter() - started)
                self._keep(plan)

    def report(self, plan: FigurePlan) -> None:
        """Print a figure's table and checks, and say where its picture and numbers are."""
        result = self._keep(plan)
        if result is None:
            self.console.print(f"{plan.figure.name}: none of its models is certified yet.")
            return
        self.console.rule()
        print_figure(result, checks_in(self.folder, result), self.console)
        for ending in ("png", "json"):
            path = self.folder / f"{result.figure}.{ending}"
            self.console.print(f"Written: {path}", soft_wrap=True, markup=False, highlight=False)

    def _keep(self, plan: FigurePlan) -> FigureResult | None:
        """Write what is known of a figure so far; None if no model is certified yet."""
        path = self.folder / f"{plan.figure.name}.json"
        there = _recorded(path)
        data = self.data or (there.data if there else plan.config.dataset.name)
        result = gather(plan, self.scale, data, self._command(plan, data), self.log)
        if not any(one.models for one in result.series):
            return None
        result.save(path)
        draw(result, self.folder / result.figure)
        return result

    def _command(self, plan: FigurePlan, data: str) -> str:
        """Return what makes this figure from nothing, whatever number of commands made it."""
        words = ["reproduce", plan.figure.name, "--scale", self.scale]
        words += ["--seeds", str(plan.num_seeds)]
        if data != plan.config.dataset.name:
            words += ["--data", data]
        return f"fedsmooth {shlex.join([*words, *self.overrides])}"


def _tasks_left(plans: Sequence[FigurePlan]) -> list[Task]:
    """Return what is to be done, each task once, whatever number of figures wants it."""
    tasks = {task.title: task for plan in plans for task in plan.tasks}
    return [task for task in tasks.values() if task.work_left()]


def _show_plan(plans: Sequence[FigurePlan], rates: dict[str, float], console: Console) -> None:
    """Show what each figure still needs; what an earlier line of the table names is not said again."""
    columns = ("figure", "seeds", "series", "left to do", "takes about")
    table = Table(*columns, title_justify="left", box=None)
    said: set[str] = set()
    for plan in plans:
        name, seeds = plan.figure.name, str(plan.num_seeds)
        for label, members in plan.members.items():
            tasks = [task for member in members for task in member.tasks]
            left = [task for task in tasks if task.work_left() and task.title not in said]
            said |= {task.title for task in left}
            text = f"{len(left)} of {len(tasks)} tasks" if left else "nothing"
            duration = _duration(seconds_left(left, rates)) if left else ""
            table.add_row(name, seeds, label, text, duration)
            name = seeds = ""
        if plan.speed and plan.speed.work_left() and plan.speed.title not in said:
            said.add(plan.speed.title)
            table.add_row(
                "", "", plan.speed.title, "1 task", _duration(seconds_left([plan.speed], rates))
            )
    console.print(table)
    left = _tasks_left(plans)
    if left:
        console.print(f"{_tasks(len(left))} left, about {_duration(seconds_left(left, rates))}.")
    else:
        console.print("Nothing is left to train or certify.")


def _tasks(count: int) -> str:
    return "1 task" if count == 1 else f"{count} tasks"


def _duration(seconds: float) -> str:
    """Say a duration for people, to the minute or, below two of them, to the second."""
    if math.isnan(seconds):
        return "an unknown time"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
