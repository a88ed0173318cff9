"""What the templates show, worked out beforehand: lines of tables and figures."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedsmooth_core.certification.analysis import Rows, summary
from server.certification.jobs import Job, JobState, Submission
from server.certification.page.figures import (
    Figure,
    Series,
    certified_curve,
    radius_figure,
    rounds_figure,
)
from server.certification.page.templates import percent, whole
from server.certification.queries import grid

UNFINISHED = "unfinished"
"""The jobs that are queued or running, as one choice."""

# More lines over rounds than these make a thicket.
_RADII_OVER_ROUNDS = 5
_RADII_IN_LIST = 3
_GROUPS_OF_A_RUN = 8

Figures = Mapping[str, Any]
"""What :func:`fedsmooth_core.certification.analysis.summary` returns."""


@dataclass(frozen=True)
class JobLine:
    """A job with its figures, as one run's if ``run`` is given."""

    job: Job
    figures: Figures
    run: str

    @property
    def submission(self) -> Submission:
        """The latest one, of this run if there is one."""
        of_run = [one for one in self.job.submissions if one.run == self.run or not self.run]
        return of_run[-1] if of_run else Submission()

    @property
    def name(self) -> str:
        """What to call the model in a line of text."""
        run, number = self.submission.run, self.submission.round
        return f"{run}, round {number}" if run else f"model {self.job.weights[:12]}"

    @property
    def images(self) -> str:
        """Which images, in words."""
        return f"{whole(self.job.num_images)} images of {self.job.terms.dataset}"

    @property
    def seconds_left(self) -> float | None:
        """Time on the device that the rest takes at the pace so far; None if that is unknown."""
        job = self.job
        if job.state.has_ended or not job.images_done:
            return None
        return job.seconds / job.images_done * (job.num_images - job.images_done)

    @property
    def accuracies(self) -> Sequence[Mapping[str, Any]]:
        """Certified accuracy on the grid, up to the first radius at which none is left."""
        on_grid: Sequence[Mapping[str, Any]] = self.figures["certified_accuracy"]
        return on_grid[: _num_shown([self.figures])]

    @property
    def first_accuracies(self) -> Sequence[Mapping[str, Any]]:
        """The same at the first radii, for a list; empty as long as there are no rows."""
        if not self.figures["num_images"]:
            return ()
        return self.accuracies[:_RADII_IN_LIST]


@dataclass(frozen=True)
class RunSeries:
    """The models of a run that were certified on the same images in the same way."""

    lines: Sequence[JobLine]
    """Newest round first."""
    radii: Sequence[float]
    over_rounds: Figure | None
    last_curve: Figure | None


@dataclass(frozen=True)
class Comparison:
    """The last certified model of several runs."""

    figure: Figure
    radii: Sequence[float]
    lines: Sequence[JobLine]
    """Their figures are at ``radii``."""
    same_images: bool
    same_procedure: bool


def state_counts(counts: Mapping[JobState, int]) -> list[tuple[str, str, int]]:
    """Return the choices of a list of jobs: value, text and how many jobs."""
    unfinished = counts[JobState.QUEUED] + counts[JobState.RUNNING]
    return [
        ("", "all", sum(counts.values())),
        (UNFINISHED, UNFINISHED, unfinished),
        *(
            (state.value, state.value, count)
            for state, count in counts.items()
            if state.has_ended and count
        ),
    ]


def job_figure(job: Job, rows: Rows) -> Figure:
    """Draw the curve of one job."""
    line = JobLine(job, summary(rows, [0.0]), "")
    so_far = "" if len(rows) == job.num_images else f", after {len(rows)} of them"
    return radius_figure(
        "curve",
        "Certified accuracy against l2 radius",
        f"{line.name}: {line.images}{so_far}. {_at_zero(line)}",
        [certified_curve(line.name, rows)],
    )


