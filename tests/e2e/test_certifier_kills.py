"""The certification service, killed at random moments: nothing accepted is lost, nothing is done twice."""

import ast
import contextlib
import logging
import multiprocessing
import os
import random
import re
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
KILLS = 12

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
        terms = JobTerms("digits", Procedure(n=500, method=method, seed=number), num_images=60)
        generator = torch.Generator().manual_seed(number)
        yield name, terms, submission, build_model(SPEC, [0.3], [0.4], generator).state_dict()


def rows_of(store, key):
    return [replace(row, time=0.0) for row in store.rows(key)]


def test_killed_ten_times_the_service_finishes_every_job_once(tmp_path):
    moments = random.Random(0)
    port = free_port()
    directory = tmp_path / "disturbed"
    waiting, accepted = list(models()), {}
    unfinished_at_kills = []
    with CertificationClient(Connection(f"127.0.0.1:{port}", insecure=True)) as client:
        while True:
            process = started(directory, port)
            is_last = len(unfinished_at_kills) >= KILLS
            if not is_last:
                # Half of them while it starts, opens the store or takes a job.
                killer = threading.Timer(
                    moments.choice([0.3, 1.0, 2.0]) * moments.random(), process.kill
                )
                killer.start()
            while process.is_alive():
                # A submission that was not answered is submitted again, as a courier does.
                with contextlib.suppress(ServiceUnreachableError):
                    while waiting and (not accepted or len(unfinished_at_kills) > len(accepted)):
                        name, terms, submission, state = waiting[0]
                        accepted[name] = client.submit(SPEC, terms, state, submission).key
                        del waiting[0]
                    if is_last and not waiting:
                        jobs = [client.get(key) for key in accepted.values()]
                        if all(job.state.has_ended for job in jobs):
                            process.terminate()
                            process.join()
                time.sleep(0.02)
            process.join()
            if is_last:
                break
            with JobStore(directory) as store:
                known = {job.key for job in store.jobs()}
                assert known >= set(accepted.values())
                unfinished_at_kills.append(len(waiting) + len(store.unfinished()))
    assert process.exitcode == 0
    assert min(unfinished_at_kills) > 0
    assert len(accepted) == 5

    logged = Counter()
    for line in (tmp_path / "disturbed.log").read_text().splitlines():
        if turn := re.fullmatch(r"Job (\w+): certified images (\[.*\])\.", line):
            logged.update((turn[1], idx) for idx in ast.literal_eval(turn[2]))
    assert set(logged.values()) == {1}

    expected = undisturbed(tmp_path / "undisturbed")
    with JobStore(directory) as store:
        for name, key in accepted.items():
            job = store.get(key)
            assert (job.state, job.images_done) == (JobState.DONE, 60)
            assert rows_of(store, key) == expected[name]
        num_rows = sum(len(store.rows(key)) for key in accepted.values())
        # A kill can fall between a commit and its line in the log.
        assert num_rows - sum(logged.values()) <= 60 * KILLS
        assert num_rows == 5 * 60


def undisturbed(directory):
    """Return the rows of a service that nothing happens to."""
    datasets = Datasets()
    info = datasets.test_set("digits").info
    with JobStore(directory) as store:
        engine = Engine(store, datasets, torch.device("cpu"))
        keys = {}
        for name, terms, submission, state in models():
            job = Job(
                SPEC, terms, state_sha256(state), info.fingerprint, info.class_names, "cpu", 60
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
