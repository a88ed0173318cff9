"""A federation over TLS whose devices are enrolled: who does not belong is refused, the others train."""

import pytest
from flower_processes import (
    assert_same_training,
    assert_same_weights,
    flwr_run,
    flwr_start,
    needs_proc,
    rounds,
    running_deployment,
    simulate_in_process,
    simulate_the_good,
    wait_for,
)

from fedsmooth_core.keys import make_key
from server.certificates import ensure_certificates

DEVICES = 3
OVERRIDES = [
    "seed=6",
    "runtime.device=cpu",
    "runtime.threads=1",
    f"partition.num_clients={DEVICES}",
    "partition.samples_per_client=100",
    "federation.cohort_fraction=1.0",
    "federation.connect_timeout_seconds=120",
    "training.local_steps=5",
    "training.learning_rate=0.1",
    "certification.at_end=false",
]

pytestmark = [pytest.mark.slow, needs_proc, pytest.mark.timeout(500)]


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """Three enrolled devices; the first is a SuperNode alone, the others have a warm worker."""
    with running_deployment(tmp_path_factory.mktemp("secure"), secure=True) as deployment:
        for number in range(DEVICES):
            name = f"device{number}"
            deployment.fedsmooth("enroll", name, "-o", deployment.folder / "keys")
            join = deployment.join_warm if number else deployment.join
            join(name, f"partition-id={number} num-partitions={DEVICES}")
        yield deployment


def strange_key(federation):
    return make_key(federation.folder / "strangers", "stranger")


def other_authority(federation):
    ensure_certificates(federation.folder / "other", [])
    return federation.folder / "other" / "ca.crt"


def credentials_of(federation, kind):
    """What a stranger comes with; everything but what ``kind`` names is as it should be."""
    trust = ["--root-certificates", federation.authority]
    match kind:
        case "wrong CA":
            wrong = ["--root-certificates", other_authority(federation)]
            return [*wrong, "--key", federation.folder / "keys" / "device0"]
        case "unregistered key":
            return [*trust, "--key", strange_key(federation)]
        case "no key":
            return trust
    raise AssertionError(kind)


REFUSALS = {
    "wrong CA": ("SSL/TLS handshake error", "is not signed by"),
    "unregistered key": ("[code: 2004]", "cut off within the last minute"),
    "no key": ("[code: 2001]", "give this device's key with --key FILE"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_stranger_is_refused_with_a_reason(federation, kind):
    plain, warm = f"plain {kind}", f"warm {kind}"
    credentials = credentials_of(federation, kind)
    supernode = federation.join(plain, credentials=credentials)
    device = federation.join_warm(warm, credentials=credentials)
    flowers, ours = REFUSALS[kind]
    assert supernode.wait(100) == 1
    assert flowers in federation.log(plain).read_text()
    assert "Exit Code: 305" in federation.log(plain).read_text()
    wait_for(lambda: federation.says(warm, ours), 100, federation.log(warm))
    if kind != "unregistered key":  # which might be of a device that was cut off, so it tries on
        assert device.wait(100) == 2


def test_a_device_without_tls_never_gets_in(federation):
    federation.join("plain-text", credentials=["--insecure"])
    federation.join_warm("warm plain-text", credentials=["--insecure"])
    said = "It may speak TLS, which --insecure does not."
    wait_for(lambda: federation.says("warm plain-text", said), 100)
    wait_for(lambda: federation.says("plain-text", "Connection attempt failed"), 100)
    assert "SuperNode ID" not in federation.log("plain-text").read_text()
    federation.kill("plain-text", "warm plain-text")


def test_enrolled_devices_train_over_tls_what_the_simulation_trains(federation, tmp_path):
    overrides = [*OVERRIDES, "federation.num_rounds=2"]
    run_dir, log = tmp_path / "deployed", tmp_path / "flwr.log"
    flwr_run(federation.environment, [*overrides, f"run_dir={run_dir}"], log)
    assert rounds(run_dir), log.read_text()[-3000:]
    assert {line["num_connected"] for line in rounds(run_dir)} == {DEVICES}
    simulate_in_process(overrides, tmp_path / "simulated")
    assert_same_training(run_dir, tmp_path / "simulated", 2)


def test_a_revoked_device_is_out_and_the_others_go_on(federation, tmp_path):
    revoked = DEVICES - 1
    key = federation.folder / "keys" / f"device{revoked}"
    settings = ["federation.num_rounds=4", "federation.quorum=0.3", "training.local_steps=50"]
    overrides = [*OVERRIDES, *settings, "federation.deadline_seconds=60"]
    run_dir, log = tmp_path / "deployed", tmp_path / "flwr.log"
    run = flwr_start(federation.environment, [*overrides, f"run_dir={run_dir}"], log)
    wait_for(lambda: rounds(run_dir), 150, log)
    federation.fedsmooth("revoke", f"device{revoked}")
    assert run.wait(300) == 0

    lines = rounds(run_dir)
    assert [line["round"] for line in lines] == [1, 2, 3, 4], log.read_text()[-3000:]
    assert lines[0]["aggregated"] == [0, 1, 2]
    assert lines[-1]["aggregated"] == [0, 1]
    assert lines[-1]["num_connected"] == 2
    good = {line["round"]: line["aggregated"] for line in lines}
    simulate_the_good(overrides, tmp_path / "simulated", good)
    assert_same_weights(run_dir, tmp_path / "simulated", 4)

    # Its user reads why, and the key is of no use any more.
    wait_for(lambda: federation.says(f"device{revoked}", "dismissed this device"), 100)
    again = ["--root-certificates", federation.authority, "--key", key]
    assert federation.join("again", credentials=again).wait(100) == 1
    assert "[code: 2004]" in federation.log("again").read_text()
    public = key.with_suffix(".pub")
    said = federation.fedsmooth("enroll", "anew", "--public-key", public, succeeds=False)
    assert "was revoked, and Flower never takes a key twice" in " ".join(said.split())
