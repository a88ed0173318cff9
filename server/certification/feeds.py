"""How jobs get on, told to everybody who watches them: each job is read once for all."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fedsmooth_core.certification.analysis import Rows, summary
from fedsmooth_core.certification.row_format import CertifiedRow
from fedsmooth_core.errors import ServiceError
from server.certification.jobs import Job
from server.certification.store import JobStore

_SECONDS = 0.25
"""Between two messages about one job, at least."""

MAX_RADII = 1000
"""As many radii as a summary may have."""


@dataclass(frozen=True)
class Snapshot:
    """A job and its rows at one moment."""

    job: Job
    rows: list[CertifiedRow]
    """In the order of certification. Shared, and appended to: the first ``num_rows`` are this moment's."""
    num_rows: int
    figures: dict[str, Any]
    seconds_left: float | None


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
        self._rows.extend(self._store.rows(self._key, after=len(self._rows)))
        figures = figures_of(job, self._rows)
        return Snapshot(job, self._rows, len(self._rows), figures, self._seconds_left(job))

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
