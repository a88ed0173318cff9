"""`fedsmooth certifier` as a process: it says where it listens, drains on SIGTERM, and comes back."""

import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request

import pytest
import torch

from fedsmooth_core.certification.procedure import Procedure
from fedsmooth_core.errors import ServiceUnreachableError
from fedsmooth_core.models import ModelSpec, build_model
from server.certification.client import CertificationClient, Connection
from server.certification.jobs import JobState, JobTerms, Submission

pytestmark = pytest.mark.slow

SPEC = ModelSpec("small_cnn", "he", 10, 1, 8, 8)
COMMAND = [
    *(sys.executable, "-c", "from server.cli import main; main()", "certifier"),
    *("--insecure", "--listen", "127.0.0.1:0", "--directory"),
]


class Process:
    """A service on free ports, and everything that it has said."""

    def __init__(self, directory):
        self.process = subprocess.Popen(
            [*COMMAND, directory, "--http", "127.0.0.1:0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        )
        self.said = [self.process.stdout.readline() for _ in range(2)]
        # Else it would stand still once the pipe is full.
        self._reader = threading.Thread(
            target=lambda: self.said.extend(self.process.stdout), daemon=True
        )
        self._reader.start()
        self.address = re.search(r"127\.0\.0\.1:\d+", self.said[0])[0]
        self.page = re.search(r"http://\S+", self.said[1])[0]

    def client(self):
        return CertificationClient(Connection(self.address, insecure=True))

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        status = self.process.wait(30)
        self._reader.join()
        return status


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSMOOTH_CACHE", str(tmp_path / "decoded"))
    running = []

    def start():
        running.append(Process(tmp_path / "service"))
        return running[-1]

    yield start
    for one in running:
        one.process.kill()
        one.process.wait()


def test_a_drained_service_ends_well_and_the_next_one_goes_on(start, tmp_path):
    service = start()
    model = build_model(SPEC, [0.3], [0.4], torch.Generator().manual_seed(0)).state_dict()
    terms = JobTerms("digits", Procedure(n=500), num_images=12)
    # An image of this one takes longer than the grace that a turn is given.
    huge = JobTerms("digits", Procedure(n=1_000_000), num_images=2)
    with service.client() as client:
        key = client.submit(SPEC, terms, model, Submission("run", 1)).key
        other = client.submit(SPEC, huge, model, Submission("other", 1)).key
        watched = client.watch(key)
        while not next(watched).new_rows:
            pass
        assert urllib.request.urlopen(f"{service.page}/health").read() == b"ok\n"
        stopped = threading.Thread(target=lambda: statuses.append(service.stop()))
        statuses = []
        stopped.start()
        with pytest.raises(ServiceUnreachableError):
            for _ in watched:
                pass
        stopped.join()
    assert statuses == [0]
    text = "".join(service.said)
    assert (
        ": a small_cnn of round 1 of run for 12 images of digits at sigma 0.25, from anybody at"
        in text
    )
    assert "The service ends." in text
    assert "Traceback" not in text
    service = start()
    second = subprocess.run(
        [*COMMAND, tmp_path / "service"], capture_output=True, text=True, check=False
    )
    assert second.returncode == 2
    assert re.fullmatch(
        r"Error: .* is in use by another certification service: .*\n", second.stderr
    )
    with service.client() as client:
        client.cancel(other)
        *_, last = client.watch(key)
        assert last.job.state is JobState.DONE
        rows, _ = client.fetch(key)
    assert len(rows) == 12
    assert service.stop(signal.SIGINT) == 0
