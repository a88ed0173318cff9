"""What the page asks the store beyond single jobs: runs, and figures of many jobs."""

import math
from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock
from typing import Any

from fedsmooth_core.certification.analysis import Rows, summary
from fedsmooth_core.certification.bounds import certified_radius, p_a_lower
from fedsmooth_core.certification.procedure import Procedure
from server.certification.jobs import Job, JobState
from server.certification.store import JobStore

MAX_RADII = 25
"""As many radii as a table shows; a finer grid is thinned."""

_SUMMARIES_KEPT = 5000


@dataclass(frozen=True)
class Run:
    """What was submitted for one run of a federation."""

    name: str
    num_jobs: int
    num_done: int
    num_unfinished: int
    last_round: int
    """Of the models that were submitted."""
    submitted_at: float
    """Seconds since the epoch, of the youngest job."""


class Queries:
    """Read-only questions to a store; safe for threads.

    Every method raises StorageError if the disk or the file refuses.
    """

    def __init__(self, store: JobStore) -> None:
        self.store = store
        self._summaries: OrderedDict[tuple[str, int], dict[str, Any]] = OrderedDict()
        self._lock = Lock()

    def runs(self, limit: int) -> list[Run]:
        """Return the runs that jobs were submitted for, the latest submission first."""
        query = """
            SELECT run, count(DISTINCT job), count(DISTINCT iif(state = 'done', job, NULL)),
                count(DISTINCT iif(state IN ('queued', 'running'), job, NULL)),
                max(round), max(submitted_at)
            FROM submissions JOIN jobs ON jobs.id = submissions.job
            WHERE run != '' GROUP BY run ORDER BY max(submissions.id) DESC LIMIT ?
        """
        with self.store.reading() as connection:
            rows = connection.execute(query, (limit,)).fetchall()
        return [Run(*row) for row in rows]

    def has_run(self, run: str) -> bool:
        """Say whether a job was ever submitted for a run."""
        with self.store.reading() as connection:
            query = "SELECT 1 FROM submissions WHERE run = ? AND run != '' LIMIT 1"
            return connection.execute(query, (run,)).fetchone() is not None

    def last_certified(self, run: str) -> Job | None:
        """Return the finished job of a run's newest round, or None; the latest of several."""
        query = """
            SELECT key FROM submissions JOIN jobs ON jobs.id = submissions.job
            WHERE run = ? AND run != '' AND state = ?
            ORDER BY round DESC, submissions.id DESC LIMIT 1
        """
        with self.store.reading() as connection:
            row = connection.execute(query, (run, JobState.DONE)).fetchone()
        return None if row is None else self.store.get(row["key"])

    def rows(self, key: str) -> Rows:
        """Return a job's rows as columns."""
        return Rows.of(self.store.rows(key))

    def summary(self, job: Job) -> dict[str, Any]:
        """Return the figures of a job's rows so far, on its radius grid.

        They are those of :func:`fedsmooth_core.certification.analysis.summary`. Rows never change,
        so the figures of a job with so many rows are worked out once.
        """
        wanted = (job.key, job.images_done)
        with self._lock:
            if wanted in self._summaries:
                self._summaries.move_to_end(wanted)
                return self._summaries[wanted]
        rows = self.rows(job.key)
        figures = summary(rows, grid(job.terms.procedure))
        with self._lock:
            # Rows may have come since the job was read: the figures are of those that there are.
            self._summaries[job.key, len(rows)] = figures
            while len(self._summaries) > _SUMMARIES_KEPT:
                self._summaries.popitem(last=False)
        return figures


def grid(procedure: Procedure) -> list[float]:
    """Return the multiples of ``radius_step`` that this procedure could certify, from 0.

    They are the same for all jobs of one procedure, and at most ``MAX_RADII``: of a finer grid
    every second radius, every third, and so on.
    """
    sure = p_a_lower(procedure.n, procedure.n, procedure.alpha)
    # An absurd alpha or step makes infinitely many.
    steps = min(certified_radius(sure, procedure.sigma) / procedure.radius_step, 1e6)
    stride = math.ceil((steps + 1) / MAX_RADII)
    # Rounded so that 3 steps of 0.1 read 0.3.
    return [round(i * stride * procedure.radius_step, 12) for i in range(int(steps / stride) + 1)]
