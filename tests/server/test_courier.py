"""The way to the certification service and back, against a service of the test's own."""

import io
import itertools
import json
import os
import shutil
import socket
import threading
import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedsmooth_core.certification.row_format import COLUMNS, CertifiedRow
from fedsmooth_core.certification.rows import RowFile, read_parameters, read_rows
from fedsmooth_core.certification.subset import subset_indices
from fedsmooth_core.checkpoint import load_checkpoint, save_checkpoint, state_sha256
from fedsmooth_core.data import load_dataset
from fedsmooth_core.errors import (
    CertificationError,
    ConfigError,
    ServiceError,
    ServiceUnreachableError,
)
from server import collection, courier, service_jobs
from server.certification.client import Progress
from server.certification.jobs import Job, JobState
from server.certify import certify_checkpoint
from server.cli import main
from server.collection import BackgroundCourier, collect
from server.configuration import compose, save
from server.courier import Courier
from server.federation import run_federation
from server.owed import Delivery, failure_path, is_certified, is_filed, owed
from server.recorder import RoundRecord, TrainedRound
from server.run_directory import RunDirectory
from server.simulation import InProcessGrid
from server.status import show_status
from server.tracking import write_certified

SERVICE = ["service.address=127.0.0.1:9", "service.insecure=true", "service.patience_seconds=0"]
EVERY = [*SERVICE, "certification.every=1"]
ROWS = {}


class Service:
    """Plays a certification service: what it is given, and what it says."""

    def __init__(self, config, folder):
        self.config, self.folder = config, folder
        self.jobs, self.states, self.submitted = {}, {}, []
        self.problem = None
        self.works = True
        self.lost_rows = 0
        self.connections, self.back_at = 0, None

    def connect(self, connection):
        assert connection.address == self.config.service.address
        self.connections += 1
        if self.connections == self.back_at:
            self.problem = None
        return self

    def close(self):
        pass

    def submit(self, spec, terms, weights, submission, fingerprint):
        self._answer()
        test_set = load_dataset(self.config.dataset, "test")
        assert fingerprint == test_set.info.fingerprint
        num_images = len(subset_indices(len(test_set), terms.num_images))
        job = Job(spec, terms, state_sha256(weights), fingerprint, (), "cpu", num_images)
        self.submitted.append(submission.round)
        self.jobs.setdefault(job.key, job)
        self.states.setdefault(job.key, weights)
        if self.jobs[job.key].state.has_ended and self.jobs[job.key].state is not JobState.DONE:
            self.jobs[job.key] = job
        self.work()
        return self.jobs[job.key]

    def get(self, key):
        self._answer()
        if key not in self.jobs:
            raise ServiceError("There is no such job.", "NOT_FOUND")
        self.work()
        return self.jobs[key]

    def watch(self, key):
        job = self.get(key)
        point = {"radius": 0.0, "accuracy": 0.4, "confidence_interval_95": [0.1, 0.9]}
        figures = {"num_images": 5, "certified_accuracy": [point]}
        yield Progress(replace(job, images_done=2), [], figures, 3.0)
        self.works = True
        yield Progress(self.get(key), [], figures, 0.0)

    def fetch(self, key):
        self._answer()
        job = self.jobs[key]
        return self._rows(key, job.spec)[self.lost_rows :], job

    def _rows(self, key, spec):
        """What this machine certifies, once for all tests."""
        if key not in ROWS:
            path = self.folder / f"{key}.safetensors"
            save_checkpoint(path, self.states[key], {"model": vars(spec) | {"init": "he"}})
            file = certify_checkpoint(path, self.config, self.folder / key, Console(quiet=True))
            found = read_rows(file)
            columns = (getattr(found, name).tolist() for name in COLUMNS)
            ROWS[key] = list(itertools.starmap(CertifiedRow, zip(*columns, strict=True)))
        return ROWS[key]

    def work(self):
        for key, job in self.jobs.items():
            if self.works and not job.state.has_ended:
                self.jobs[key] = replace(job, state=JobState.DONE, images_done=job.num_images)

    def end_all(self, state, problem=""):
        for key, job in self.jobs.items():
            self.jobs[key] = replace(job, state=state, problem=problem)

    def _answer(self):
        if self.problem is not None:
            raise self.problem


