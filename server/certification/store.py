"""What the service must not forget: models, jobs and rows, in one SQLite file in one directory."""

import contextlib
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from fedsmooth_core.certification.row_format import CertifiedRow
from fedsmooth_core.config import from_nested, to_nested
from fedsmooth_core.durable import try_lock
from fedsmooth_core.errors import CertificationError, FedSmoothError
from fedsmooth_core.models import ModelSpec
from server.certification.jobs import Job, JobState, JobTerms, Submission

FILE = "certification.sqlite3"
_LOCK = ".lock"

_APPLICATION = 0x46534341
"""Marks the file as one of ours ("FSCA")."""

_VERSION = 1
"""Of the schema, and of what a job's key is the hash of."""

_UNFINISHED = "state IN ('queued', 'running')"

_SCHEMA = (
    """
    CREATE TABLE weights (
        sha256 TEXT PRIMARY KEY,
        data BLOB NOT NULL
    )
    """,
    """
    CREATE TABLE jobs (
        id INTEGER PRIMARY KEY,
        key TEXT NOT NULL UNIQUE,
        weights TEXT NOT NULL REFERENCES weights (sha256),
        spec TEXT NOT NULL,
        terms TEXT NOT NULL,
        fingerprint TEXT NOT NULL,
        class_names TEXT NOT NULL,
        device TEXT NOT NULL,
        num_images INTEGER NOT NULL CHECK (num_images > 0),
        state TEXT NOT NULL,
        problem TEXT NOT NULL DEFAULT '',
        images_done INTEGER NOT NULL DEFAULT 0 CHECK (images_done BETWEEN 0 AND num_images),
        submitted_at REAL NOT NULL,
        last_submission INTEGER,
        ended_at REAL,
        seconds REAL NOT NULL DEFAULT 0
    )
    """,
    "CREATE INDEX jobs_by_weights ON jobs (weights)",
    "CREATE INDEX jobs_by_state ON jobs (state)",
    "CREATE INDEX jobs_by_submission ON jobs (last_submission)",
    """
    CREATE TABLE submissions (
        id INTEGER PRIMARY KEY,
        job INTEGER NOT NULL REFERENCES jobs (id),
        run TEXT NOT NULL,
        round INTEGER NOT NULL,
        UNIQUE (job, run, round)
    )
    """,
    "CREATE INDEX submissions_by_run ON submissions (run, round)",
    # The position is the number of the job's images that were certified before.
    """
    CREATE TABLE rows (
        job INTEGER NOT NULL REFERENCES jobs (id),
        position INTEGER NOT NULL,
        idx INTEGER NOT NULL,
        label INTEGER NOT NULL,
        predict INTEGER NOT NULL,
        radius REAL NOT NULL,
        correct INTEGER NOT NULL,
        seconds REAL NOT NULL,
        n INTEGER,
        PRIMARY KEY (job, position),
        UNIQUE (job, idx)
    ) WITHOUT ROWID
    """,
)

_JOB = """
    SELECT key, weights, spec, terms, fingerprint, class_names, device, num_images, state, problem,
        images_done, submitted_at, ended_at, seconds,
        (SELECT json_group_array(json_array(run, round)) FROM
            (SELECT run, round FROM submissions WHERE job = jobs.id ORDER BY id)) AS submissions
    FROM jobs
"""

_WAL_KEPT = 64 * 2**20
"""Bytes of SQLite's journal that stay on the disk after a large model went through it."""

logger = logging.getLogger(__name__)


class QueueFullError(CertificationError):
    """As many jobs as the service allows are unfinished."""


class UnknownJobError(CertificationError):
    """No job has this key."""


class UnreadableJobError(CertificationError):
    """What is stored of a job is damaged, or of a newer version."""


class StorageError(CertificationError):
    """The disk or the file refuses; what was committed stays, and trying again may help."""


