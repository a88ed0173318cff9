"""The certification service, killed at random moments: nothing accepted is lost, nothing is done twice."""

import ast
import contextlib
import logging
import multiprocessing
import os
import random
import re
import signal
import socket
import threading
import time
from collections import Counter
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from fedsmooth_core.certification.procedure import Procedure
from fedsmooth_core.certification.row_format import CertifiedRow
from fedsmooth_core.checkpoint import state_sha256
from fedsmooth_core.errors import ServiceUnreachableError
from fedsmooth_core.models import ModelSpec, build_model
from server.certification.client import CertificationClient, Connection
from server.certification.datasets import Datasets
from server.certification.engine import Engine
from server.certification.jobs import Job, JobState, JobTerms, Submission
from server.certification.store import JobStore

pytestmark = pytest.mark.slow

SPEC = ModelSpec("small_cnn", "he", 10, 1, 8, 8)
IMAGES_A_JOB = 50

# Every process is forked from one that has imported all this: there is more to kill than imports. So
# nothing is imported from flower_processes here.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["server.cli", "server.certification.main"])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSMOOTH_CACHE", str(tmp_path / "decoded"))


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def serve(directory, port, environment):
    """Be the process of `fedsmooth certifier`; what its engine commits goes to ``directory``.log."""
    from server.cli import main

    os.environ.update(environment)
    torch.set_num_threads(1)
    output = os.open(f"{directory}.output", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    log = logging.getLogger("server.certification.engine")
    log.setLevel(logging.DEBUG)
    log.addHandler(logging.FileHandler(f"{directory}.log"))
    address = f"127.0.0.1:{port}"
    main(["certifier", "--directory", str(directory), "--listen", address, "--insecure"])


def started(directory, port):
    environment = {"FEDSMOOTH_CACHE": os.environ["FEDSMOOTH_CACHE"], "OMP_NUM_THREADS": "1"}
    process = PROCESSES.Process(target=serve, args=(directory, port, environment))
    process.start()
    return process


def models():
    """Jobs of several runs: name, (terms, submission, state)."""
    submissions = {
        "a1": Submission("a", 1),
        "a2": Submission("a", 2),
        "b1": Submission("b", 1),
        "c1": Submission("c", 1),
        "alone": Submission(),
    }
    for number, (name, submission) in enumerate(submissions.items()):
        method = "sequential" if name == "c1" else "fixed"
        terms = JobTerms(
            "digits", Procedure(n=300, method=method, seed=number), num_images=IMAGES_A_JOB
        )
        generator = torch.Generator().manual_seed(number)
        yield name, terms, submission, build_model(SPEC, [0.3], [0.4], generator).state_dict()


def rows_of(store, key):
    return [replace(row, time=0.0) for row in store.rows(key)]


def turns_in(log):
    """Return (job, indices) of each turn that a log knows of."""
    turns = re.findall(r"^Job (\w+): certified images (\[.*\])\.$", log.read_text(), re.MULTILINE)
    return [(key, ast.literal_eval(indices)) for key, indices in turns]


def wait_until_it_listens(process, port):
    while process.is_alive():
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.01)


def kill_after(process, port, log, num_turns, seconds):
    """Kill a service some turns and some seconds after it began to listen."""
    wait_until_it_listens(process, port)
    before = len(turns_in(log))
    while process.is_alive() and len(turns_in(log)) < before + num_turns:
        time.sleep(0.005)
    time.sleep(seconds)
    process.kill()


def submit_next(port, waiting, accepted):
    """Submit what waits first; what is not answered is submitted again, as a courier does."""
    name, terms, submission, state = waiting[0]
    with (
        contextlib.suppress(ServiceUnreachableError),
        CertificationClient(Connection(f"127.0.0.1:{port}", insecure=True)) as client,
    ):
        accepted[name] = client.submit(SPEC, terms, state, submission).key
        del waiting[0]


