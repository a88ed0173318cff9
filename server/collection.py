"""When a run's courier goes: in the background while the run trains, and to its end once it has trained."""

import itertools
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

from rich.console import Console

from fedsmooth_core.checkpoint import load_checkpoint
from fedsmooth_core.config import RunConfig
from fedsmooth_core.errors import (
    CertificationError,
    CheckpointError,
    FedSmoothError,
    RowsInUseError,
    ServiceError,
)
from server.certify import find_checkpoint
from server.courier import POLL_SECONDS, Courier
from server.owed import (
    CURVE,
    ROWS,
    Delivery,
    due,
    failure_path,
    failures,
    is_certified,
    last_filed,
    owed,
    rounds_text,
)
from server.progress import counting
from server.recorder import RoundRecord, TrainedRound
from server.report import report
from server.run_directory import RunDirectory
from server.service_jobs import progress_note
from server.terms import refuse_other_terms, terms_at_service

_FILING_SECONDS = 30.0
"""At most so long does the courier in the background file what has come, once it is told to stop."""

# Nothing comes before somebody mends it, but then all that is owed does.
_TO_BE_MENDED = ("UNAUTHENTICATED", "PERMISSION_DENIED", "UNIMPLEMENTED")


class BackgroundCourier:
    """An observer that has models certified while training goes on; it neither delays nor fails a round.

    Args:
        say: prints a line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._courier: Courier | None = None
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()

    def run_started(self, config: RunConfig, run: RunDirectory, completed_rounds: int) -> None:
        # With the final model alone to certify there is nothing to do before the end.
        if config.service.address is not None and config.certification.every:
            self._courier = Courier(config, run)
            # A daemon: what it leaves undone when the process ends is done by the next one.
            self._thread = threading.Thread(target=self._work, args=(self._courier,), daemon=True)
            self._thread.start()

    def cohort_asked(self, server_round: int, trained: TrainedRound) -> None:
        """There is no new model yet."""

    def round_finished(self, record: RoundRecord) -> None:
        self._wake.set()

    def run_finished(self) -> None:
        if self._courier is not None and self._thread is not None:
            self._courier.stop()
            self._wake.set()
            # Whoever collects at the run's end finds its place free.
            self._thread.join(_FILING_SECONDS)

    def _work(self, courier: Courier) -> None:
        told = False
        with courier:
            while True:
                self._wake.clear()
                if courier.is_stopped:
                    return
                try:
                    courier.deliver()
                    pause: float | None = POLL_SECONDS if courier.owed() else None
                    if told:
                        self._say("The certification service is back.")
                    told = False
                # Whatever it is, training goes on, and the next attempt may fare better.
                except Exception as error:
                    if courier.is_stopped:  # which breaks calls off
                        return
                    pause = courier.trouble(error)
                    if not told:
                        self._say(f"Certification in the background waits: {error}")
                    told = True
                self._wake.wait(pause)


def collect(
    config: RunConfig,
    run: RunDirectory,
    console: Console,
    *,
    patience: float | None = None,
    also: Collection[int] = (),
) -> None:
    """Wait for all certificates that a run's service owes it, and report on them.

    Args:
        config: the run's settings, with a service.
        run: its directory.
        console: shows progress, table, and what is still owed.
        patience: seconds of nothing but trouble after which what is owed is left for later; None waits
            for a service that does not answer, and raises what somebody has to mend.
        also: rounds that are wanted although they are not due.

    Raises:
        CertificationError: when the service refused the newest of the models, or failed at it.
        FedSmoothError: without patience, what somebody has to mend.
    """

    told = ""
    known: list[int] = []
    under_way: dict[str, list[int]] = {}
    since: float | None = None  # when the trouble began
    with Courier(config, run, also) as courier:
        while rounds := courier.owed():
            if rounds != known:  # something has come
                known, since = rounds, None
            try:
                if courier.deliver():
                    told, since = "", None
                    for newest in courier.owed()[:1]:
                        _show_job(courier, newest, console)
                    continue
                problem = "another process collects the certificates of this run"
                pause, is_final = POLL_SECONDS, False
                if (found := Delivery.read(run)).problem is not None:
                    problem += f", and waits: {found.problem}"
                elif found.under_way != under_way:  # it gets on
                    since, under_way = None, found.under_way
            except (FedSmoothError, OSError) as error:
                problem, pause = str(error), courier.trouble(error)
                is_final = _is_final(error)
                if is_final and patience is None:
                    raise
            if problem != told:
                _say(console, f"Waiting for certificates: {problem}")
                told = problem
            since = since or time.monotonic()
            if is_final or (patience is not None and time.monotonic() - since >= patience):
                break
            time.sleep(pause)
    _report(config, run, also, console, told)


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def _is_final(error: Exception) -> bool:
    """Tell whether waiting is in vain until somebody mends it."""
    if isinstance(error, ServiceError):
        return error.status in _TO_BE_MENDED
    return not isinstance(error, RowsInUseError)


def _show_job(courier: Courier, server_round: int, console: Console) -> None:
    """Show the progress of a round's job until it has ended."""
    jobs = courier.follow(server_round)
    if (first := next(jobs, None)) is None:
        return
    title = f"Certifying the model of round {server_round}"
    with counting(console, title, first.job.num_images) as advance:
        done = 0
        for progress in itertools.chain([first], jobs):
            if progress.job.images_done > done:
                note = progress_note(progress.summary, progress.seconds_left)
                advance(note, progress.job.images_done - done)
                done = progress.job.images_done


def _report(
    config: RunConfig, run: RunDirectory, also: Collection[int], console: Console, reason: str
) -> None:
    if (last := last_filed(run)) is not None:
        # Drawn already, unless a courier was killed over it.
        picture = None if is_certified(run, last) else run.path / CURVE
        report([run.path], picture, config.certification.radius_step, as_json=False)
        _say(console, f"Picture: {run.path / CURVE}.png")
    newest = max({*due(run, config), *also}, default=None)
    given_up = failures(run)
    for server_round, why in given_up.items():
        if server_round != newest:
            _say(console, f"The model of round {server_round} is not certified: {why}")
    if left := owed(run, config, also):
        _say(
            console,
            f"The certification service still owes the certificates of {rounds_text(left)}: {reason}",
        )
        _say(console, f"Collect them later: fedsmooth certify {run.path}")
    if newest in given_up:
        raise CertificationError(
            f"The model of round {newest} is not certified: {given_up[newest]}"
        )


def collect_run(path: Path, config: RunConfig, console: Console) -> None:
    """Collect what a run is owed, the certificates of its last checkpoint in any case.

    Models that were given up get another chance.

    Args:
        path: the run's directory.
        config: its settings, with a service.
        console: as for :func:`collect`.

    Raises:
        FedSmoothError: as :func:`collect`, and when certificates on other terms are there already.
    """
    run = RunDirectory(path.expanduser().resolve())
    latest = find_checkpoint(path)
    also = [int(latest.stem.rpartition("-")[2])]
    try:
        metadata = load_checkpoint(latest).metadata
    except CheckpointError:  # the courier gives it up, and takes the others
        metadata = {}
    terms = terms_at_service(config, metadata)
    for server_round in {*due(run, config), *also}:
        refuse_other_terms(run.certification(server_round) / ROWS, terms)
    forget_failures(config, run, also)
    collect(config, run, console, also=also)


def forget_failures(config: RunConfig, run: RunDirectory, also: Collection[int] = ()) -> None:
    """Let models that were given up be owed again."""
    for server_round in {*due(run, config), *also}:
        failure_path(run, server_round).unlink(missing_ok=True)