UNREACHABLE = ServiceUnreachableError("nobody is there", "UNAVAILABLE")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_overrides):
    """A run that trained while the service was away, and the words that it ended with."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    config = compose([*tiny_overrides, *EVERY, f"run_dir={folder}"])
    console = Console(file=io.StringIO(), width=1000)
    run_federation(config, InProcessGrid(4, "cpu"), console, [])
    return config, folder, console.file.getvalue()


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained[1], tmp_path / "run")
    return RunDirectory(tmp_path / "run")


@pytest.fixture
def config(trained):
    return trained[0]


@pytest.fixture
def service(config, tmp_path):
    (tmp_path / "service").mkdir()
    return Service(config, tmp_path / "service")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    for module in (courier, collection):
        monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(courier, "_FIRST_PAUSE", 0.01)


@pytest.fixture
def collecting(config, run, service, console, monkeypatch):
    """Collect from the fake service; returns what was printed."""
    monkeypatch.setattr(collection, "Courier", lambda *given: Courier(*given, service.connect))

    def collecting(patience=None, also=(), settings=config):
        collect(settings, run, console, patience=patience, also=also)
        return console.file.getvalue()

    return collecting


def status_of(run, as_json=False):
    console = Console(file=io.StringIO(), width=1000)
    show_status(run.path, console, as_json)
    return console.file.getvalue()


def test_a_run_without_its_service_ends_well_and_says_what_is_owed(trained):
    config, folder, said = trained
    run = RunDirectory(folder)
    assert owed(run, config) == [3, 2, 1]
    assert "still owes the certificates of rounds 1, 2, 3: the certification service at" in said
    assert f"fedsmooth certify {folder}" in said
    shown = status_of(run)
    assert "owes the certificates of rounds 1, 2, 3." in shown
    assert "Nothing comes since" not in shown  # for nobody asks
    assert "The last attempt to collect them ended with: the certification service at" in shown
    assert f"Nothing collects them now: fedsmooth certify {folder} does." in shown
    found = json.loads(status_of(run, as_json=True))
    assert (found["state"], found["owed"]) == ("trained", [3, 2, 1])
    assert not found["is_collecting"]
    assert "not available" in found["delivery"]["problem"]


def test_certificates_of_the_service_are_those_of_this_machine(
    collecting, config, run, service, tmp_path, console
):
    assert "Certifying the model of round 3" not in collecting()  # it was done at once
    assert owed(run, config) == []
    assert service.submitted == [3, 2, 1]  # newest first
    for server_round in (1, 2, 3):
        here = tmp_path / f"here-{server_round}"
        certify_checkpoint(run.checkpoint(server_round), config, here, console)
        there = run.certification(server_round)
        ours, theirs = read_rows(here / "rows.tsv"), read_rows(there / "rows.tsv")
        for column in ("idx", "label", "predict", "radius", "correct"):
            assert getattr(ours, column).tolist() == getattr(theirs, column).tolist()
        assert read_parameters(here / "rows.tsv") == read_parameters(there / "rows.tsv")
        assert (here / "summary.json").read_text() == (there / "summary.json").read_text()
    assert is_certified(run, 3)
    shown = status_of(run)
    assert "finished, 3 of 3 rounds done." in shown
    assert "service owes" not in shown
    for server_round in (1, 2, 3):
        assert f"round {server_round}" in shown

    events = EventAccumulator(str(run.tensorboard / "certified"))
    events.Reload()
    first = json.loads((run.certification(1) / "summary.json").read_text())
    at_zero = events.Scalars("certified/accuracy-at-0")
    assert [event.step for event in at_zero] == [1, 2, 3]  # though 3 was certified first
    assert at_zero[0].value == pytest.approx(first["certified_accuracy"][0]["accuracy"])


def test_a_tensorboard_that_looks_on_sees_the_points_in_their_order(tmp_path):
    run = RunDirectory(tmp_path)
    figures = {"average_certified_radius": 0.1, "abstention_rate": 0.0, "certified_accuracy": []}
    watching = EventAccumulator(str(run.tensorboard / "certified"))
    for written in ([3], [2, 3], [1, 2, 3]):
        write_certified(run, dict.fromkeys(reversed(written), figures))
        watching.Reload()
        points = watching.Scalars("certified/average-radius")
        assert [event.step for event in points] == written


def test_progress_is_shown_until_the_job_has_ended(collecting, service):
    service.works = False  # until somebody watches
    said = collecting()
    assert "Certifying the model of round 3: 5 of 5" in said
    assert "certified accuracy at radius 0: 40.0% [10.0%, 90.0%]" in said


def test_a_service_that_comes_back_is_asked_again(collecting, config, run, service):
    service.problem, service.back_at = UNREACHABLE, 3
    said = collecting(patience=60)
    assert said.count("Waiting for certificates: nobody is there") == 1
    assert owed(run, config) == []
    assert service.connections == 3  # each attempt with a connection of its own
    assert Delivery.read(run).problem is None


@pytest.mark.parametrize("status", ["UNAVAILABLE", "INTERNAL"])
def test_patience_has_an_end(collecting, config, run, service, status):
    service.problem = ServiceError("something broke", status)
    assert "rounds 1, 2, 3: something broke" in collecting(patience=0.05)
    assert owed(run, config) == [3, 2, 1]
    assert not failure_path(run, 3).exists()


@pytest.mark.parametrize("status", ["UNAUTHENTICATED", "PERMISSION_DENIED", "UNIMPLEMENTED"])
def test_what_a_person_has_to_mend_is_not_waited_for(collecting, config, run, service, status):
    service.problem = ServiceError("the token expired on Monday", status)
    assert "rounds 1, 2, 3: the token expired on Monday" in collecting(patience=3600)
    assert owed(run, config) == [3, 2, 1]
    with pytest.raises(ServiceError, match="expired on Monday"):
        collecting()


def test_a_token_that_cannot_be_read_is_a_sentence(config, run, console, tmp_path):
    missing = replace(
        config, service=replace(config.service, token_file=str(tmp_path / "token"), insecure=True)
    )
    with pytest.raises(ConfigError, match="token cannot be read"):
        collect(missing, run, console)
    assert "token cannot be read" in Delivery.read(run).problem


@pytest.mark.parametrize(
    "status", ["INVALID_ARGUMENT", "FAILED_PRECONDITION", "NOT_FOUND", "RESOURCE_EXHAUSTED"]
)
def test_a_model_that_is_refused_for_good_is_given_up(collecting, config, run, service, status):
    service.problem = ServiceError("n=100 is above the limit of 10.", status)
    with pytest.raises(CertificationError, match="round 3 is not certified: n=100 is above"):
        collecting(patience=60)
    assert owed(run, config) == []
    assert "The certification failed: n=100 is above the limit of 10." in status_of(run)


def test_a_model_given_up_earlier_is_told_of_where_nothing_is_due_any_more(collecting, config, run):
    failure_path(run, 2).parent.mkdir(parents=True)
    failure_path(run, 2).write_text("n is above the limit.\n")
    nothing = replace(config, certification=replace(config.certification, every=0, at_end=False))
    said = collecting(settings=nothing)
    assert "The model of round 2 is not certified: n is above the limit." in said


def test_a_model_that_was_given_up_gets_another_chance(collecting, config, run):
    failure_path(run, 3).parent.mkdir(parents=True)
    failure_path(run, 3).write_text("n=100 is above the limit of 10.\n")
    assert owed(run, config) == [2, 1]
    collection.forget_failures(config, run)
    collecting()
    assert is_certified(run, 3)
    assert "failed" not in status_of(run)


@pytest.mark.parametrize(
    ("state", "why"),
    [
        (JobState.FAILED, "the scores are not finite"),
        (JobState.CANCELLED, "was cancelled at the certification service"),
        (JobState.SUPERSEDED, "for a newer model of the run"),
    ],
)
def test_a_job_that_ends_without_rows_is_given_up(
    collecting, config, run, service, state, why, monkeypatch
):
    collecting()  # rounds 1 to 3 are certified, and then round 2 is owed once more
    shutil.rmtree(run.certification(2))
    service.works = False
    service.end_all(state, "the scores are not finite")
    monkeypatch.setattr(
        service, "work", lambda: service.end_all(state, "the scores are not finite")
    )
    assert why in collecting()
    assert why in failure_path(run, 2).read_text()
    assert (
        f"The model of round 2 is not certified: {failure_path(run, 2).read_text()}"
        in status_of(run)
    )
    assert is_certified(run, 3)


def test_a_damaged_checkpoint_does_not_keep_the_others(collecting, config, run, service):
    path = run.checkpoint(2)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert "round 2 is not certified" in collecting()
    assert [is_filed(run, server_round) for server_round in (1, 2, 3)] == [True, False, True]


def test_a_service_that_lost_everything_gets_it_again(config, run, service):
    service.works = False
    with Courier(config, run, connect=service.connect) as messenger:
        messenger.deliver()
        service.jobs.clear()
        messenger.deliver()
        service.works = True
        messenger.deliver()
        messenger.deliver()
        assert messenger.owed() == []
    assert service.submitted == [3, 2, 1, 3, 2, 1]


def test_a_courier_that_died_after_submitting_is_followed_by_another(config, run, service):
    service.works = False
    with Courier(config, run, connect=service.connect) as messenger:
        messenger.deliver()
    assert owed(run, config) == [3, 2, 1]
    assert json.loads(status_of(run, as_json=True))["delivery"]["under_way"] == {
        "1": [0, 5],
        "2": [0, 5],
        "3": [0, 5],
    }
    service.works = True
    with Courier(config, run, connect=service.connect) as messenger:
        messenger.deliver()
    assert owed(run, config) == []
    assert len(service.jobs) == 3  # submitting again made no other jobs


@pytest.mark.parametrize("step", ["extend", "write_certified", "write_summary", "plot_curves"])
def test_a_courier_that_died_while_it_filed_is_followed_by_another(
    config, run, service, step, monkeypatch
):
    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    class Dying(RowFile):
        def extend(self, rows):
            super().extend(rows[:1])
            die()

    with monkeypatch.context() as patch:
        if step == "extend":
            patch.setattr(service_jobs, "RowFile", Dying)
        else:
            patch.setattr(courier, step, die)
        with pytest.raises(Killed), Courier(config, run, connect=service.connect) as messenger:
            messenger.deliver()
    if step == "extend":  # torn, as a crash may leave it
        with (run.certification(3) / "rows.tsv").open("a") as file:
            file.write("17\t3")
    with Courier(config, run, connect=service.connect) as messenger:
        messenger.deliver()
    assert owed(run, config) == []
    assert is_certified(run, 3)
    assert sorted(read_rows(run.certification(3) / "rows.tsv").idx.tolist()) == sorted(
        subset_indices(359, 5)
    )


def test_rows_of_other_terms_are_not_mixed_in(collecting, config, run, service):
    other = replace(config, certification=replace(config.certification, n=101))
    certify_checkpoint(run.checkpoint(2), other, run.certification(2), Console(quiet=True))
    (run.certification(2) / "summary.json").unlink()
    assert "round 2 is not certified" in collecting()
    assert "n (101 there, 100 now)" in failure_path(run, 2).read_text()


def test_rows_that_another_process_writes_are_waited_for(collecting, config, run):
    checkpoint = load_checkpoint(run.checkpoint(2))
    terms = service_jobs.procedure_of(config).terms
    parameters = {"weights": state_sha256(checkpoint.state), **terms}
    with RowFile(run.certification(2) / "rows.tsv", parameters):
        said = collecting(patience=0.05)
        assert "is being written by another process" in said
        assert owed(run, config) == [2]  # the others are not kept by it
        assert not failure_path(run, 2).exists()
    collecting()
    assert owed(run, config) == []


def test_a_service_that_sends_too_few_rows_is_asked_again(collecting, config, run, service):
    service.lost_rows = 1
    assert "4 of 5 rows" in collecting(patience=0.02)
    assert not is_filed(run, 3)
    service.lost_rows = 0
    collecting()
    assert owed(run, config) == []


def test_two_rounds_with_the_same_weights_both_get_their_certificates(
    collecting, config, run, service
):
    third = load_checkpoint(run.checkpoint(3))
    save_checkpoint(run.checkpoint(2), third.state, third.metadata)
    collecting()
    assert len(service.jobs) == 2
    rows = [read_rows(run.certification(number) / "rows.tsv").radius for number in (2, 3)]
    assert rows[0].tolist() == rows[1].tolist()


def test_a_service_that_answers_with_another_job_is_not_believed(
    collecting, config, run, service, monkeypatch
):
    submit = service.submit

    def other(spec, terms, weights, submission, fingerprint):
        zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
        return submit(spec, terms, zeros, submission, fingerprint)

    monkeypatch.setattr(service, "submit", other)
    with pytest.raises(CertificationError, match="another job than was submitted"):
        collecting()


def test_one_courier_of_a_run_works_at_a_time(collecting, config, run, service):
    with Courier(config, run, connect=service.connect) as first:
        service.works = False
        assert first.deliver()
        assert not Courier(config, run, connect=service.connect).deliver()
        assert "another process collects" in collecting(patience=0.02)
        service.works = True
    collecting()
    assert owed(run, config) == []


def test_another_courier_that_gets_on_is_waited_for(config, run, console, service, monkeypatch):
    waited = 0

    def sleep(_):
        nonlocal waited
        waited += 1
        if waited < 5:
            Delivery(under_way={"3": [waited, 5]}).write(run)
        elif waited == 5:
            Delivery("nobody is there", 1.0, {"3": [4, 5]}).write(run)

    clock = itertools.count(step=10)
    monkeypatch.setattr(collection.time, "sleep", sleep)
    monkeypatch.setattr(collection.time, "monotonic", lambda: next(clock))
    with Courier(config, run, connect=service.connect) as other:
        service.problem = UNREACHABLE
        with pytest.raises(ServiceError):
            other.deliver()
        collect(config, run, console, patience=25)
    said = console.file.getvalue()
    assert waited > 5
    assert "collects the certificates of this run, and waits: nobody is there" in said


def test_the_status_says_since_when_nothing_comes_to_whoever_collects(config, run, service):
    service.problem = UNREACHABLE
    with Courier(config, run, connect=service.connect) as messenger:
        with pytest.raises(ServiceError) as caught:
            messenger.deliver()
        messenger.trouble(caught.value)
        shown = status_of(run)
    assert "Nothing comes since 20" in shown
    assert "nobody is there" in shown
    assert "fedsmooth certify" not in shown


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_copy_of_a_run_is_certified_whatever_its_files_times_are(collecting, run, suffix):
    collecting()
    for path in run.path.rglob("*"):
        os.utime(path, (1e9, 1e9) if "curve" in path.name else None)
    assert is_certified(run, 3)
    assert "finished" in status_of(run)
    (run.path / f"curve.{suffix}").unlink()
    assert not is_certified(run, 3)
    assert "finished" in status_of(run)  # the certificates are there
    collecting()
    assert is_certified(run, 3)


def test_only_what_is_due_is_owed(trained, run, config):
    def rounds(**settings):
        certification = replace(config.certification, **settings)
        return owed(run, replace(config, certification=certification))

    assert rounds(every=2) == [3, 2]
    assert rounds(every=2, at_end=False) == [2]
    assert rounds(every=0) == [3]
    assert rounds(every=0, at_end=False) == []
    run.checkpoint(3).with_suffix(".json").unlink()
    assert rounds(every=1) == [2, 1]
    assert owed(run, config, also=[0]) == [2, 1, 0]
    certification = replace(config.certification, every=0)
    here = replace(config, certification=certification, service=type(config.service)())
    assert owed(run, here) == []


def with_certification(config, **settings):
    return replace(config, certification=replace(config.certification, **settings))


def with_rounds(config, num_rounds):
    return replace(config, federation=replace(config.federation, num_rounds=num_rounds))


def test_what_was_the_final_model_stays_owed_when_the_run_is_given_more_rounds(config, run):
    longer = with_certification(with_rounds(config, 6), every=2)
    assert owed(run, longer) == [3, 2]
    assert owed(run, with_certification(longer, at_end=False)) == [2]
    # That round 2 was ever the last one is said by no checkpoint.
    assert owed(run, with_certification(longer, every=0)) == [3]
    run.checkpoint(3).with_suffix(".json").write_text("damaged")
    assert owed(run, with_certification(longer, every=0)) == []


def test_a_run_that_is_given_more_rounds_ends_with_the_certificates_of_both_ends(
    config, run, service, console, monkeypatch
):
    monkeypatch.setattr(collection, "Courier", lambda *given: Courier(*given, service.connect))
    longer = with_certification(with_rounds(config, 4), every=0)
    longer = replace(longer, resume=True, run_dir=str(run.path))
    run_federation(longer, InProcessGrid(4, "cpu"), console, [])
    assert [is_filed(run, number) for number in (1, 2, 3, 4)] == [False, False, True, True]


@pytest.mark.parametrize("terms", [{"num_images": 4}, {"sigma": 0.5}])
@pytest.mark.parametrize("more", [0, 3])
def test_a_run_with_certificates_is_not_continued_on_other_terms(
    config, run, service, collecting, console, terms, more
):
    collecting()
    shutil.rmtree(run.certification(3))  # the final model has none yet
    other = with_certification(with_rounds(config, 3 + more), **terms)
    other = replace(other, resume=True, run_dir=str(run.path))
    with pytest.raises(
        ConfigError, match=r"round-0001/rows\.tsv holds certificates on other terms"
    ):
        run_federation(other, InProcessGrid(4, "cpu"), console, [])
    assert not run.has_checkpoint(4)


@pytest.mark.parametrize(
    "setting", ["certification.num_images=4", "certification.n=101", "certification.sigma=0.5"]
)
def test_the_certificates_of_a_run_are_not_shown_for_those_on_other_terms(
    run, collecting, setting, capsys
):
    collecting()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["certify", str(run.path), setting])
    said = capsys.readouterr()
    assert "holds certificates on other terms" in said.err
    assert "Certified accuracy" not in said.out


def test_the_certificates_of_a_run_are_not_shown_for_those_of_other_images(run, collecting, capsys):
    collecting()
    with pytest.raises(SystemExit):
        main(["certify", str(run.path), "dataset.name=mnist"])
    assert "images that a model was trained on, here digits" in capsys.readouterr().err


def test_a_model_that_was_given_up_is_named_whether_it_is_due_or_not(config, run):
    for server_round in (1, 2):
        failure_path(run, server_round).parent.mkdir(parents=True)
        failure_path(run, server_round).write_text(f"story {server_round}\n")
    (run.path / "certification/round-0002-copy").mkdir()
    (run.path / "certification/round-0002-copy/failure.txt").write_text("no round\n")
    save(with_certification(config, every=2), run.path / "config.yaml")
    shown = status_of(run)
    for server_round in (1, 2):
        line = f"The model of round {server_round} is not certified: story {server_round}"
        assert shown.count(line) == 1
    found = json.loads(status_of(run, as_json=True))
    assert found["given_up"] == {"2": "story 2", "1": "story 1"}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"problem": 3}', '{"under_way": {"1": "x"}}'])
def test_a_damaged_record_of_the_delivery_stops_nobody(run, content):
    (run.path / "certification/delivery.json").write_text(content)
    assert "owes the certificates of rounds 1, 2, 3." in status_of(run)


# --- In the background


@pytest.fixture
def background(config, run, service, monkeypatch):
    monkeypatch.setattr(
        collection, "Courier", lambda *given: Courier(*given, connect=service.connect)
    )
    said = []
    observer = BackgroundCourier(said.append)
    observer.run_started(config, run, 0)
    observer.said = said
    yield observer
    observer.run_finished()


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_models_are_certified_while_training_goes_on(background, config, run):
    wait_for(lambda: not owed(run, config))
    shutil.rmtree(run.certification(1))
    background.round_finished(RoundRecord(1, TrainedRound(), {}))
    wait_for(lambda: not owed(run, config))
    assert background.said == []


@pytest.mark.parametrize(
    "problem", [UNREACHABLE, ValueError("a bug"), OSError(28, "No space left")]
)
def test_whatever_happens_in_the_background_is_said_once_and_tried_again(
    config, run, service, background, problem
):
    service.problem = problem
    shutil.rmtree(run.certification(1), ignore_errors=True)
    background.round_finished(RoundRecord(1, TrainedRound(), {}))
    wait_for(lambda: background.said)
    time.sleep(0.1)
    assert len(background.said) == 1
    assert str(problem) in background.said[0]
    service.problem = None
    wait_for(lambda: not owed(run, config))
    wait_for(lambda: background.said[1:] == ["The certification service is back."])


def test_the_courier_in_the_background_makes_way_for_the_end_of_the_run(config, run, monkeypatch):
    """The service takes connections and never says a word, so that a call takes half a minute."""
    monkeypatch.setattr(collection, "_FILING_SECONDS", 5.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        hanging = replace(config, service=replace(config.service, address=address))
        said = []
        observer = BackgroundCourier(said.append)
        observer.run_started(hanging, run, 0)
        with silent.accept()[0]:
            observer.run_finished()
            assert said == []
            with Courier(hanging, run) as last:
                assert last._has_lock()
        assert address not in Delivery.read(run).problem  # breaking off is no trouble


def test_without_a_model_to_certify_during_training_nothing_runs_beside_it(config, run):
    before = threading.active_count()
    at_the_end = replace(config, certification=replace(config.certification, every=0))
    for settings in (at_the_end, replace(at_the_end, service=type(config.service)())):
        BackgroundCourier(print).run_started(settings, run, 0)
    assert threading.active_count() == before


def test_a_model_that_is_due_is_written_down(tiny, console):
    config = tiny(*SERVICE, "certification.every=2", "federation.checkpoint_every=3")
    run = run_federation(config, InProcessGrid(4, "cpu"), console, [])
    assert [number for number in range(4) if run.has_checkpoint(number)] == [0, 2, 3]


# --- The command line


def test_a_model_of_a_run_with_a_service_is_certified_here_where_that_is_said(
    run, tmp_path, capsys
):
    for number, path in enumerate([run.path, run.checkpoint(3)]):
        main(["certify", str(path), "service.address=null", "-o", str(tmp_path / f"{number}")])
        assert (tmp_path / f"{number}" / "summary.json").is_file()
    assert "certifies here" not in capsys.readouterr().out
    main(["certify", str(run.path), "service.address=null"])
    assert is_filed(run, 3)


def test_whoever_certifies_at_the_recorded_service_is_told_so(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["certify", str(run.checkpoint(3)), "-o", str(tmp_path / "x")])
    said = capsys.readouterr()
    assert "Certifying at 127.0.0.1:9; service.address=null certifies here." in said.out
    assert "is not available" in said.err


def test_the_command_collects_what_a_run_is_owed(run, service, monkeypatch, capsys):
    monkeypatch.setattr(collection, "Courier", lambda *given: Courier(*given, service.connect))
    failure = failure_path(run, 2)
    failure.parent.mkdir(parents=True)
    failure.write_text("an old story\n")
    main(["certify", str(run.path)])
    assert [is_filed(run, number) for number in (1, 2, 3)] == [True] * 3
    assert "Certified accuracy (%)" in capsys.readouterr().out
