"""The real `flwr run` in Flower's Simulation Runtime does what `fedsmooth simulate` does."""

import importlib.util

import pytest
from flower_processes import (
    assert_same_certified_on_devices,
    assert_same_training,
    flower_environment,
    flwr_run,
    free_port,
    needs_proc,
    simulate_in_process,
    stop_processes_of,
)

from fedsmooth_core.certification.rows import read_rows

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
    "device_certification.every=2",
    "device_certification.n=200",
]

pytestmark = [
    pytest.mark.slow,
    needs_proc,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None,
        reason="Ray is not installed: pip install '.[simulation]' to run Flower's simulation",
    ),
]


@pytest.fixture
def flower(tmp_path_factory):
    """Flower's environment; what it started is stopped at the end, also when the test fails."""
    folder = tmp_path_factory.mktemp("flower")
    environment = flower_environment(folder, 'address = ":local:"')
    try:
        yield environment | {"FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port())}
    finally:
        left = stop_processes_of(folder)
    assert left == []


@pytest.mark.timeout(500)
def test_flowers_simulation_runtime_and_ours_do_the_same(flower, tmp_path):
    flowers, ours = tmp_path / "flowers", tmp_path / "ours"
    log = tmp_path / "flwr.log"
    resources = "num-supernodes=4 client-resources-num-cpus=1 init-args-num-cpus=2"
    flwr_run(flower, [*OVERRIDES, f"run_dir={flowers}"], log, "--federation-config", resources)
    rows = list(flowers.glob("certification/round-*/rows.tsv"))
    assert len(rows) == 1, log.read_text()[-4000:]

    simulate_in_process(OVERRIDES, ours)
    assert_same_training(flowers, ours, ROUNDS)
    assert_same_certified_on_devices(flowers, ours, num_examples=2 * 10)
    assert read_rows(rows[0]).idx.tolist() == [0, 71, 142, 213, 284]
    assert (flowers / "curve.png").is_file()
