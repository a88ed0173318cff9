"""Real Flower processes of one test: how they are started, found again, stopped, and compared with.

Flower detaches some of its processes and Ray starts daemons. All of them inherit the test's environment,
where a variable holds a folder of this test alone: that is how they are found in /proc.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from fedsmooth_core.checkpoint import load_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
_MARK = "FEDSMOOTH_TEST_FOLDER"

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="needs Linux's /proc to find its processes"
)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def flower_environment(folder, connection):
    """The environment of one Flower installation: its home is ``folder``/home, with one connection."""
    home = folder / "home"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "test"\n\n[superlink.test]\n{connection}\n'
    )
    return os.environ | {
        _MARK: str(folder),
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        # The commands of this environment, for what Flower starts by name.
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }


def processes_of(folder):
    """Return the ids of the processes whose environment names this folder."""
    mark = f"{_MARK}={folder}".encode()
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):  # gone by now, or somebody else's
            continue
        if mark in environment and state != "Z":
            found.append(int(process.name))
    return found


def stop_processes_of(folder):
    """Terminate them, kill what stays, and return what neither could end."""
    for kind, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        end = time.monotonic() + patience
        while (left := processes_of(folder)) and time.monotonic() < end:
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, kind)
            time.sleep(0.2)
    return processes_of(folder)


class Deployment:
    """A SuperLink on a loopback port, and devices that join it."""

    def __init__(self, folder):
        self.folder = folder
        self.port = free_port()
        self.environment = flower_environment(
            folder, f'address = "127.0.0.1:{self.port}"\ninsecure = true'
        )
        options = f"--insecure --host=127.0.0.1 --port={self.port}".split()
        self.start(
            "superlink", "flower-superlink", *options, "--disable-runtime-dependency-installation"
        )
        self._wait()

    def join(self, name, node_config):
        """Start Flower's own SuperNode."""
        address = ["--superlink", f"127.0.0.1:{self.port}", "--host", "127.0.0.1"]
        own_port = ["--port", str(free_port())]
        facts = ["--node-config", node_config]
        return self.start(name, "flower-supernode", "--insecure", *address, *own_port, *facts)

    def join_warm(self, name, node_config):
        """Start `fedsmooth join`."""
        address = ["--server", f"127.0.0.1:{self.port}", "--insecure"]
        return self.start(name, "fedsmooth", "join", *address, "--node-config", node_config)

    def start(self, name, command, *arguments):
        """Start a process with a home of its own; its output goes to NAME.log."""
        home = self.folder / name
        home.mkdir()
        with self.log(name).open("w") as log:
            return subprocess.Popen(
                [str(BIN / command), *arguments],
                env=self.environment | {"FLWR_HOME": str(home)},
                cwd=home,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def log(self, name):
        return self.folder / f"{name}.log"

    def _wait(self):
        end = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2):
                    return
            except OSError:
                assert time.monotonic() < end, self.log("superlink").read_text()
                time.sleep(0.3)


def flwr_run(environment, overrides, log, *options):
    """Submit the app and wait for its end; `flwr run` exits with 0 whatever happened to it."""
    run_config = f'overrides="{" ".join(overrides)}"'
    command = [BIN / "flwr", "run", REPOSITORY, "test", *options, "--run-config", run_config]
    with log.open("w") as out:
        subprocess.run(
            [*map(str, command), "--stream"],
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            timeout=300,
            check=True,
        )


def simulate_in_process(overrides, run_dir):
    command = [sys.executable, "-c", "from server.cli import main; main()", "simulate"]
    subprocess.run(
        [*command, *overrides, f"run_dir={run_dir}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        check=True,
    )


def rounds(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def assert_same_training(run_dir, other, num_rounds):
    """Same cohorts and sample counts, losses and weights equal to float tolerance."""
    assert len(rounds(run_dir)) == len(rounds(other)) == num_rounds
    for there, here in zip(rounds(run_dir), rounds(other), strict=True):
        for key in ("round", "cohort", "num_examples"):
            assert there[key] == here[key]
        assert there["refused"] == here["refused"] == []
        loss = here["metrics"]["train-loss"]
        assert there["metrics"]["train-loss"] == pytest.approx(loss, rel=1e-4)
        assert there["update_norm"] == pytest.approx(here["update_norm"], rel=1e-4)
    name = f"checkpoints/round-{num_rounds:04d}.safetensors"
    theirs, mine = (load_checkpoint(run / name).state for run in (run_dir, other))
    torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-6)
