"""Carries a run's models to its certification service, and the certificates back into its directory.

Nobody keeps a list of what was sent: what is owed follows from the directory (:mod:`server.owed`), and the
same model on the same terms is the same job at the service. So whatever is killed at whatever moment, who
comes next goes on.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Collection, Iterator
from types import TracebackType
from typing import IO, Any, Self

from fedsmooth_core.certification.analysis import summary
from fedsmooth_core.checkpoint import load_checkpoint
from fedsmooth_core.config import RunConfig
from fedsmooth_core.durable import try_lock, write_atomically
from fedsmooth_core.errors import (
    CertificationError,
    CheckpointError,
    RowsInUseError,
    ServiceError,
    ServiceUnreachableError,
)
from server.certification.client import CertificationClient, Connection, Progress
from server.certification.jobs import Job, JobState, Submission
from server.certify import write_summary
from server.owed import (
    COURIER_LOCK,
    CURVE,
    ROWS,
    SUMMARY,
    Delivery,
    failure_path,
    filed,
    is_certified,
    last_filed,
    owed,
)
from server.report import load_curve, plot_curves, table_radii
from server.run_directory import CERTIFICATION, RunDirectory
from server.service_jobs import connection_of, submit_checkpoint, write_rows
from server.tracking import write_certified

POLL_SECONDS = 2.0
"""Between two questions to a service that is at work."""

_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 30.0

# Asking again would bring the same answer: the model is given up, with the service's sentence.
_FINAL = ("INVALID_ARGUMENT", "FAILED_PRECONDITION", "NOT_FOUND", "RESOURCE_EXHAUSTED")


class Courier:
    """Takes what is owed to the service and brings what is done; a context manager.

    One courier of a run works at a time, in whatever process: the others wait for their turn.

    Args:
        config: the run's settings, with a service.
        run: its directory.
        also: rounds that are wanted although they are not due.
        connect: makes the client.
    """

    def __init__(
        self,
        config: RunConfig,
        run: RunDirectory,
        also: Collection[int] = (),
        connect: Callable[[Connection], CertificationClient] = CertificationClient,
    ) -> None:
        self._config, self._run, self._also = config, run, also
        self._connect = connect
        self._client: CertificationClient | None = None
        self._lock: IO[str] | None = None
        self._keys: dict[int, str] = {}
        self._delivery = Delivery()
        self._noted = 0.0
        self._pause = _FIRST_PAUSE
        self._stopped = threading.Event()

    def owed(self) -> list[int]:
        """Return the rounds whose certificates are still to come, newest first."""
        return owed(self._run, self._config, self._also)

    def deliver(self) -> bool:
        """Submit what is owed, newest first, and file what is done; False while another courier works.

        Raises:
            RowsInUseError: when another process writes the rows of a model; the others are filed by then.
            FedSmoothError: when the service does not answer, or lets nobody in. What concerns one model
                alone is recorded as the reason why that one is given up.
            OSError: when the directory cannot be written.
        """
        if not self._has_lock():
            return False
        in_use: RowsInUseError | None = None
        for server_round in self.owed():
            if self._stopped.is_set():
                return True
            try:
                self._advance(server_round)
            except RowsInUseError as error:
                in_use = error
        self._redraw()
        if in_use is not None:
            raise in_use
        self._note(None)
        self._pause = _FIRST_PAUSE
        return True

    def follow(self, server_round: int) -> Iterator[Progress]:
        """Follow the job of a round until it has ended; nothing comes if there is none under way.

        Raises:
            ServiceError: as any call of the client.
        """
        if (key := self._keys.get(server_round)) is None:
            return
        for progress in self._service().watch(key):
            self._note_progress(server_round, progress.job)
            yield progress

    def trouble(self, problem: Exception) -> float:
        """Record why nothing comes; return after how many seconds to try again."""
        # A new connection, for gRPC waits longer and longer between its own attempts.
        self._hang_up()
        with contextlib.suppress(OSError):
            self._note(str(problem))
        pause, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
        return pause

    def stop(self) -> None:
        """Let :meth:`deliver` end at once, from another thread: a call that is under way is broken off."""
        self._stopped.set()
        self._hang_up()

    @property
    def is_stopped(self) -> bool:
        """Whether it was told to stop."""
        return self._stopped.is_set()

    def close(self) -> None:
        """Let other couriers work."""
        self._hang_up()
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _has_lock(self) -> bool:
        if self._lock is None:
            folder = self._run.path / CERTIFICATION
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / COURIER_LOCK).open("w")
            if not try_lock(lock):
                lock.close()
                return False
            self._lock = lock
        return True

    def _service(self) -> CertificationClient:
        client = self._client
        if client is None:
            client = self._client = self._connect(connection_of(self._config))
            # Either stop() saw this client, or this sees that it was called.
            if self._stopped.is_set():
                client.close()
        return client

    def _hang_up(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _advance(self, server_round: int) -> None:
        """Take one round a step further."""
        client = self._service()
        try:
            if (key := self._keys.get(server_round)) is not None:
                job = client.get(key)
            else:
                submission = Submission(self._run.path.name, server_round)
                path = self._run.checkpoint(server_round)
                job = submit_checkpoint(client, path, self._config, submission)
                self._keys[server_round] = job.key
            self._note_progress(server_round, job)
            if job.state is JobState.DONE:
                self._file(client, server_round, job)
            elif job.state.has_ended:
                self._give_up(server_round, _why_not(job))
        except ServiceError as error:
            if error.status == "NOT_FOUND" and self._keys.pop(server_round, None) is not None:
                return  # a service that lost its directory: it is submitted again
            if isinstance(error, ServiceUnreachableError) or error.status not in _FINAL:
                raise
            self._give_up(server_round, str(error))
        except RowsInUseError:
            raise
        except (CheckpointError, CertificationError) as error:
            self._give_up(server_round, str(error))

    def _file(self, client: CertificationClient, server_round: int, job: Job) -> None:
        """Put the rows of a job that is done into the run's directory, as local certification would."""
        rows, job = client.fetch(job.key)
        if self._stopped.is_set():
            return
        if len(rows) != job.num_images:
            raise ServiceError(
                f"the certification service sent {len(rows)} of {job.num_images} rows: ask again.",
                "DATA_LOSS",
            )
        folder = self._run.certification(server_round)
        parameters = write_rows(rows, job, folder)
        metadata = load_checkpoint(self._run.checkpoint(server_round)).metadata
        curve = load_curve(folder / ROWS)
        radius_step = self._config.certification.radius_step
        # Events before the summary: a crash between the two repeats them, and loses none.
        figures = summary(curve.rows, table_radii([curve], radius_step))
        write_certified(self._run, self._figures() | {server_round: figures})
        write_summary(folder, parameters, metadata["dataset"].get("num_test_images"), radius_step)
        failure_path(self._run, server_round).unlink(missing_ok=True)
        self._forget(server_round)

    def _figures(self) -> dict[int, dict[str, Any]]:
        """Return, by round, the figures of all models whose certificates are complete."""
        figures = {}
        for server_round in filed(self._run):
            with contextlib.suppress(ValueError):  # damaged: it is missing in TensorBoard
                content = (self._run.certification(server_round) / SUMMARY).read_bytes()
                figures[server_round] = json.loads(content)
        return figures

    def _redraw(self) -> None:
        """Draw the curve of the last round that is certified, unless it is drawn already."""
        last = last_filed(self._run)
        if last is not None and not is_certified(self._run, last):
            plot_curves([load_curve(self._run.path)], self._run.path / CURVE)

    def _give_up(self, server_round: int, sentence: str) -> None:
        failure = failure_path(self._run, server_round)
        failure.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(failure, f"{sentence}\n".encode())
        self._forget(server_round)

    def _forget(self, server_round: int) -> None:
        self._keys.pop(server_round, None)
        self._delivery.under_way.pop(str(server_round), None)
        self._delivery.write(self._run)

    def _note_progress(self, server_round: int, job: Job) -> None:
        under_way, now = self._delivery.under_way, [job.images_done, job.num_images]
        is_new = str(server_round) not in under_way
        if is_new or (
            under_way[str(server_round)] != now and self._noted + POLL_SECONDS < time.time()
        ):
            under_way[str(server_round)] = now
            self._delivery.write(self._run)
            self._noted = time.time()

    def _note(self, problem: str | None) -> None:
        if (problem is None) != (self._delivery.since is None):
            self._delivery.since = None if problem is None else time.time()
        if problem != self._delivery.problem:
            self._delivery.problem = problem
            self._delivery.write(self._run)


def _why_not(job: Job) -> str:
    match job.state:
        case JobState.CANCELLED:
            return "The job was cancelled at the certification service."
        case JobState.SUPERSEDED:
            return "The certification service dropped it for a newer model of the run."
    return job.problem or "The certification service says that it failed, and not why."