def test_killed_ten_times_the_service_finishes_every_job_once(tmp_path):
    moments = random.Random(0)
    port = free_port()
    directory, log = tmp_path / "disturbed", tmp_path / "disturbed.log"
    log.touch()
    Datasets().test_set("digits")  # decoded once, for all processes
    waiting, accepted = list(models()), {}
    kills_at_work, images_at_kills = 0, []

    def is_enough():
        # Kills in the middle of work, at several stages of it: a quick service needs more of them.
        return kills_at_work >= 10 and not waiting and len(set(images_at_kills)) >= 5

    while len(images_at_kills) < 40 and not is_enough():
        process = started(directory, port)
        life = len(images_at_kills)
        if life % 5 == 2:  # while it starts
            time.sleep(moments.random())
            process.kill()
        else:
            seconds = moments.choice([0.1, 0.5]) * moments.random()
            num_turns = 0 if waiting else moments.randrange(4)
            arguments = (process, port, log, num_turns, seconds)
            threading.Thread(target=kill_after, args=arguments, daemon=True).start()
            wait_until_it_listens(process, port)
            for _ in range(2):
                if waiting:
                    submit_next(port, waiting, accepted)
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"see {directory}.output"
        with JobStore(directory) as store:
            known = {job.key: job for job in store.jobs()}
            assert known.keys() >= set(accepted.values())
            unfinished = sum(not job.state.has_ended for job in known.values())
            images_at_kills.append(sum(job.images_done for job in known.values()))
            kills_at_work += unfinished > 0 and life % 5 != 2
    assert kills_at_work >= 10, images_at_kills
    assert not waiting
    # The kills fell into work: some of it was done before, some after.
    assert len(set(images_at_kills)) >= 5, images_at_kills
    assert images_at_kills[-1] < 5 * IMAGES_A_JOB

    process = started(directory, port)
    wait_until_it_listens(process, port)
    with CertificationClient(Connection(f"127.0.0.1:{port}", insecure=True)) as client:
        for key in accepted.values():
            while not client.get(key).state.has_ended:
                time.sleep(0.05)
    process.terminate()
    process.join()
    assert process.exitcode == 0, f"see {directory}.output"
    expected = undisturbed(tmp_path / "undisturbed")
    with JobStore(directory) as store:
        for name, key in accepted.items():
            assert store.get(key).state is JobState.DONE
            assert rows_of(store, key) == expected[name]
        logged = Counter((key, idx) for key, indices in turns_in(log) for idx in indices)
        assert set(logged.values()) == {1}


def undisturbed(directory):
    """Return the rows of a service that nothing happens to."""
    datasets = Datasets()
    info = datasets.test_set("digits").info
    with JobStore(directory) as store:
        engine = Engine(store, datasets, torch.device("cpu"))
        keys = {}
        for name, terms, submission, state in models():
            job = Job(
                SPEC,
                terms,
                state_sha256(state),
                info.fingerprint,
                info.class_names,
                "cpu",
                IMAGES_A_JOB,
            )
            data = safetensors.torch.save(dict(state))
            keys[name] = store.submit(job, data, submission, 100).key
        engine.start()
        while store.unfinished():
            time.sleep(0.05)
        engine.stop()
        return {name: rows_of(store, key) for name, key in keys.items()}


IMAGES = 10**6


def hammer(directory, acknowledged):
    """Change a store as fast as it goes, and note what has returned."""
    notes = os.open(acknowledged, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    with JobStore(directory) as store:
        number = sum(store.counts().values())
        while True:
            job = hammered_job(number)
            store.submit(job, b"x" * 20_000, Submission("run", number), IMAGES)
            os.write(notes, f"submitted {job.key}\n".encode())
            for first in range(0, 50, 5):
                rows = [CertifiedRow(idx, 0, 0, 0.5, 1, 0.0) for idx in range(first, first + 5)]
                store.append(job.key, rows, drop_superseded=number % 3 == 0)
                os.write(notes, f"appended {job.key} {first + 5}\n".encode())
            number += 1


def hammered_job(number):
    return Job(
        SPEC,
        JobTerms("digits", Procedure()),
        f"{number:064}",
        "fingerprint",
        ("0", "1"),
        "cpu",
        IMAGES,
    )


def test_a_store_killed_while_it_commits_has_all_that_it_acknowledged(tmp_path):
    moments = random.Random(1)
    directory, acknowledged = tmp_path / "jobs", tmp_path / "acknowledged"
    acknowledged.touch()
    for kills in range(1, 21):
        size = acknowledged.stat().st_size
        process = PROCESSES.Process(target=hammer, args=(directory, acknowledged))
        process.start()
        while acknowledged.stat().st_size == size:
            time.sleep(0.001)
        time.sleep(0.2 * moments.random())
        process.kill()
        process.join()
        wanted = {}
        for line in acknowledged.read_text().splitlines():
            done, key, *number = line.split()
            wanted[key] = int(number[0]) if done == "appended" else 0
        with JobStore(directory) as store:
            for key, number in wanted.items():
                found = store.get(key).images_done
                assert number <= found <= number + 5  # a whole append more, at most
                assert [row.idx for row in store.rows(key)] == list(range(found))
                assert found % 5 == 0
            assert len(wanted) <= sum(store.counts().values()) <= len(wanted) + kills
            with store.reading() as connection:
                assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
