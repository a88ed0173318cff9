"""A device with neither Hydra nor the server's packages: enrolled, examined, trained, revoked, over TLS."""

import os
import subprocess
import textwrap

import numpy as np
import pytest
from flower_processes import BIN, flwr_run, needs_proc, rounds, running_deployment, wait_for
from PIL import Image

ROUNDS = 2
NOT_ON_A_DEVICE = "hydra omegaconf matplotlib tensorboard prometheus_client sklearn conf"
GUARD = """
    # Makes some packages missing in every Python of this process tree, and lists those Pythons.
    import os, sys

    sys.modules.update(dict.fromkeys(os.environ["NOT_ON_A_DEVICE"].split()))
    with open(os.environ["GUARDED"], "a") as guarded:
        guarded.write(" ".join(sys.orig_argv) + chr(10))
"""

pytestmark = [pytest.mark.slow, needs_proc]


@pytest.fixture
def deployment(tmp_path_factory):
    with running_deployment(tmp_path_factory.mktemp("edge"), secure=True) as running:
        yield running


@pytest.fixture
def device_environment(deployment, tmp_path):
    """What a device lacks, for all processes that are started with it."""
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(textwrap.dedent(GUARD))
    return {
        "PYTHONPATH": str(tmp_path / "guard"),
        "GUARDED": str(tmp_path / "guarded"),
        "NOT_ON_A_DEVICE": f"{NOT_ON_A_DEVICE} server",
        "FEDSMOOTH_CACHE": str(tmp_path / "cache"),
    }


def write_images(folder, classes, splits=("train",)):
    """Dark and bright images, with noise of their own."""
    random = np.random.default_rng(0)
    levels = {"dark": 60, "bright": 180}
    for split in splits:
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for number in range(20):
                level = levels[name]
                pixels = random.integers(level - 40, level + 40, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder


def test_a_device_without_the_servers_packages_takes_part_until_it_is_revoked(
    deployment, device_environment, tmp_path
):
    both = ("dark", "bright")
    images = write_images(tmp_path / "servers", both, splits=("train", "test"))
    overrides = [
        "dataset=imagefolder",
        f"dataset.root={images}",
        "runtime.device=cpu",
        "runtime.threads=1",
        "partition.num_clients=2",
        "federation.cohort_fraction=1.0",
        f"federation.num_rounds={ROUNDS}",
        "training.local_steps=3",
        "certification.at_end=false",
    ]

    # The operator: a joining kit, and keys enrolled.
    kit, keys = deployment.folder / "kit", deployment.folder / "keys"
    authority = ["--root-certificates", deployment.authority]
    deployment.fedsmooth("invite", *overrides, "-o", kit, *authority)
    for name in ("whole", "half"):
        deployment.fedsmooth("enroll", name, "-o", keys)

    # The devices: one with images of both classes and little memory, one with images of a single class.
    facts = {
        "whole": f'data-path="{write_images(tmp_path / "whole", both)}" device="cpu" max-batch=16',
        "half": f'data-path="{write_images(tmp_path / "half", ("bright",))}" device="cpu"',
    }
    server = deployment.environment
    deployment.environment = server | device_environment
    # `fedsmooth` itself is the one module of server/ that a device's command needs.
    deployment.environment["NOT_ON_A_DEVICE"] = NOT_ON_A_DEVICE
    examine = ["doctor", "--federation", kit / "federation.json", "--server", deployment.address]
    examine += ["--root-certificates", kit / "ca.crt"]
    report = deployment.fedsmooth(
        *examine, "--key", keys / "whole", "--node-config", facts["whole"]
    )
    assert "This device can join." in report
    deployment.environment = server | device_environment
    devices = {name: deployment.join(name, facts[name]) for name in facts}

    deployment.environment = server
    run_dir = tmp_path / "run"
    flwr_run(server, [*overrides, f"run_dir={run_dir}"], tmp_path / "flwr.log")
    assert [line["num_examples"] for line in rounds(run_dir)] == [40 + 20] * ROUNDS
    assert all(line["refused"] == [] for line in rounds(run_dir))
    guarded = (tmp_path / "guarded").read_text().splitlines()
    assert sum("flwr-clientapp" in line for line in guarded) >= 2 * ROUNDS

    # Revoked: it has to leave, and the doctor knows why.
    deployment.fedsmooth("revoke", "half")
    wait_for(lambda: devices["half"].poll() is not None, 60, deployment.log("half"))
    deployment.environment = server | device_environment
    deployment.environment["NOT_ON_A_DEVICE"] = NOT_ON_A_DEVICE
    report = deployment.fedsmooth(
        *examine, "--key", keys / "half", "--node-config", facts["half"], succeeds=False
    )
    assert "or it was revoked" in " ".join(report.split())
    assert devices["whole"].poll() is None


def test_the_guard_of_this_test_refuses(device_environment):
    """Else the test above would prove nothing."""
    for name in device_environment["NOT_ON_A_DEVICE"].split():
        done = subprocess.run(
            [str(BIN / "python"), "-c", f"import {name}"],
            env=os.environ | device_environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode != 0
        assert "ModuleNotFoundError" in done.stderr
