"""A deployment of real processes: a SuperLink, two simulated clients and one device with its own images."""

import json

import numpy as np
import pytest
from flower_processes import (
    assert_same_training,
    flwr_run,
    needs_proc,
    rounds,
    simulate_in_process,
)
from PIL import Image

ROUNDS = 2
OVERRIDES = [
    "seed=5",
    "runtime.device=cpu",
    "runtime.threads=1",
    "partition.num_clients=3",
    "partition.samples_per_client=100",
    "federation.cohort_fraction=1.0",
    f"federation.num_rounds={ROUNDS}",
    "federation.connect_timeout_seconds=120",
    "training.local_steps=5",
    "training.learning_rate=0.1",
    "certification.n=200",
    "certification.num_images=5",
]

pytestmark = [pytest.mark.slow, needs_proc, pytest.mark.timeout(500)]


def finish(deployment, overrides, run_dir, log):
    flwr_run(deployment.environment, [*overrides, f"run_dir={run_dir}"], log)
    rows = list(run_dir.glob("certification/round-*/rows.tsv"))
    logs = [path.read_text()[-1500:] for path in deployment.folder.glob("*.log")]
    assert len(rows) == 1, "\n".join([log.read_text()[-3000:], *logs])


def test_processes_and_the_simulation_train_the_same_model(deployment, tmp_path):
    for partition in range(3):
        deployment.join(f"node{partition}", f"partition-id={partition} num-partitions=3")
    finish(deployment, OVERRIDES, tmp_path / "deployed", tmp_path / "flwr.log")

    simulate_in_process(OVERRIDES, tmp_path / "simulated")
    assert_same_training(tmp_path / "deployed", tmp_path / "simulated", ROUNDS)


def write_images(root, classes, size=8):
    """Two classes that can be told apart: dark and bright, with noise of their own."""
    random = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 10)):
        for level, name in zip((60, 180), classes, strict=True):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(level - 40, level + 40, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")


def test_devices_train_on_their_own_images_and_a_stranger_is_refused(deployment, tmp_path):
    for device in range(2):
        write_images(tmp_path / f"device{device}", ("dark", "bright"))
        deployment.join(f"device{device}", f'data-path="{tmp_path / f"device{device}"}"')
    write_images(tmp_path / "stranger", ("cat", "dog"))
    deployment.join("stranger", f'data-path="{tmp_path / "stranger"}"')
    own = ["dataset=imagefolder", f"dataset.root={tmp_path / 'device0'}"]
    run_dir = tmp_path / "run"
    finish(deployment, [*OVERRIDES, *own], run_dir, tmp_path / "flwr.log")

    assert len(rounds(run_dir)) == ROUNDS
    for record in rounds(run_dir):
        assert record["num_examples"] == 2 * 80
        (refused,) = record["refused"]
        assert "has the classes cat, dog" in refused["reason"]
        assert refused["client"] in record["cohort"]
    assert rounds(run_dir)[-1]["clean-accuracy"] > 0.9
    summary = json.loads((run_dir / f"certification/round-{ROUNDS:04d}/summary.json").read_text())
    assert summary["num_images"] == 5
