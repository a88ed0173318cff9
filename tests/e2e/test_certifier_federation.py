"""A federation that trains while its certification service is down, and ends with every certificate."""

import json
import os
import signal
import subprocess

import pytest
from flower_processes import BIN, free_port, rounds, wait_for
from rich.console import Console

from fedsmooth_core.certification.rows import read_parameters, read_rows
from server.certify import certify_checkpoint
from server.configuration import load
from server.run_directory import RunDirectory

pytestmark = pytest.mark.slow

ROUNDS = 6
SETTINGS = [
    "runtime.device=cpu",
    "runtime.threads=1",
    "partition.num_clients=4",
    "partition.samples_per_client=60",
    f"federation.num_rounds={ROUNDS}",
    "training.local_steps=4",
    "training.batch_size=16",
    "evaluation.every=0",
    "certification.n0=20",
    "certification.n=500",
    "certification.num_images=6",
    "certification.every=1",
    "service.patience_seconds=300",
]


class Processes:
    """A certification service on one port, and a federation that knows it; both may be killed."""

    def __init__(self, folder):
        self.folder, self.run = folder, RunDirectory(folder / "run")
        self.address = f"127.0.0.1:{free_port()}"
        self.connection = ["--service", self.address, "--token-file", str(folder / "token")]
        self.connection += ["--root-certificates", str(folder / "tls/ca.crt")]
        self.started = []
        self.fedsmooth("certificates", folder / "tls")
        token = self.fedsmooth("token", "federation", "--tokens", folder / "tokens")
        (folder / "token").write_text(token)

    def fedsmooth(self, *words):
        done = subprocess.run(
            [str(BIN / "fedsmooth"), *map(str, words)],
            env=self._environment(),
            stdout=subprocess.PIPE,
            text=True,
            timeout=300,
            check=True,
        )
        return done.stdout

    def start(self, name, *words):
        with (self.folder / f"{name}.log").open("a") as log:
            process = subprocess.Popen(
                [str(BIN / "fedsmooth"), *map(str, words)],
                env=self._environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.started.append(process)
        return process

    def start_service(self):
        tls = self.folder / "tls"
        options = ["--certificate", tls / "server.crt", "--key", tls / "server.key"]
        options += ["--tokens", self.folder / "tokens", "--device", "cpu", "--threads", "1"]
        directory = self.folder / "service"
        return self.start(
            "service", "certifier", "--directory", directory, "--listen", self.address, *options
        )

    def train(self, *settings):
        service = [f"service.address={self.address}", f"service.token_file={self.folder / 'token'}"]
        service += [f"service.root_certificates={self.folder / 'tls/ca.crt'}"]
        return self.start(
            "federation", "simulate", *SETTINGS, *service, f"run_dir={self.run.path}", *settings
        )

    def log(self, name):
        return (self.folder / f"{name}.log").read_text()

    def status(self):
        return json.loads(self.fedsmooth("status", self.run.path, "--json"))

    def num_certified(self):
        return len(list(self.run.path.glob("certification/round-*/summary.json")))

    def stop(self):
        for process in self.started:
            process.kill()
            process.wait()

    def _environment(self):
        return os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def processes(tmp_path):
    processes = Processes(tmp_path)
    try:
        yield processes
    finally:
        processes.stop()


def test_a_service_that_is_down_delays_no_round_and_is_owed_nothing_in_the_end(processes):
    federation = processes.train()
    # It trains to its end, with nobody there; then its end waits.
    wait_for(lambda: "Waiting for certificates" in processes.log("federation"), 120)
    assert [line["round"] for line in rounds(processes.run.path)] == list(range(1, ROUNDS + 1))
    assert federation.poll() is None
    assert processes.num_certified() == 0
    status = processes.status()
    assert status["state"] == "running"
    assert status["owed"] == list(range(ROUNDS, 0, -1))
    assert processes.address in status["delivery"]["problem"]
    assert "is not available" in processes.fedsmooth("status", processes.run.path)

    # The service comes, and is killed as soon as the first certificates have come from it.
    service = processes.start_service()
    wait_for(lambda: processes.num_certified() > 0, 120)
    service.send_signal(signal.SIGKILL)
    service.wait()
    # The federation is killed, too; the run is continued by the command that collects.
    federation.kill()
    federation.wait()
    processes.start_service()
    said = processes.fedsmooth("certify", processes.run.path)
    assert "Certified accuracy (%)" in said
    status = processes.status()
    assert (status["state"], status["owed"]) == ("finished", [])
    assert status["delivery"]["problem"] is None
    the_certificates_are_those_of_this_machine(processes)
    listed = processes.fedsmooth("jobs", *processes.connection)
    assert listed.count("done") == ROUNDS


def the_certificates_are_those_of_this_machine(processes):
    config = load(processes.run.path)
    for number in range(1, ROUNDS + 1):
        here = processes.folder / f"here-{number}"
        certify_checkpoint(processes.run.checkpoint(number), config, here, Console(quiet=True))
        there = processes.run.certification(number)
        ours, theirs = read_rows(here / "rows.tsv"), read_rows(there / "rows.tsv")
        for column in ("idx", "label", "predict", "radius", "correct"):
            assert getattr(ours, column).tolist() == getattr(theirs, column).tolist()
        assert read_parameters(here / "rows.tsv") == read_parameters(there / "rows.tsv")
        assert (here / "summary.json").read_text() == (there / "summary.json").read_text()