class JobStore:
    """Jobs, their models and their rows; every change is on the disk when its call returns.

    Safe for threads. One process at a time holds a directory. A change of a job is one transaction,
    so a process that dies at any moment leaves each call done or not done.

    Args:
        directory: made where it is missing; it holds ``certification.sqlite3`` and SQLite's journal.

    Raises:
        CertificationError: if another process holds the directory, or the file is not a store of
            this version.
        StorageError: if the disk or the file refuses. So does every method.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._path = directory / FILE
        self._listeners: list[Callable[[str], None]] = []
        # A reader of its own is never kept waiting by a large model that is being written.
        self._write_lock, self._read_lock = threading.Lock(), threading.Lock()
        self._listeners_lock = threading.Lock()
        with contextlib.ExitStack() as stack:
            try:
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                lock = stack.enter_context((directory / _LOCK).open("ab"))
            except OSError as error:
                raise StorageError(
                    f"{directory} cannot hold the jobs ({error.strerror}): choose a folder that can "
                    "be written."
                ) from error
            if not try_lock(lock):
                raise CertificationError(
                    f"{directory} is in use by another certification service: stop it, or choose "
                    "another directory."
                )
            with self._explained():
                self._writer = stack.enter_context(contextlib.closing(_connect(self._path)))
                self._open()
                self._reader = stack.enter_context(contextlib.closing(_connect(self._path)))
                self._reader.execute("PRAGMA query_only = ON")
            self._closing = stack.pop_all()

    def submit(self, job: Job, weights: bytes, submission: Submission, max_queued: int) -> Job:
        """Accept a job: a new one, or the one of this key as it stands, with one submission more.

        A job that was cancelled, superseded or has failed is queued again; its rows stay.

        Args:
            job: its submissions, state and figures do not matter.
            weights: the safetensors file, whose state has the hash ``job.weights``.
            submission: whose model this is; the same one again changes nothing.
            max_queued: unfinished jobs that the store may hold.

        Raises:
            QueueFullError: if there are so many already, and this job would be one more.
        """
        key = job.key
        with self._writing() as connection:
            found = connection.execute("SELECT id, state FROM jobs WHERE key = ?", (key,))
            known = found.fetchone()
            if known is None or known["state"] in _REQUEUED:
                self._check_room(connection, max_queued)
            if known is None:
                number = _insert_job(connection, key, job, weights)
            else:
                number = known["id"]
                if known["state"] in _REQUEUED:
                    # One that was cancelled during its last turn has all of its rows.
                    connection.execute(
                        "UPDATE jobs SET problem = '',"
                        " state = iif(images_done = num_images, 'done', 'queued'),"
                        " ended_at = iif(images_done = num_images, ended_at, NULL) WHERE id = ?",
                        (number,),
                    )
            connection.execute(
                "INSERT INTO submissions (job, run, round) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                (number, submission.run, submission.round),
            )
            connection.execute(
                "UPDATE jobs SET last_submission = (SELECT max(id) FROM submissions WHERE job = ?)"
                " WHERE id = ?",
                (number, number),
            )
        self._tell(key)
        return self._job(key)

    def get(self, key: str) -> Job | None:
        """Return a job as it stands, or None if there is none of this key.

        Raises:
            UnreadableJobError: if what is stored of it is damaged, or of a newer version.
        """
        with self.reading() as connection:
            row = connection.execute(f"{_JOB} WHERE key = ?", (key,)).fetchone()
        return None if row is None else _job(row)

    def jobs(self, run: str = "", states: Sequence[JobState] = (), limit: int = 100) -> list[Job]:
        """Return jobs, the latest submission first; those that cannot be read are left out.

        Args:
            run: only jobs that were submitted for this run; empty for all.
            states: only jobs in one of these; empty for all.
            limit: at most so many.
        """
        marks = ", ".join("?" * len(states))
        query = f"""
            {_JOB} WHERE (? = '' OR EXISTS
                (SELECT 1 FROM submissions WHERE job = jobs.id AND run = ?))
            {f"AND state IN ({marks})" if states else ""}
            ORDER BY last_submission DESC LIMIT ?
        """
        with self.reading() as connection:
            rows = connection.execute(query, (run, run, *states, limit)).fetchall()
        jobs = []
        for row in rows:
            try:
                jobs.append(_job(row))
            except UnreadableJobError as error:
                logger.warning("A job is left out of a list: %s", error)
        return jobs

    def counts(self) -> dict[JobState, int]:
        """Return how many jobs are in each state that this version knows."""
        with self.reading() as connection:
            rows = connection.execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall()
        found = dict(map(tuple, rows))
        return {state: found.get(state, 0) for state in JobState}

    def unfinished(self) -> list[tuple[str, str, int]]:
        """Return (key, run, round) of each submission of an unfinished job, oldest first."""
        query = f"""
            SELECT key, run, round FROM submissions JOIN jobs ON jobs.id = submissions.job
            WHERE {_UNFINISHED} ORDER BY submissions.id
        """
        with self.reading() as connection:
            rows = connection.execute(query).fetchall()
        return [tuple(row) for row in rows]

    def rows(self, key: str, after: int = 0) -> list[CertifiedRow]:
        """Return a job's rows in the order of certification, without the first ``after``."""
        query = """
            SELECT idx, label, predict, radius, correct, rows.seconds AS seconds, n
            FROM rows JOIN jobs ON jobs.id = rows.job
            WHERE key = ? AND position >= ? ORDER BY position
        """
        with self.reading() as connection:
            rows = connection.execute(query, (key, after)).fetchall()
        return [_row(row) for row in rows]

    def find_model(self, model: str) -> Job | None:
        """Return the job of a key, or the latest one with weights of this hash, or None.

        Raises:
            UnreadableJobError: if what is stored of it is damaged, or of a newer version.
        """
        with self.reading() as connection:
            row = connection.execute(
                f"{_JOB} WHERE key = ? OR weights = ? ORDER BY id DESC LIMIT 1", (model, model)
            ).fetchone()
        return None if row is None else _job(row)

    def weights(self, sha256: str) -> bytes:
        """Return the safetensors file with a state of this hash.

        Raises:
            UnknownJobError: if no job was submitted with it.
        """
        with self.reading() as connection:
            row = connection.execute(
                "SELECT data FROM weights WHERE sha256 = ?", (sha256,)
            ).fetchone()
        if row is None:
            raise UnknownJobError(f"no model has the weights {sha256[:80]!r}: submit it first.")
        return bytes(row["data"])

    def start(self, key: str) -> None:
        """Say that a queued job gets its turns."""
        self._change(key, (JobState.QUEUED,), JobState.RUNNING)

    def append(
        self, key: str, rows: Sequence[CertifiedRow], *, drop_superseded: bool = False
    ) -> None:
        """Keep what a turn certified, all of it or nothing; the last row ends the job.

        A job that was cancelled meanwhile keeps the rows too, and stays cancelled.

        Args:
            key: of the job.
            rows: of images that have none yet.
            drop_superseded: unfinished jobs of the same runs and terms, but of older rounds, are
                dropped. One that somebody else submitted too (without a run, or for a run in which
                this job is not the newer one) is not.

        Raises:
            CertificationError: if an image has its row already, or the job would have more rows
                than images. Nothing is kept then.
        """
        dropped: list[str] = []
        with self._writing() as connection:
            job = connection.execute(
                "SELECT id, state, images_done, num_images FROM jobs WHERE key = ?", (key,)
            ).fetchone()
            if job is None:
                raise _unknown(key)
            done = job["images_done"] + len(rows)
            try:
                connection.executemany(
                    "INSERT INTO rows (job, position, idx, label, predict, radius, correct, seconds,"
                    " n) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    [
                        (job["id"], position, *_cells(row))
                        for position, row in enumerate(rows, start=job["images_done"])
                    ],
                )
                connection.execute(
                    "UPDATE jobs SET images_done = ?, seconds = seconds + ? WHERE id = ?",
                    (done, sum(row.time for row in rows), job["id"]),
                )
            except sqlite3.IntegrityError as error:
                raise CertificationError(
                    f"rows of the job {key} were certified twice ({error}): this is a mistake of "
                    "the service, please report it."
                ) from error
            if done == job["num_images"] and job["state"] in _UNENDED:
                connection.execute(
                    "UPDATE jobs SET state = ?, ended_at = ? WHERE id = ?",
                    (JobState.DONE, time.time(), job["id"]),
                )
            if drop_superseded:
                dropped = _supersede(connection, job["id"])
        self._tell(key, *dropped)

    def fail(self, key: str, problem: str) -> None:
        """End an unfinished job that cannot be certified; ``problem`` says why in a sentence."""
        self._change(key, (JobState.QUEUED, JobState.RUNNING), JobState.FAILED, problem)

    def cancel(self, key: str) -> Job:
        """End an unfinished job; one that has ended is left as it is. Its rows stay.

        Raises:
            UnknownJobError: if there is no such job.
        """
        self._change(key, (JobState.QUEUED, JobState.RUNNING), JobState.CANCELLED)
        return self._job(key)

    def subscribe(self, listener: Callable[[str], None]) -> Callable[[], None]:
        """Call ``listener`` with a job's key after each change of it, until the result is called.

        It is called in the thread that made the change, so it must be quick: set an event. Subscribe
        first and read then: what changed before the reading is in it, what comes after calls.
        """
        # A new list each time: a change may be walking through the old one.
        with self._listeners_lock:
            self._listeners = [*self._listeners, listener]

        def unsubscribe() -> None:
            with self._listeners_lock:
                self._listeners = [other for other in self._listeners if other is not listener]

        return unsubscribe

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection that only reads, to one thread at a time, for queries of one's own."""
        with self._read_lock, self._explained():
            yield self._reader

    def close(self) -> None:
        """Let go of the directory."""
        with self._write_lock, self._read_lock:
            self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _open(self) -> None:
        tables = self._writer.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        application = self._writer.execute("PRAGMA application_id").fetchone()[0]
        version = self._writer.execute("PRAGMA user_version").fetchone()[0]
        if tables and application != _APPLICATION:
            raise CertificationError(
                f"{self._path} belongs to another program: choose another directory."
            )
        if tables and version != _VERSION:
            raise CertificationError(
                f"{self._path} was written by another version of this program (its format is "
                f"{version}, this one's {_VERSION}): use that version, or another directory."
            )
        self._writer.execute("PRAGMA journal_mode = WAL")
        self._writer.execute("PRAGMA synchronous = FULL")
        self._writer.execute("PRAGMA foreign_keys = ON")
        self._writer.execute(f"PRAGMA journal_size_limit = {_WAL_KEPT}")
        if not tables:
            with self._writing() as connection:
                for statement in _SCHEMA:
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {_APPLICATION}")
                connection.execute(f"PRAGMA user_version = {_VERSION}")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._write_lock, self._explained():
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                # A full disk may have ended the transaction already.
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise StorageError(
                f"{self._path} cannot be used now ({error}): check that its disk has room and can "
                "be written."
            ) from error
        except sqlite3.ProgrammingError as error:
            raise StorageError(f"{self._path} is closed: the service is shutting down.") from error
        except sqlite3.DatabaseError as error:
            raise StorageError(
                f"{self._path} is damaged or no store of this service ({error}): restore it from a "
                "copy, or choose another directory."
            ) from error

    def _check_room(self, connection: sqlite3.Connection, max_queued: int) -> None:
        query = f"SELECT count(*) FROM jobs WHERE {_UNFINISHED}"
        unfinished = connection.execute(query).fetchone()[0]
        if unfinished >= max_queued:
            raise QueueFullError(
                f"{unfinished} jobs are unfinished, and the service takes {max_queued}: submit again "
                "when some have ended, or cancel some."
            )

    def _change(
        self, key: str, before: Sequence[JobState], after: JobState, problem: str = ""
    ) -> None:
        ended_at = time.time() if after.has_ended else None
        marks = ", ".join("?" * len(before))
        with self._writing() as connection:
            changed = connection.execute(
                "UPDATE jobs SET state = ?, problem = ?, ended_at = ? "
                f"WHERE key = ? AND state IN ({marks})",
                (after, problem, ended_at, key, *before),
            ).rowcount
        if changed:
            self._tell(key)

    def _job(self, key: str) -> Job:
        job = self.get(key)
        if job is None:
            raise _unknown(key)
        return job

    def _tell(self, *keys: str) -> None:
        for listener in self._listeners:
            for key in keys:
                try:
                    listener(key)
                except Exception:
                    logger.exception("A listener for changes of jobs failed.")


