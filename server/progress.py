"""Progress for people: live bars in a terminal, a line now and then in a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fedsmooth_core import wire
from fedsmooth_core.config import RunConfig
from server.recorder import FederatedAccuracy, RoundRecord, TrainedRound
from server.run_directory import RunDirectory

_LOG_SECONDS = 10.0


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


@contextmanager
def counting(console: Console | None, title: str, total: int) -> Iterator[Callable[..., None]]:
    """Show how many of ``total`` are done; call the function it gives after each.

    It takes a note, and how many more are done (one).
    """
    console = console or Console(stderr=True)
    if console.is_terminal:
        with _bars(console) as progress:
            task = progress.add_task(title, total=total, note="")
            yield lambda note, more=1: progress.update(task, advance=more, note=note)
        return
    done, last = 0, time.monotonic()

    def advance(note: str, more: int = 1) -> None:
        nonlocal done, last
        done += more
        if done == total or time.monotonic() - last > _LOG_SECONDS:
            last = time.monotonic()
            console.print(f"{title}: {done} of {total}, {note}", soft_wrap=True)

    yield advance


class TrainingProgress:
    """An observer that shows rounds, the clients of the current round, and accuracies.

    ``client_done`` is for the grid: it is called after each client's reply.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = _bars(console) if console.is_terminal else None
        self._last = self._on_devices = ""
        self._printed = 0.0

    def run_started(self, config: RunConfig, run: RunDirectory, completed_rounds: int) -> None:
        self._total = config.federation.num_rounds
        self._console.print(f"Run directory: {run.path}", soft_wrap=True, markup=False)
        if completed_rounds:
            self._console.print(f"Resumed after round {completed_rounds} of {self._total}.")
        if self._bars is not None:
            self._bars.start()
            self._rounds = self._bars.add_task(
                "Rounds", total=self._total, completed=completed_rounds, note=""
            )
            self._clients = self._bars.add_task("Clients", total=config.cohort_size, note="")

    def cohort_asked(self, server_round: int, trained: TrainedRound) -> None:
        if self._bars is not None:
            self._bars.reset(self._clients, total=len(trained.cohort))

    def client_done(self) -> None:
        # When all of a cohort have trained, what comes more is certificates of devices.
        if self._bars is not None and self._bars.tasks and not self._bars.tasks[-1].finished:
            self._bars.update(self._clients, advance=1)

    def round_finished(self, record: RoundRecord) -> None:
        for refusal in record.trained.refused:
            self._console.print(
                f"Round {record.server_round}: client {refusal.client} is refused: {refusal.reason}.",
                soft_wrap=True,
                markup=False,  # the reason may hold whatever a client wrote
            )
        for refusal in record.on_devices.refused if record.on_devices else []:
            self._console.print(
                f"Round {record.server_round}: client {refusal.client} certifies nothing: "
                f"{refusal.reason}.",
                soft_wrap=True,
                markup=False,
            )
        if not record.trained.aggregated:
            self._console.print(
                f"Round {record.server_round}: too few good replies, so the model is kept as it was."
            )
        if record.evaluation:
            clean, noisy = (record.evaluation[f"{kind}-accuracy"] for kind in ("clean", "noisy"))
            self._last = f"test accuracy {clean:.1%} clean, {noisy:.1%} noisy"
        if record.on_devices is not None:
            self._on_devices = _on_devices(record.on_devices)
        notes = [note for note in (self._last, self._on_devices) if note]
        if self._bars is not None:
            self._bars.update(self._rounds, advance=1, note=", ".join(notes))
        elif (
            record.evaluation
            or record.on_devices
            or time.monotonic() - self._printed > _LOG_SECONDS
        ):
            self._printed = time.monotonic()
            loss = record.trained.metrics.get(wire.TRAIN_LOSS, float("nan"))
            phases = ("connect", "train", "aggregate", "certify", "evaluate")
            seconds = sum(record.trained.seconds.get(phase, 0.0) for phase in phases)
            parts = [f"train loss {loss:.3f}", *notes, f"{seconds:.1f} s a round"]
            self._console.print(
                f"Round {record.server_round} of {self._total}: {', '.join(parts)}",
                soft_wrap=True,
            )

    def run_finished(self) -> None:
        if self._bars is not None:
            self._bars.remove_task(self._clients)
            self._bars.stop()


def _on_devices(certified: FederatedAccuracy) -> str:
    figure = certified.at_smallest_radius()
    if figure is None:
        return f"on devices nothing certified ({certified.problem})"
    radius, accuracy = figure
    return f"on devices {accuracy:.1%} certified at radius {radius:g}"