def series_of_run(lines: Sequence[JobLine], rows: Callable[[str], Rows]) -> list[RunSeries]:
    """Group the models of a run by what they were certified with, and draw each group.

    Args:
        lines: jobs, the latest submission first.
        rows: gets a job's rows by its key.

    Returns:
        The group with the latest submission first, at most eight. Figures show finished jobs only:
        the images that a job has done are no fair sample of all of them.
    """
    groups: dict[tuple[object, ...], dict[int, JobLine]] = {}
    for line in lines:
        of_group = groups.setdefault((line.job.terms, line.job.fingerprint, line.job.device), {})
        # A round that was submitted again with other weights: the latest model is the round's.
        of_group.setdefault(line.submission.round, line)
    return [
        _run_series(sorted(group.values(), key=lambda line: -line.submission.round), number, rows)
        for number, group in enumerate(list(groups.values())[:_GROUPS_OF_A_RUN])
    ]


def _run_series(lines: Sequence[JobLine], number: int, rows: Callable[[str], Rows]) -> RunSeries:
    done = [line for line in reversed(lines) if line.job.state is JobState.DONE]
    radii = [one["radius"] for one in lines[0].figures["certified_accuracy"]]
    if not done:
        return RunSeries(lines, radii[:_RADII_IN_LIST], None, None)
    figures = [line.figures for line in done]
    num_lines = max(_num_left(figures), 1)
    stride = math.ceil(num_lines / _RADII_OVER_ROUNDS)
    over_rounds = [_over_rounds(done, at) for at in range(0, num_lines, stride)]
    last = done[-1]
    return RunSeries(
        lines,
        radii[: _num_shown(figures)],
        rounds_figure(
            f"rounds-{number}",
            "Certified accuracy over the rounds",
            f"Rounds {done[0].submission.round} to {last.submission.round}, {last.images}.",
            over_rounds,
        ),
        radius_figure(
            f"last-{number}",
            "Certified accuracy of the last certified model",
            f"{last.name}. {_at_zero(last)}",
            [certified_curve(f"round {last.submission.round}", rows(last.job.key))],
        ),
    )


def _over_rounds(done: Sequence[JobLine], at: int) -> Series:
    figures = [line.figures["certified_accuracy"][at] for line in done]
    return Series(
        f"radius {figures[0]['radius']:g}",
        [line.submission.round for line in done],
        [one["accuracy"] for one in figures],
        [one["confidence_interval_95"][0] for one in figures],
        [one["confidence_interval_95"][1] for one in figures],
    )


def comparison(lines: Sequence[JobLine], rows: Callable[[str], Rows]) -> Comparison:
    """Put the finished jobs of several runs side by side.

    Args:
        lines: one for each run, at least one.
        rows: gets a job's rows by its key.
    """
    of_line = [rows(line.job.key) for line in lines]
    widest = max((grid(line.job.terms.procedure) for line in lines), key=max)
    figures = [summary(one, widest) for one in of_line]
    num_shown = _num_shown(figures)
    procedures = [line.job.terms.procedure for line in lines]
    images = [(line.job.terms.dataset, line.job.fingerprint, line.job.num_images) for line in lines]
    figure = radius_figure(
        "compared",
        "Certified accuracy of each run's last certified model",
        " ".join(f"{line.name}: {_at_zero(line)}" for line in lines),
        [certified_curve(line.name, one) for line, one in zip(lines, of_line, strict=True)],
    )
    return Comparison(
        figure,
        widest[:num_shown],
        [JobLine(line.job, one, line.run) for line, one in zip(lines, figures, strict=True)],
        same_images=len(set(images)) == 1,
        same_procedure=len(set(procedures)) == 1,
    )


def _num_left(many: Sequence[Figures]) -> int:
    """Return at how many radii of the common grid any model has images left."""
    return max(
        sum(bool(one["accuracy"]) for one in figures["certified_accuracy"]) for figures in many
    )


def _num_shown(many: Sequence[Figures]) -> int:
    """Return how many radii to show: to the first where nothing is left."""
    return min(_num_left(many) + 1, len(many[0]["certified_accuracy"]))


def _at_zero(line: JobLine) -> str:
    one = line.figures["certified_accuracy"][0]
    return f"{percent(one['accuracy'])} of the images are classified correctly with a certificate."
