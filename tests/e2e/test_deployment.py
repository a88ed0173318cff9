"""Devices with images of their own, as real processes: they train and certify on them."""

import json
import shutil

import numpy as np
import pytest
from flower_processes import flwr_run, needs_proc, rounds
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
    "device_certification.every=2",
    "device_certification.num_images=6",
    "device_certification.n=200",
]

pytestmark = [pytest.mark.slow, needs_proc, pytest.mark.timeout(500)]


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
        if device:  # the server takes the other one's folder for its own
            shutil.rmtree(tmp_path / f"device{device}" / "test")
        deployment.join(f"device{device}", f'data-path="{tmp_path / f"device{device}"}"')
    write_images(tmp_path / "stranger", ("cat", "dog"))
    deployment.join("stranger", f'data-path="{tmp_path / "stranger"}"')
    own = ["dataset=imagefolder", f"dataset.root={tmp_path / 'device0'}"]
    run_dir, log = tmp_path / "run", tmp_path / "flwr.log"
    flwr_run(deployment.environment, [*OVERRIDES, *own, f"run_dir={run_dir}"], log)
    logs = [path.read_text()[-1500:] for path in deployment.folder.glob("*.log")]
    rows = list(run_dir.glob("certification/round-*/rows.tsv"))
    assert len(rows) == 1, "\n".join([log.read_text()[-3000:], *logs])

    assert len(rounds(run_dir)) == ROUNDS
    for record in rounds(run_dir):
        assert record["num_examples"] == 2 * 80
        (refused,) = record["refused"]
        assert "has the classes cat, dog" in refused["reason"]
        assert refused["client"] in record["cohort"]
    assert rounds(run_dir)[-1]["clean-accuracy"] > 0.9
    summary = json.loads((run_dir / f"certification/round-{ROUNDS:04d}/summary.json").read_text())
    assert summary["num_images"] == 5

    # They certify six images each: of test/ where there is one, else of those that they train on.
    first, last = rounds(run_dir)
    assert "federated_certified_accuracy" not in first
    certified = last["federated_certified_accuracy"]
    assert certified["cohort"] == [0, 1, 2]
    assert (certified["num_clients"], certified["num_examples"]) == (2, 12)
    assert certified["num_held_out"] == 6
    (refused,) = certified["refused"]
    assert "has the classes cat, dog" in refused["reason"]
    assert certified["accuracy"][0] >= 0.75
    assert certified["confidence_interval_95"][0][0] > 0.4
