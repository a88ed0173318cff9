"""Real Flower processes of one test: how they are started, found again, stopped, and compared with.

Flower detaches some of its processes and Ray starts daemons. All of them inherit the test's environment,
where a variable holds a folder of this test alone: that is how they are found in /proc.
"""

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from flwr.clientapp import ClientApp
from rich.console import Console

import client.app
from fedsmooth_core.checkpoint import load_checkpoint
from server.certificates import ensure_certificates
from server.configuration import compose
from server.federation import run_federation
from server.simulation import InProcessGrid, quiet_flower

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


def processes_of(folder, homes=None, word=""):
    """Return the ids of the processes whose environment names this folder.

    Only those with one of these homes, if given, and of those only the ones with a word in their command.
    """
    mark = f"{_MARK}={folder}".encode()
    wanted = None if homes is None else {f"FLWR_HOME={home}".encode() for home in homes}
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
            command = (process / "cmdline").read_text()
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):  # gone by now, or somebody else's
            continue
        is_at_home = wanted is None or not wanted.isdisjoint(environment)
        if mark in environment and is_at_home and word in command and state != "Z":
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
    """A SuperLink on a loopback port, and devices that join it.

    Args:
        folder: of this deployment alone.
        secure: with TLS and enrolled device keys; else with neither.
    """

    def __init__(self, folder, secure=False):
        self.folder = folder
        self.secure = secure
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.authority = folder / "tls" / "ca.crt"
        trust = f'root-certificates = "{self.authority}"' if secure else "insecure = true"
        self.environment = flower_environment(folder, f'address = "{self.address}"\n{trust}')
        if secure:
            ensure_certificates(folder / "tls", ["127.0.0.1"])
        self.superlink = self.start_superlink()

    def start_superlink(self):
        """Start the SuperLink, or start it anew with the same database, and wait until it answers."""
        options = [f"--host=127.0.0.1 --port={self.port} --database={self.folder / 'state.db'}"]
        if self.secure:
            tls = self.folder / "tls"
            options += [f"--ssl-ca-certfile={tls / 'ca.crt'} --ssl-certfile={tls / 'server.crt'}"]
            options += [f"--ssl-keyfile={tls / 'server.key'} --enable-supernode-auth"]
        else:
            options += ["--insecure"]
        options += ["--disable-runtime-dependency-installation"]
        self.superlink = self.start("superlink", "flower-superlink", *" ".join(options).split())
        wait_for(self._answers, 60, self.log("superlink"))
        return self.superlink

    def join(self, name, node_config="", credentials=None):
        """Start Flower's own SuperNode."""
        options = ["--host", "127.0.0.1", "--port", str(free_port())]
        # It reads the same names as `fedsmooth join`, but for these two.
        other = {"--server": "--superlink", "--key": "--auth-supernode-private-key"}
        options += [other.get(word, word) for word in self._membership(name, credentials)]
        facts = ["--node-config", node_config] if node_config else []
        return self.start(name, "flower-supernode", *options, *facts)

    def join_warm(self, name, node_config="", credentials=None):
        """Start `fedsmooth join`."""
        options = self._membership(name, credentials)
        facts = ["--node-config", node_config] if node_config else []
        return self.start(name, "fedsmooth", "join", *options, *facts)

    def _membership(self, name, credentials):
        if credentials is None:
            credentials = ["--insecure"]
            if self.secure:
                key = self.folder / "keys" / name
                credentials = ["--root-certificates", self.authority, "--key", key]
        return ["--server", self.address, *map(str, credentials)]

    def fedsmooth(self, *words, succeeds=True):
        """Run a command of the server's operator to its end; return what it printed."""
        done = subprocess.run(
            [str(BIN / "fedsmooth"), *map(str, words)],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert (done.returncode == 0) == succeeds, done.stdout + done.stderr
        return done.stdout + done.stderr

    def start(self, name, command, *arguments):
        """Start a process with a home of its own; its output is added to NAME.log."""
        home = self.folder / name
        home.mkdir(exist_ok=True)
        with self.log(name).open("a") as log:
            return subprocess.Popen(
                [str(BIN / command), *arguments],
                env=self.environment | {"FLWR_HOME": str(home)},
                cwd=home,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def kill(self, *names, word=""):
        """Send SIGKILL to these members' processes (with a word in their command); see them gone."""
        homes = {self.folder / name for name in names}
        left = processes_of(self.folder, homes, word)
        assert left, f"no process of {names} is left to kill"
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        wait_for(lambda: not set(left) & set(processes_of(self.folder)), 30)

    def log(self, name):
        return self.folder / f"{name}.log"

    def says(self, name, text):
        """Whether a member has printed this."""
        return self.log(name).exists() and text in self.log(name).read_text()

    def _answers(self):
        scheme = "https" if self.secure else "http"
        trust = ssl.create_default_context(cafile=self.authority) if self.secure else None
        try:
            url = f"{scheme}://{self.address}/health"
            with urllib.request.urlopen(url, timeout=2, context=trust):
                return True
        except OSError:
            return False


@contextlib.contextmanager
def running_deployment(folder, secure=False):
    """Start a SuperLink; at the end stop it and all that joined it."""
    try:
        yield Deployment(folder, secure)
    finally:
        left = stop_processes_of(folder)
    assert left == []


def wait_for(condition, seconds, log=None):
    """Return what ``condition`` returns, once that is true; show the end of a log if it never is."""
    end = time.monotonic() + seconds
    while not (result := condition()):
        said = log.read_text()[-3000:] if log and log.exists() else condition
        assert time.monotonic() < end, f"after {seconds} s not: {said}"
        time.sleep(0.1)
    return result


def flwr_start(environment, overrides, log, *options, app=REPOSITORY):
    """Submit the app; the process returned shows its log and ends with the run, always with status 0."""
    # In a file, for Flower's own reading of the command line knows no quotes within quotes.
    settings = log.with_suffix(".toml")
    settings.write_text(f"overrides = {json.dumps(' '.join(overrides))}\n")
    command = [BIN / "flwr", "run", app, "test", *options, "--run-config", settings, "--stream"]
    with log.open("w") as out:
        return subprocess.Popen(
            [*map(str, command)], env=environment, stdout=out, stderr=subprocess.STDOUT
        )


def flwr_run(environment, overrides, log, *options, app=REPOSITORY):
    """Submit the app and wait for its end; `flwr run` exits with 0 whatever happened to it."""
    process = flwr_start(environment, overrides, log, *options, app=app)
    assert process.wait(300) == 0, log.read_text()[-3000:]


def simulate_in_process(overrides, run_dir):
    command = [sys.executable, "-c", "from server.cli import main; main()", "simulate"]
    subprocess.run(
        [*command, *overrides, f"run_dir={run_dir}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        check=True,
    )


def simulate_the_good(overrides, run_dir, answers):
    """Train in this process, where only those clients answer that ``answers`` (by round) names."""
    app = ClientApp()
    app.query()(client.app.describe)

    @app.train()
    def train(message, context):
        server_round = message.content["config"]["server-round"]
        if context.node_config["partition-id"] not in answers[server_round]:
            raise RuntimeError("not one of the good")
        return client.app.train(message, context)

    # Here all others are refused, and nobody is left out for that.
    config = compose([*overrides, f"run_dir={run_dir}", "federation.strikes=1000000"])
    grid = InProcessGrid(config.partition.num_clients, client_app=app)
    quiet_flower()
    run_federation(config, grid, Console(quiet=True), [])


def rounds(run_dir):
    """The run's recorded rounds so far; a last line that is being written is not one yet."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def assert_same_weights(run_dir, other, num_rounds, **tolerance):
    """The models after the last round are equal, to float tolerance unless another is given."""
    name = f"checkpoints/round-{num_rounds:04d}.safetensors"
    theirs, mine = (load_checkpoint(run / name).state for run in (run_dir, other))
    torch.testing.assert_close(theirs, mine, **({"rtol": 1e-4, "atol": 1e-6} | tolerance))


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
    assert_same_weights(run_dir, other, num_rounds)


def assert_same_certified_on_devices(run_dir, other, num_examples):
    """Clients of both runs counted the same of their own images, all of them held out."""
    key = "federated_certified_accuracy"
    theirs, mine = ([line.get(key) for line in rounds(run)] for run in (run_dir, other))
    assert theirs == mine
    assert theirs[-1]["num_examples"] == theirs[-1]["num_held_out"] == num_examples
    assert theirs[-1]["accuracy"] is not None
