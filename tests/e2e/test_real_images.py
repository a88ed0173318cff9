"""The main job through the real command, on real images: artefacts, and learning that happened."""

import itertools
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import norm

from fedsmooth_core.certification.analysis import certified_accuracy
from fedsmooth_core.certification.rows import read_rows
from fedsmooth_core.checkpoint import load_checkpoint, state_sha256

pytestmark = pytest.mark.slow

ARCHIVE = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "cifar10-jpg.tar.xz"


def fedsmooth(*arguments):
    """Run the command line in a process of its own; return what it printed."""
    result = subprocess.run(
        [sys.executable, "-c", "from server.cli import main; main()", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def rounds(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def rows_of(run):
    (path,) = run.glob("certification/round-*/rows.tsv")
    return read_rows(path)


def assert_artefacts(run, printed, num_rounds):
    """Everything that explains the run is there and belongs together."""
    assert [line["round"] for line in rounds(run)] == list(range(1, num_rounds + 1))
    assert (run / "config.yaml").is_file()
    assert (run / "sessions.jsonl").is_file()
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    final = load_checkpoint(run / "checkpoints" / f"round-{num_rounds:04d}.safetensors")
    (summary,) = run.glob("certification/round-*/summary.json")
    certified = json.loads(summary.read_text())
    assert certified["parameters"]["weights"] == state_sha256(final.state)
    with Image.open(run / "curve.png") as picture:
        assert min(picture.size) > 300
    assert "</svg>" in (run / "curve.svg").read_text()
    assert "Certified accuracy" in printed
    assert str(run) in printed


def assert_a_certified_curve(rows, sigma, n, alpha=0.001):
    """It never rises, and no radius is beyond what n draws can show."""
    curve = certified_accuracy(rows, np.linspace(0, 2, 201))
    assert all(a >= b for a, b in itertools.pairwise(curve))
    cap = sigma * norm.ppf(alpha ** (1 / n))
    assert 0 < rows.radius.max() <= cap + 1e-9
    assert certified_accuracy(rows, cap + 1e-6) == 0


@pytest.mark.timeout(300)
def test_the_quick_experiment_learns_the_digits_and_certifies_them(tmp_path):
    run = tmp_path / "run"
    printed = fedsmooth("simulate", "experiment=quick", f"run_dir={run}")
    assert_artefacts(run, printed, num_rounds=10)
    lines = rounds(run)
    assert lines[-1]["metrics"]["train-loss"] < 0.7 * lines[0]["metrics"]["train-loss"]
    assert lines[-1]["clean-accuracy"] > 0.8
    assert lines[-1]["noisy-accuracy"] > 0.7  # of ten classes: chance is a tenth
    rows = rows_of(run)
    assert len(rows) == 100
    assert_a_certified_curve(rows, sigma=0.25, n=2000)
    assert certified_accuracy(rows, 0.0) > 0.6
    assert certified_accuracy(rows, 0.25) > 0.25
    # A certificate says what the model does: most certified images are images it gets right.
    predicted = rows.predict >= 0
    assert rows.correct[predicted].mean() > 0.75


@pytest.fixture(scope="module")
def real_images(tmp_path_factory):
    """A folder of CIFAR-10 (JPEG copy): 300 training and 50 test images of each of four classes."""
    if not ARCHIVE.is_file():
        pytest.skip(f"there are no real images: {ARCHIVE} is missing")
    root = tmp_path_factory.mktemp("images")
    wanted = {"train": 300, "test": 50}
    taken = dict.fromkeys(itertools.product(wanted, CLASSES), 0)
    with tarfile.open(ARCHIVE) as archive:
        for member in archive:
            parts = Path(member.name).parts[-3:]
            key = parts[:2]
            if not member.isfile() or key not in taken or taken[key] == wanted[key[0]]:
                continue
            taken[key] += 1
            target = root.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.extractfile(member).read())
            if all(taken[k] == wanted[k[0]] for k in taken):
                break
    assert all(taken[k] == wanted[k[0]] for k in taken)
    return root


CLASSES = ("airplane", "automobile", "frog", "ship")


@pytest.mark.timeout(300)
def test_a_folder_of_real_images_is_learned_and_certified(real_images, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSMOOTH_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    printed = fedsmooth(
        "simulate",
        "dataset=imagefolder",
        f"dataset.root={real_images}",
        "dataset.image_size=16",  # a quarter of the pixels: the test stays within a minute
        "dataset.flip=true",
        "model=small_cnn",
        "partition=iid",
        "partition.num_clients=4",
        "smoothing.sigma=0.12",
        "attack.epsilon_255=64",
        "training.learning_rate=0.05",
        "training.local_steps=25",
        "federation.num_rounds=8",
        "federation.cohort_fraction=1",
        "evaluation.every=4",
        "certification.n=500",
        "certification.num_images=40",
        f"run_dir={run}",
    )
    assert_artefacts(run, printed, num_rounds=8)
    lines = rounds(run)
    assert all(line["num_examples"] == 1200 and line["refused"] == [] for line in lines)
    assert lines[-1]["metrics"]["train-loss"] < 0.9 * lines[0]["metrics"]["train-loss"]
    # 200 test images of four classes: guessing gets 25 %, and above 35 % once in a thousand times.
    assert lines[-1]["noisy-accuracy"] > 0.4
    rows = rows_of(run)
    assert len(rows) == 40
    assert_a_certified_curve(rows, sigma=0.12, n=500)
    assert certified_accuracy(rows, 0.0) > 0.25
    checkpoint = load_checkpoint(run / "checkpoints" / "round-0008.safetensors")
    assert checkpoint.metadata["dataset"]["class_names"] == list(CLASSES)
