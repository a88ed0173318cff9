"""What fails in a federation of real processes, is killed or comes late, and what becomes of the run."""

import json
import re

import pytest
from flower_processes import (
    assert_same_training,
    assert_same_weights,
    flwr_run,
    flwr_start,
    needs_proc,
    processes_of,
    rounds,
    simulate_in_process,
    simulate_the_good,
    wait_for,
)

DEVICES = 3
OVERRIDES = [
    "seed=7",
    "runtime.device=cpu",
    "runtime.threads=1",
    f"partition.num_clients={DEVICES}",
    "partition.samples_per_client=100",
    "federation.connect_timeout_seconds=150",
    "training.learning_rate=0.1",
    "certification.at_end=false",
]

pytestmark = [pytest.mark.slow, needs_proc, pytest.mark.timeout(600)]


# What is said of a device that never answered. Flower notices a heart that does not beat after 30 to 60 s;
# it makes up an error for a message, or a reply, that got lost on the way.
LOST = "no reply came in time|Node Unavailable|Message Unavailable|ended without an answer"


def partition(number, total=DEVICES):
    return f"partition-id={number} num-partitions={total}"


# --------------------------------------------------------------------------------------------------
# Devices

NUM_ROUNDS = 3
ALL_ARE_ASKED = [
    *OVERRIDES,
    "federation.cohort_fraction=1.0",
    "federation.quorum=0.5",
    f"federation.num_rounds={NUM_ROUNDS}",
    "training.local_steps=50",
]


def assert_trained_by_the_good(run_dir, simulated, overrides, log):
    """The run came to its end, and its model is that of the replies that it says it took."""
    lines = rounds(run_dir)
    numbers = list(range(1, len(lines) + 1))
    assert numbers, log.read_text()[-3000:]
    assert [line["round"] for line in lines] == numbers
    simulate_the_good(overrides, simulated, {line["round"]: line["aggregated"] for line in lines})
    assert_same_weights(run_dir, simulated, len(lines))
    return lines


def test_a_round_goes_on_without_a_supernode_that_was_killed(deployment, tmp_path):
    for number in range(2):
        deployment.join_warm(f"device{number}", partition(number))
    deployment.join("device2", partition(2))
    overrides = [*ALL_ARE_ASKED, "federation.deadline_seconds=45"]
    run_dir, log = tmp_path / "deployed", tmp_path / "flwr.log"
    run = flwr_start(deployment.environment, [*overrides, f"run_dir={run_dir}"], log)
    wait_for(lambda: rounds(run_dir), 200, log)
    home = deployment.folder / "device2"
    answering = "flwr-clientapp"
    wait_for(lambda: processes_of(deployment.folder, {home}, answering), 60, log)
    deployment.kill("device2")
    assert run.wait(300) == 0

    lines = assert_trained_by_the_good(run_dir, tmp_path / "simulated", overrides, log)
    assert len(lines) == NUM_ROUNDS
    assert lines[0]["aggregated"] == [0, 1, 2]
    assert lines[-1]["aggregated"] == [0, 1]
    (refused,) = (refusal for line in lines for refusal in line["refused"])
    assert refused["client"] == 2
    # Whichever is first: the deadline, or Flower's notice.
    assert re.search("no reply came in time|Node Unavailable", refused["reason"])


def test_a_device_that_comes_late_takes_part_from_then_on(deployment, tmp_path):
    for number in range(2):
        deployment.join_warm(f"device{number}", partition(number))
    for number in range(2):
        wait_for(lambda n=number: deployment.says(f"device{n}", "SuperNode ID"), 100)
    overrides = [*ALL_ARE_ASKED, "federation.connect_timeout_seconds=20"]
    overrides += ["federation.num_rounds=8"]
    run_dir, log = tmp_path / "deployed", tmp_path / "flwr.log"
    run = flwr_start(deployment.environment, [*overrides, f"run_dir={run_dir}"], log)
    wait_for(lambda: rounds(run_dir), 200, log)
    deployment.join_warm("device2", partition(2))
    assert run.wait(300) == 0

    lines = assert_trained_by_the_good(run_dir, tmp_path / "simulated", overrides, log)
    assert lines[0]["aggregated"] == [0, 1]
    assert lines[-1]["aggregated"] == [0, 1, 2]
    assert [line["refused"] for line in lines] == [[]] * 8


