"""Devices that join with `fedsmooth join`: a SuperNode and a warm worker each, as real processes."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from flower_processes import (
    assert_same_certified_on_devices,
    assert_same_training,
    flwr_run,
    needs_proc,
    processes_of,
    rounds,
    running_deployment,
    simulate_in_process,
)

DEVICES = 2
OVERRIDES = [
    "seed=5",
    "runtime.device=cpu",
    "runtime.threads=1",
    f"partition.num_clients={DEVICES}",
    "partition.samples_per_client=100",
    "federation.cohort_fraction=1.0",
    "federation.connect_timeout_seconds=120",
    "training.learning_rate=0.1",
    "certification.n=200",
    "certification.num_images=5",
]

pytestmark = [pytest.mark.slow, needs_proc, pytest.mark.timeout(500)]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    """One SuperLink for all tests here; the first two share their devices, the others have their own."""
    with running_deployment(tmp_path_factory.mktemp("join")) as running:
        yield running


@pytest.fixture(scope="module")
def devices(deployment):
    return [
        deployment.join_warm(f"device{number}", f"partition-id={number} num-partitions={DEVICES}")
        for number in range(DEVICES)
    ]


def children_of(process):
    path = Path(f"/proc/{process}/task/{process}/children")
    try:
        return [int(word) for word in path.read_text().split()]
    except OSError:
        return []


def seconds_computed(process):
    """Of the CPU; 0 for a process that is gone."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def worker_of(join):
    """The child of a `fedsmooth join` that is no SuperNode."""
    for child in children_of(join.pid):
        if b"client.worker" in Path(f"/proc/{child}/cmdline").read_bytes():
            return child
    return None


def test_a_message_killed_midway_is_one_refusal_and_its_device_goes_on(
    deployment, devices, tmp_path
):
    run_dir = tmp_path / "run"
    killed = []

    def kill_one_in_the_second_round():
        while not killed:
            time.sleep(0.02)
            if not (run_dir / "metrics.jsonl").exists() or not rounds(run_dir):
                continue
            for answering in children_of(worker_of(devices[0])):
                if seconds_computed(answering) > 1.0:  # into the training
                    os.kill(answering, signal.SIGKILL)
                    killed.append(answering)

    threading.Thread(target=kill_one_in_the_second_round, daemon=True).start()
    overrides = [*OVERRIDES, "federation.num_rounds=3", "training.local_steps=250"]
    flwr_run(deployment.environment, [*overrides, f"run_dir={run_dir}"], tmp_path / "flwr.log")

    assert len(killed) == 1
    lines = rounds(run_dir)
    assert len(lines) == 3, (tmp_path / "flwr.log").read_text()[-3000:]
    refused = [refusal for line in lines for refusal in line["refused"]]
    assert [refusal["client"] for refusal in refused] == [0]
    assert "ended by SIGKILL" in refused[0]["reason"]
    assert lines[2]["refused"] == []
    assert [device.poll() for device in devices] == [None, None]


def test_devices_with_warm_workers_train_the_same_model_and_leave_when_asked(
    deployment, devices, tmp_path
):
    overrides = [*OVERRIDES, "federation.num_rounds=2", "training.local_steps=5"]
    overrides += ["device_certification.every=1", "device_certification.n=200"]
    run_dir = tmp_path / "deployed"
    flwr_run(deployment.environment, [*overrides, f"run_dir={run_dir}"], tmp_path / "flwr.log")
    assert list(run_dir.glob("certification/round-*/rows.tsv"))
    simulate_in_process(overrides, tmp_path / "simulated")
    assert_same_training(run_dir, tmp_path / "simulated", 2)
    assert_same_certified_on_devices(run_dir, tmp_path / "simulated", num_examples=2 * 10)

    for device in devices:
        device.send_signal(signal.SIGTERM)
    assert [device.wait(30) for device in devices] == [0, 0]
    output = deployment.log("device0").read_text()
    assert "Traceback" not in output
    workers = [
        process
        for process in processes_of(deployment.folder)
        if b"client.worker" in Path(f"/proc/{process}/cmdline").read_bytes()
    ]
    assert workers == []


def test_a_device_whose_worker_dies_leaves_as_a_whole(deployment):
    device = deployment.join_warm("alone")
    end = time.monotonic() + 60
    while (worker := worker_of(device)) is None:
        assert time.monotonic() < end
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    assert device.wait(30) == 2
    assert "worker ended (exit code -9)" in deployment.log("alone").read_text()


def test_nothing_of_a_device_outlives_a_join_that_is_killed(deployment):
    device = deployment.join_warm("alone")
    end = time.monotonic() + 60
    while worker_of(device) is None:
        assert time.monotonic() < end
        time.sleep(0.1)
    time.sleep(5)  # until the worker is loaded and looks around
    left = children_of(device.pid)
    assert len(left) == 2
    device.kill()
    device.wait()
    end = time.monotonic() + 30
    while any(process in processes_of(deployment.folder) for process in left):
        assert time.monotonic() < end
        time.sleep(0.2)
