"""The store of the certification service: every call is done or not done, whatever happens."""

import itertools
import shutil
import sqlite3
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fedsmooth_core.certification.procedure import Procedure
from fedsmooth_core.certification.row_format import CertifiedRow
from fedsmooth_core.errors import CertificationError, ConfigError
from fedsmooth_core.models import ModelSpec
from server.certification import store as store_module
from server.certification.jobs import Job, JobState, JobTerms, Submission
from server.certification.store import (
    FILE,
    JobStore,
    QueueFullError,
    StorageError,
    UnknownJobError,
)

IMAGES = 4
SPEC = ModelSpec("small_cnn", "he", 10, 1, 8, 8)
UNFINISHED = (JobState.QUEUED, JobState.RUNNING)


def job(weights="a", sigma=0.25, device="cpu", images=IMAGES):
    terms = JobTerms("digits", Procedure(sigma=sigma))
    return Job(SPEC, terms, weights * 64, "fingerprint", ("0", "1"), device, images)


def row(idx, n=None):
    return CertifiedRow(idx, 3, 3, 0.1 + idx / 3, 1, 0.5, n)


def submit(store, one, run="", server_round=0, max_queued=100):
    return store.submit(one, one.weights.encode(), Submission(run, server_round), max_queued)


@pytest.fixture
def store(tmp_path):
    with JobStore(tmp_path / "jobs") as opened:
        yield opened


def states(store):
    return {one.weights[0]: one.state for one in store.jobs()}


def test_a_job_comes_back_as_it_was_submitted(store):
    wanted = replace(job(), class_names=("zero", 'o"ne'))
    found = submit(store, wanted, 'a "run" of ümläut', 3)
    assert found.key == wanted.key
    assert found.submissions == (Submission('a "run" of ümläut', 3),)
    unlike = {"submissions": (), "submitted_at": 0.0}
    assert replace(found, **unlike) == wanted
    assert store.weights(wanted.weights) == wanted.weights.encode()
    assert store.find_model(wanted.key) == store.find_model(wanted.weights) == found


def test_the_same_job_is_one_job_with_all_its_submissions(store):
    submit(store, job(), "one", 1)
    submit(store, job(), "two", 5)
    found = submit(store, job(), "one", 1)
    assert found.submissions == (Submission("one", 1), Submission("two", 5))
    assert store.counts()[JobState.QUEUED] == 1
    assert len(store.jobs(run="two")) == 1
    assert store.jobs(run="three") == []


def test_weights_are_kept_once(store):
    submit(store, job(sigma=0.25))
    submit(store, job(sigma=0.5))
    with store.reading() as connection:
        assert connection.execute("SELECT count(*) FROM weights").fetchone()[0] == 1


def test_jobs_come_latest_submission_first_and_can_be_chosen(store):
    for weights in "abc":
        submit(store, job(weights), f"run-{weights}", 1)
    submit(store, job("a"), "run-c", 2)
    store.cancel(job("b").key)
    assert [one.weights[0] for one in store.jobs()] == ["a", "c", "b"]
    assert [one.weights[0] for one in store.jobs(limit=1)] == ["a"]
    assert [one.weights[0] for one in store.jobs(run="run-c")] == ["a", "c"]
    assert [one.weights[0] for one in store.jobs(states=[JobState.CANCELLED])] == ["b"]
    assert [one.weights[0] for one in store.jobs("run-a", UNFINISHED)] == ["a"]


def test_rows_come_in_order_and_end_the_job(store):
    key = submit(store, job()).key
    store.start(key)
    assert store.get(key).state is JobState.RUNNING
    store.append(key, [row(6), row(3, n=128)])
    assert store.get(key).images_done == 2
    assert store.get(key).seconds == 1.0
    store.append(key, [row(1), row(9)])
    assert store.rows(key) == [row(6), row(3, n=128), row(1), row(9)]
    assert store.rows(key, after=3) == [row(9)]
    done = store.get(key)
    assert done.state is JobState.DONE
    assert done.ended_at >= done.submitted_at > 0


def test_an_image_is_certified_once(store):
    key = submit(store, job()).key
    store.append(key, [row(1)])
    with pytest.raises(CertificationError, match="certified twice"):
        store.append(key, [row(2), row(1)])
    with pytest.raises(CertificationError, match="certified twice"):
        store.append(key, [row(idx) for idx in range(2, 7)])  # more than the job has images
    assert store.rows(key) == [row(1)]
    assert store.get(key).images_done == 1