_REQUEUED = (JobState.CANCELLED, JobState.SUPERSEDED, JobState.FAILED)
_UNENDED = (JobState.QUEUED, JobState.RUNNING)


def _connect(path: Path) -> sqlite3.Connection:
    # Transactions are begun by hand; a lock lets one thread at a time use the connection.
    connection = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    return connection


def _insert_job(connection: sqlite3.Connection, key: str, job: Job, weights: bytes) -> int:
    has = connection.execute("SELECT 1 FROM weights WHERE sha256 = ?", (job.weights,)).fetchone()
    if has is None:
        connection.execute(
            "INSERT INTO weights (sha256, data) VALUES (?, ?)", (job.weights, weights)
        )
    number = connection.execute(
        "INSERT INTO jobs (key, weights, spec, terms, fingerprint, class_names, device, num_images,"
        " state, submitted_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            key,
            job.weights,
            _json(to_nested(job.spec)),
            _json(to_nested(job.terms)),
            job.fingerprint,
            _json(job.class_names),
            job.device,
            job.num_images,
            JobState.QUEUED,
            time.time(),
        ),
    ).lastrowid
    assert number is not None
    return number


def _supersede(connection: sqlite3.Connection, newer: int) -> list[str]:
    """Drop what a job makes superfluous, and return the keys."""
    rows = connection.execute(
        f"""
        UPDATE jobs SET state = :superseded, ended_at = :now
        WHERE {_UNFINISHED} AND id != :newer
            AND (terms, fingerprint, device) =
                (SELECT terms, fingerprint, device FROM jobs WHERE id = :newer)
            AND NOT EXISTS (
                SELECT 1 FROM submissions AS theirs WHERE theirs.job = jobs.id AND NOT EXISTS (
                    SELECT 1 FROM submissions AS ours WHERE ours.job = :newer
                        AND ours.run != '' AND ours.run = theirs.run AND ours.round > theirs.round
                )
            )
        RETURNING key
        """,
        {"superseded": JobState.SUPERSEDED, "now": time.time(), "newer": newer},
    )
    return [row["key"] for row in rows.fetchall()]