def test_twenty_devices_on_one_machine(deployment, tmp_path):
    """On a busy machine the SuperLink's database may be locked for longer than Flower waits, and a
    SuperNode then drops its message: the round has to end all the same, with those that answer.
    """
    for number in range(20):
        deployment.join_warm(f"device{number}", partition(number, 20))
    overrides = [*ALL_ARE_ASKED, "partition.num_clients=20", "partition.samples_per_client=60"]
    overrides += ["federation.connect_timeout_seconds=180", "training.local_steps=2"]
    overrides += ["federation.quorum=0.8", "federation.attempts=1"]
    overrides += ["federation.deadline_seconds=90", "federation.num_rounds=1"]
    run_dir, log = tmp_path / "deployed", tmp_path / "flwr.log"
    flwr_run(deployment.environment, [*overrides, f"run_dir={run_dir}"], log)
    (line,) = assert_trained_by_the_good(run_dir, tmp_path / "simulated", overrides, log)
    assert len(line["aggregated"]) >= 16, line["refused"]
    # Who did not answer well did not answer at all: no reply was damaged.
    assert all(re.search(LOST, refusal["reason"]) for refusal in line["refused"]), line["refused"]
    silent = [refusal["client"] for refusal in line["refused"]]
    assert sorted([*line["aggregated"], *silent]) == line["cohort"]


# --------------------------------------------------------------------------------------------------
# The server


class Server:
    """A federation that ``fedsmooth deploy`` looks after; its devices are numbered by the server."""

    def __init__(self, deployment, overrides):
        self.deployment, self.overrides = deployment, overrides
        self.devices = [f"device{number}" for number in range(DEVICES)]
        self.join()
        self.deploy()

    def join(self):
        for name in self.devices:
            self.deployment.join_warm(name)

    def deploy(self):
        # The operator's home, where Flower's config.toml is.
        self.train = self.deployment.start("home", "fedsmooth", "deploy", *self.overrides)

    def kill_server_app(self):
        self.deployment.kill("superlink", word="flwr-serverapp")

    def kill_superlink(self):
        """Kill it with the processes that it started, as when its container or service dies."""
        self.deployment.kill("superlink")
        self.deployment.start_superlink()

    def kill_machine(self):
        """Kill all there is at once, and start it as the machine's start-up would."""
        self.deployment.kill("superlink", "home", *self.devices)
        self.deployment.start_superlink()
        self.join()
        self.deploy()


@pytest.mark.parametrize("fault", ["server_app", "superlink", "machine"])
def test_a_killed_server_continues_to_the_same_weights(deployment, tmp_path, fault):
    overrides = [*OVERRIDES, "federation.cohort_fraction=0.67", "federation.num_rounds=6"]
    overrides += ["training.local_steps=20"]
    run_dir, log = tmp_path / "deployed", deployment.log("home")
    server = Server(deployment, [*overrides, f"run_dir={run_dir}"])
    wait_for(lambda: len(rounds(run_dir)) >= 2, 250, log)
    getattr(server, f"kill_{fault}")()
    assert len(rounds(run_dir)) < 6, "killed too late to prove anything"
    assert server.train.wait(400) == 0, log.read_text()[-3000:]

    simulate_in_process(overrides, tmp_path / "simulated")
    assert_same_training(run_dir, tmp_path / "simulated", 6)
    assert_same_weights(run_dir, tmp_path / "simulated", 6, rtol=0, atol=0)
    sessions = (run_dir / "sessions.jsonl").read_text().splitlines()
    resumed = [json.loads(session)["resumed"] for session in sessions]
    assert resumed == [False, True]