@pytest.mark.parametrize("end", ["cancel", "fail", "supersede"])
def test_what_ended_without_its_rows_can_be_queued_again_and_goes_on(store, end):
    key = submit(store, job("a"), "run", 1).key
    store.append(key, [row(1)])
    if end == "cancel":
        assert store.cancel(key).state is JobState.CANCELLED
    elif end == "fail":
        store.fail(key, "it fell over.")
        assert store.get(key).problem == "it fell over."
    else:
        newer = submit(store, job("b"), "run", 2).key
        store.append(newer, [row(1)], drop_superseded=True)
        assert store.get(key).state is JobState.SUPERSEDED
    assert store.get(key).ended_at is not None
    again = submit(store, job("a"), "run", 1)
    assert (again.state, again.problem, again.ended_at) == (JobState.QUEUED, "", None)
    store.append(key, [row(idx) for idx in (2, 3, 4)])
    assert store.get(key).state is JobState.DONE


def test_what_has_ended_is_left_as_it_is(store):
    key = submit(store, job()).key
    store.append(key, [row(idx) for idx in range(IMAGES)])
    store.start(key)
    store.fail(key, "too late")
    assert store.cancel(key).state is JobState.DONE
    assert submit(store, job()).state is JobState.DONE


def test_rows_of_a_job_that_was_cancelled_meanwhile_are_kept(store):
    key = submit(store, job()).key
    store.cancel(key)
    store.append(key, [row(idx) for idx in range(IMAGES)])
    assert store.get(key).state is JobState.CANCELLED
    assert submit(store, job()).state is JobState.DONE


def test_a_full_queue_takes_no_job_more(store):
    submit(store, job("a"), max_queued=2)
    submit(store, job("b"), max_queued=2)
    with pytest.raises(QueueFullError, match="2 jobs are unfinished, and the service takes 2"):
        submit(store, job("c"), max_queued=2)
    assert store.find_model("c" * 64) is None
    with pytest.raises(UnknownJobError):
        store.weights("c" * 64)
    submit(store, job("a"), "it is there already", max_queued=2)
    store.cancel(job("a").key)
    submit(store, job("c"), max_queued=2)
    with pytest.raises(QueueFullError):
        submit(store, job("a"), max_queued=2)


def test_what_is_unknown_is_said_to_be_unknown(store):
    assert store.get("0" * 64) is None
    assert store.find_model("0" * 64) is None
    assert store.rows("0" * 64) == []
    for call in (store.cancel, store.weights, lambda key: store.append(key, [row(1)])):
        with pytest.raises(UnknownJobError, match="0000"):
            call("0" * 64)


@pytest.mark.parametrize(
    ("older", "submissions", "is_dropped"),
    [
        (job("a"), [("run", 1)], True),
        (job("a"), [("run", 0), ("run", 1)], True),
        (job("a"), [("run", 2)], False),  # as new
        (job("a"), [("run", 1), ("run", 3)], False),
        (job("a"), [("other", 1)], False),
        (job("a"), [("run", 1), ("other", 1)], False),  # somebody else wants it
        (job("a"), [("run", 1), ("", 0)], False),
        (job("a"), [("", 0)], False),
        (job("a", sigma=0.5), [("run", 1)], False),
        (job("a", device="cuda"), [("run", 1)], False),
    ],
)
def test_a_newer_round_drops_what_nobody_else_wants(store, older, submissions, is_dropped):
    for run, server_round in submissions:
        submit(store, older, run, server_round)
    newer = submit(store, job("b"), "run", 2).key
    store.append(newer, [row(1)])
    assert store.get(older.key).state is JobState.QUEUED
    store.append(newer, [row(2)], drop_superseded=True)
    dropped = store.get(older.key).state is JobState.SUPERSEDED
    assert dropped == is_dropped
    assert store.get(newer).state is JobState.QUEUED


def test_a_job_without_a_run_drops_nothing(store):
    submit(store, job("a"), "", 1)
    newer = submit(store, job("b"), "", 2).key
    store.append(newer, [row(1)], drop_superseded=True)
    assert set(states(store).values()) == {JobState.QUEUED}


