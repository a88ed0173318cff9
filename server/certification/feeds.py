"""How jobs get on, told to everybody who watches them: each job is read once for all."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedsmooth_core.certification.analysis import Rows, summary
from fedsmooth_core.certification.row_format import CertifiedRow
from fedsmooth_core.errors import ServiceError
from server.certification import certification_pb2 as pb
from server.certification.jobs import Job
from server.certification.messages import job_message, row_messages, summary_message
from server.certification.store import JobStore

_SECONDS = 1.0
"""Between two messages about one job, at least."""

_ROWS_A_MESSAGE = 5000

MAX_RADII = 1000
"""As many radii as a summary may have."""


@dataclass(frozen=True)
class Snapshot:
    """A job and its rows at one moment."""

    job: Job
    rows: list[CertifiedRow]
    """In the order of certification. Shared, and appended to: the first ``num_rows`` are this moment's."""
    num_rows: int
    rows_before: int
    """Rows of the snapshot before this one: most watchers have them already."""
    figures: dict[str, Any]
    seconds_left: float | None

    def messages(self, rows_seen: int) -> Iterable[pb.Progress]:
        """Return what to tell a watcher who has so many of the rows: at least one message.

        Those for watchers who follow from one snapshot to the next are made once for all of them.
        """
        return self._step if rows_seen == self.rows_before else self._made(rows_seen)

    @cached_property
    def _step(self) -> list[pb.Progress]:
        return list(self._made(self.rows_before))

    @cached_property
    def _head(self) -> pb.Progress:
        procedure = self.job.terms.procedure
        return pb.Progress(
            job=job_message(self.job),
            summary=summary_message(self.figures, procedure),
            seconds_left=self.seconds_left,
        )

    def _made(self, rows_seen: int) -> Iterator[pb.Progress]:
        for start in range(rows_seen, max(self.num_rows, rows_seen + 1), _ROWS_A_MESSAGE):
            message = pb.Progress()
            message.CopyFrom(self._head)
            part = self.rows[start : min(start + _ROWS_A_MESSAGE, self.num_rows)]
            message.new_rows.extend(row_messages(part, self.job.terms.procedure))
            yield message


def figures_of(job: Job, rows: list[CertifiedRow]) -> dict[str, Any]:
    """Return the summary of a job's rows on its radius grid, from 0 to where nothing is certified."""
    step = job.terms.procedure.radius_step
    largest = max((row.radius for row in rows if row.correct), default=0.0)
    # Rounded so that 3 steps of 0.1 read 0.3.
    radii = [round(i * step, 12) for i in range(min(int(largest / step) + 2, MAX_RADII))]
    return summary(Rows.of(rows), radii)


class Feeds:
    """Lets any number of watchers follow jobs; belongs to the event loop that it is made in."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._feeds: dict[str, _Feed] = {}

    async def follow(self, key: str) -> AsyncIterator[Snapshot]:
        """Yield a job's state at once, then whenever it has changed, until the job has ended.

        Raises:
            ServiceError: if there is no such job.
        """
        feed = self._feeds.get(key)
        if feed is None:
            feed = self._feeds[key] = _Feed(self._store, key)
        feed.num_watchers += 1
        try:
            last = None
            while last is None or not last.job.state.has_ended:
                last = await feed.later_than(last)
                yield last
        finally:
            feed.num_watchers -= 1
            if not feed.num_watchers:
                feed.close()
                if self._feeds.get(key) is feed:
                    del self._feeds[key]


class _Feed:
    """One job, read from the store whenever that says that it has changed."""

    def __init__(self, store: JobStore, key: str) -> None:
        self.num_watchers = 0
        self._store, self._key = store, key
        self._rows: list[CertifiedRow] = []
        self._latest: Snapshot | Exception | None = None
        self._started: tuple[float, int] | None = None
        self._condition = asyncio.Condition()
        self._changed = asyncio.Event()
        self._changed.set()
        loop = asyncio.get_running_loop()

        def listen(changed_key: str) -> None:
            if changed_key == key and not loop.is_closed():
                loop.call_soon_threadsafe(self._changed.set)

        self._unsubscribe = store.subscribe(listen)
        self._task = loop.create_task(self._run())

    async def later_than(self, last: Snapshot | None) -> Snapshot:
        async with self._condition:
            await self._condition.wait_for(lambda: self._latest is not last)
            latest = self._latest
        if isinstance(latest, Exception):
            raise latest
        assert latest is not None
        return latest

    def close(self) -> None:
        self._unsubscribe()
        self._task.cancel()

    async def _run(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            latest: Snapshot | Exception
            try:
                latest = await asyncio.to_thread(self._read)
            except Exception as error:
                latest = error
            async with self._condition:
                self._latest = latest
                self._condition.notify_all()
            await asyncio.sleep(_SECONDS)

    def _read(self) -> Snapshot:
        job = self._store.get(self._key)
        if job is None:
            raise unknown_job(self._key)
        # The job was read first, so its rows are at least as many: its last message brings all of them.
        before = len(self._rows)
        self._rows.extend(self._store.rows(self._key, after=before))
        figures = figures_of(job, self._rows)
        left = self._seconds_left(job)
        return Snapshot(job, self._rows, len(self._rows), before, figures, left)

    def _seconds_left(self, job: Job) -> float | None:
        now, done = time.monotonic(), job.images_done
        if self._started is None or not done:
            self._started = now, done
        since, before = self._started
        if done > before:  # as fast as it was while somebody looked
            pace = (now - since) / (done - before)
        elif done:
            pace = job.seconds / done
        else:
            return None
        return pace * (job.num_images - done)


def unknown_job(key: str) -> ServiceError:
    """Return the refusal of a key that no job has."""
    return ServiceError(f"there is no job {key[:80]!r}: list the jobs that there are.", "NOT_FOUND")
