"""The real `flwr run` in Flower's Simulation Runtime does what `fedsmooth simulate` does.

Flower starts a local SuperLink that detaches and stays up, and Ray starts daemons of its own. All of
them inherit this test's environment, where FLWR_HOME is a folder of this test alone: that is how they
are found again in /proc, and they are stopped by their process ids, also when the test fails.
"""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fedsmooth_core.certification.rows import read_rows
from fedsmooth_core.checkpoint import load_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
ROUNDS = 2
OVERRIDES = [
    "seed=4",
    "runtime.device=cpu",
    "runtime.threads=1",
    "partition.num_clients=4",
    "partition.samples_per_client=100",
    f"federation.num_rounds={ROUNDS}",
    "training.local_steps=5",
    "training.learning_rate=0.1",
    "evaluation.every=1",
    "certification.n=200",
    "certification.num_images=5",
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None,
        reason="Ray is not installed: pip install '.[simulation]' to run Flower's simulation",
    ),
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc"),
]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def processes_of(home):
    """Return the ids of the processes whose environment has this FLWR_HOME."""
    mark = f"FLWR_HOME={home}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):  # gone by now, or somebody else's
            continue
        if mark in environment and state != "Z":
            found.append(int(folder.name))
    return found


def stop_processes_of(home):
    """Terminate them, kill what stays, and return what neither could end."""
    for kind, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        end = time.monotonic() + patience
        while (left := processes_of(home)) and time.monotonic() < end:
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, kind)
            time.sleep(0.2)
    return processes_of(home)


@pytest.fixture
def flower(tmp_path_factory):
    """The environment of one Flower installation of its own, cleared of processes at the end."""
    home = tmp_path_factory.mktemp("flwr-home")
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = ":local:"\n'
    )
    environment = os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        # The commands of this environment, for what Flower starts by name.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    try:
        yield environment
    finally:
        left = stop_processes_of(home)
    assert left == []


def simulate_with_flower(environment, run_dir, log):
    overrides = " ".join([*OVERRIDES, f"run_dir={run_dir}"])
    command = [
        str(Path(sys.executable).parent / "flwr"),
        "run",
        str(REPOSITORY),
        "local",
        "--federation-config",
        "num-supernodes=4 client-resources-num-cpus=1 init-args-num-cpus=2",
        "--run-config",
        f'overrides="{overrides}"',
        "--stream",
    ]
    with log.open("w") as out:
        subprocess.run(
            command, env=environment, stdout=out, stderr=subprocess.STDOUT, timeout=240, check=True
        )


def simulate_in_process(run_dir):
    command = [sys.executable, "-c", "from server.cli import main; main()", "simulate"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, *OVERRIDES, f"run_dir={run_dir}"],
        env=environment,
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        check=True,
    )


def rounds(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.timeout(500)
def test_flowers_simulation_runtime_and_ours_do_the_same(flower, tmp_path):
    flowers, ours = tmp_path / "flowers", tmp_path / "ours"
    log = tmp_path / "flwr.log"
    simulate_with_flower(flower, flowers, log)
    rows = list(flowers.glob("certification/round-*/rows.tsv"))
    assert len(rows) == 1, log.read_text()[-4000:]  # `flwr run` ends with 0 whatever happened
    simulate_in_process(ours)

    assert len(rounds(flowers)) == len(rounds(ours)) == ROUNDS
    for there, here in zip(rounds(flowers), rounds(ours), strict=True):
        assert there["round"] == here["round"]
        assert there["cohort"] == here["cohort"]
        assert there["refused"] == here["refused"] == []
        assert there["num_examples"] == here["num_examples"] == 200
        loss = here["metrics"]["train-loss"]
        assert there["metrics"]["train-loss"] == pytest.approx(loss, rel=1e-4)
        assert there["update_norm"] == pytest.approx(here["update_norm"], rel=1e-4)
    name = f"checkpoints/round-{ROUNDS:04d}.safetensors"
    theirs, mine = (load_checkpoint(run / name).state for run in (flowers, ours))
    torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-6)
    assert read_rows(rows[0]).idx.tolist() == [0, 71, 142, 213, 284]
    assert (flowers / "curve.png").is_file()