def test_listeners_hear_of_changes_that_are_there(store):
    heard = []
    key = job("b").key

    def listen(changed):
        heard.append((changed[:4], store.get(changed).state))

    def fail(changed):
        raise RuntimeError(changed)

    submit(store, job("a"), "run", 1)
    store.subscribe(fail)
    unsubscribe = store.subscribe(listen)
    submit(store, job("b"), "run", 2)
    store.start(key)
    store.start(key)  # changes nothing
    store.append(key, [row(1)], drop_superseded=True)
    store.cancel(key)
    unsubscribe()
    submit(store, job("b"))
    b = key[:4]
    assert heard == [
        (b, JobState.QUEUED),
        (b, JobState.RUNNING),
        (b, JobState.RUNNING),
        (job("a").key[:4], JobState.SUPERSEDED),
        (b, JobState.CANCELLED),
    ]


def test_many_threads_submit_and_read(store):
    problems = []

    def client(number):
        try:
            for weights in "abcd":
                submit(store, job(weights), f"run-{number}", 1)
                assert store.jobs(run=f"run-{number}")
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert [len(one.submissions) for one in store.jobs()] == [16] * 4


def test_one_process_at_a_time(tmp_path):
    with JobStore(tmp_path), pytest.raises(CertificationError, match="in use by another"):
        JobStore(tmp_path)
    JobStore(tmp_path).close()


@pytest.mark.parametrize(
    "content", [b"no database at all, but long enough to tell" * 99, b"\0" * 9]
)
def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(StorageError, match="damaged or no store"):
        JobStore(tmp_path)
    assert (tmp_path / FILE).read_bytes() == content


@pytest.mark.parametrize(
    ("pragma", "sentence"),
    [("application_id = 7", "another program"), ("user_version = 99", "another version .* 99")],
)
def test_another_program_or_version_is_refused(tmp_path, pragma, sentence):
    JobStore(tmp_path).close()
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.execute(f"PRAGMA {pragma}")
    connection.close()
    with pytest.raises(CertificationError, match=sentence):
        JobStore(tmp_path)


def test_damage_in_the_middle_is_one_sentence(tmp_path):
    with JobStore(tmp_path) as store:
        submit(store, job())
    content = bytearray((tmp_path / FILE).read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    (tmp_path / FILE).write_bytes(content)
    with JobStore(tmp_path) as store, pytest.raises(StorageError, match="damaged"):
        store.jobs()


def test_a_folder_that_cannot_be_one_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="choose a folder"):
        JobStore(tmp_path / "file" / "jobs")


def test_a_closed_store_says_so(store):
    store.close()
    with pytest.raises(StorageError, match="is closed"):
        store.jobs()


def full(store, is_full):
    """Let SQLite say that the disk is full, or no more."""
    pages = store._writer.execute("PRAGMA page_count").fetchone()[0]
    store._writer.execute(f"PRAGMA max_page_count = {pages if is_full else 2**30}")


def test_a_full_disk_loses_nothing_and_room_goes_on(store):
    key = submit(store, job(images=10**6)).key
    store.append(key, [row(1)])
    full(store, True)
    with pytest.raises(StorageError, match="check that its disk has room"):
        store.append(key, [row(idx) for idx in range(2, 5000)])
    large = job("b")
    with pytest.raises(StorageError, match="disk is full"):
        store.submit(large, b"0" * 10**6, Submission(), 10)
    assert store.rows(key) == [row(1)]
    assert store.get(large.key) is None
    full(store, False)
    store.append(key, [row(idx) for idx in range(2, 5000)])
    assert store.get(key).images_done == 4999
    assert submit(store, large).state is JobState.QUEUED


@pytest.mark.parametrize(
    ("run", "server_round"), [("a\nb", 0), ("x" * 201, 0), ("a\0", 0), ("run", -1), ("run", 2**32)]
)
def test_submissions_that_cannot_be_are_refused(run, server_round):
    with pytest.raises(ConfigError, match=r"submission\."):
        Submission(run, server_round)


class _CrashError(Exception):
    pass