def _job(row: sqlite3.Row) -> Job:
    try:
        return Job(
            spec=from_nested(ModelSpec, json.loads(row["spec"])),
            terms=from_nested(JobTerms, json.loads(row["terms"])),
            weights=row["weights"],
            fingerprint=row["fingerprint"],
            class_names=tuple(json.loads(row["class_names"])),
            device=row["device"],
            num_images=row["num_images"],
            submissions=tuple(Submission(*pair) for pair in json.loads(row["submissions"])),
            state=JobState(row["state"]),
            problem=row["problem"],
            images_done=row["images_done"],
            submitted_at=row["submitted_at"],
            ended_at=row["ended_at"],
            seconds=row["seconds"],
        )
    # Whatever a damaged file makes of it.
    except (
        FedSmoothError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
    ) as error:
        raise UnreadableJobError(
            f"the job {row['key']} cannot be read ({error!r:.200}): it was damaged, or stored by a "
            "newer version of this program, so use that one, or submit the job again elsewhere."
        ) from error


def _cells(row: CertifiedRow) -> tuple[int | float | None, ...]:
    return row.idx, row.label, row.predict, row.radius, row.correct, row.time, row.n


def _row(row: sqlite3.Row) -> CertifiedRow:
    return CertifiedRow(
        idx=row["idx"],
        label=row["label"],
        predict=row["predict"],
        radius=row["radius"],
        correct=row["correct"],
        time=row["seconds"],
        n=row["n"],
    )


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _unknown(key: str) -> UnknownJobError:
    return UnknownJobError(f"no job has the key {key[:80]!r}: list the jobs that there are.")