class Histories(RuleBasedStateMachine):
    """Any order of calls and crashes leaves what a dictionary says.

    A crash is a copy of the files as they are at that moment, in the middle of a transaction too:
    that is what a killed process leaves to the next one.
    """

    @initialize()
    def begin(self):
        self.folder = Path(tempfile.mkdtemp())
        self.numbers = itertools.count()
        self.store = JobStore(self.folder / "first")
        self.jobs = {}

    weights = st.sampled_from("abc")
    runs = st.sampled_from(["", "one", "two"])

    @rule(weights=weights, run=runs, server_round=st.integers(0, 3), room=st.integers(0, 3))
    def submit(self, weights, run, server_round, room):
        known = self.jobs.get(weights)
        if (known is None or known["state"] in ("cancelled", "superseded", "failed")) and (
            sum(one["state"] in UNFINISHED for one in self.jobs.values()) >= room
        ):
            with pytest.raises(QueueFullError):
                submit(self.store, job(weights), run, server_round, room)
            return
        submit(self.store, job(weights), run, server_round, room)
        known = self.jobs.setdefault(weights, {"state": "queued", "rows": [], "submissions": []})
        if known["state"] in ("cancelled", "superseded", "failed"):
            known["state"] = "done" if len(known["rows"]) == IMAGES else "queued"
        if Submission(run, server_round) not in known["submissions"]:
            known["submissions"].append(Submission(run, server_round))

    def _known(self, weights, *allowed):
        known = self.jobs.get(weights)
        return known if known and known["state"] in allowed else None

    @rule(weights=weights)
    def start(self, weights):
        self.store.start(job(weights).key)
        if known := self._known(weights, "queued"):
            known["state"] = "running"

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), fails=st.booleans())
    def end(self, data, fails):
        weights = data.draw(st.sampled_from(sorted(self.jobs)))
        key = job(weights).key
        self.store.fail(key, "why") if fails else self.store.cancel(key)
        if known := self._known(weights, *UNFINISHED):
            known["state"] = "failed" if fails else "cancelled"

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), drop=st.booleans(), crashes=st.booleans())
    def append(self, data, drop, crashes):
        weights = data.draw(st.sampled_from(sorted(self.jobs)))
        known, key = self.jobs[weights], job(weights).key
        done = len(known["rows"])
        rows = [row(7 * (done + i)) for i in range(data.draw(st.integers(0, IMAGES - done)))]
        if crashes:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(store_module, "_supersede", self._copy_and_die)
                with pytest.raises(_CrashError):
                    self.store.append(key, rows, drop_superseded=True)
            self._continue_in_copy()
            return
        self.store.append(key, rows, drop_superseded=drop)
        known["rows"] += rows
        if len(known["rows"]) == IMAGES and known["state"] in UNFINISHED:
            known["state"] = "done"
        for other in self.jobs.values():
            if drop and other is not known and other["state"] in UNFINISHED:
                needless = all(
                    any(
                        s.run and s.run == n.run and s.round < n.round for n in known["submissions"]
                    )
                    for s in other["submissions"]
                )
                other["state"] = "superseded" if needless else other["state"]

    @rule()
    def crash(self):
        with pytest.raises(_CrashError):
            self._copy_and_die()
        self._continue_in_copy()

    @rule()
    def reopen(self):
        self.store.close()
        self.store = JobStore(self.store.directory)

    def _copy_and_die(self, *_):
        # Without SQLite's shared memory, which does not outlive a process.
        self.copy = self.folder / f"copy-{next(self.numbers)}"
        shutil.copytree(self.store.directory, self.copy, ignore=shutil.ignore_patterns("*-shm"))
        raise _CrashError

    def _continue_in_copy(self):
        self.store.close()
        self.store = JobStore(self.copy)

    @invariant()
    def all_is_there(self):
        if not hasattr(self, "jobs"):
            return
        found = {one.weights[0]: one for one in self.store.jobs()}
        assert {weights: (one.state, list(one.submissions)) for weights, one in found.items()} == {
            weights: (known["state"], known["submissions"]) for weights, known in self.jobs.items()
        }
        for weights, known in self.jobs.items():
            assert self.store.rows(found[weights].key) == known["rows"]
            assert found[weights].images_done == len(known["rows"])
            assert (found[weights].ended_at is None) == (found[weights].state in UNFINISHED)
        assert {key for key, _, _ in self.store.unfinished()} == {
            one.key for one in found.values() if one.state in UNFINISHED
        }

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.folder)


Histories.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestHistories = Histories.TestCase
TestHistories.pytestmark = [pytest.mark.slow]
