"""The examination of a device: everything is found out, every problem is a sentence, nothing crashes."""

import contextlib
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tls_server import Authority, serving

import client.doctor
from client.doctor import Examination, Questions
from fedsmooth_core.cohort import trainer
from fedsmooth_core.config import DatasetConfig, PartitionConfig, TrainingConfig, TrainingPlan
from fedsmooth_core.invitation import Invitation
from fedsmooth_core.keys import make_key
from fedsmooth_core.models import ModelSpec
from server.cli import main

PLAN = TrainingPlan(
    dataset=DatasetConfig(name="imagefolder", root="/not/on/this/machine"),
    training=TrainingConfig(local_steps=7, batch_size=4),
)
SPEC = ModelSpec("small_cnn", "he", 2, 3, 8, 8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSMOOTH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def federation(tmp_path):
    path = tmp_path / "federation.json"
    Invitation(("cat", "dog"), PLAN, SPEC, 1000).write(path)
    return path


def write_images(folder, classes=("cat", "dog"), size=8):
    random = np.random.default_rng(0)
    for name in classes:
        (folder / "train" / name).mkdir(parents=True)
        for number in range(3):
            pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "train" / name / f"{number}.png")
    return folder


def own(folder, more=""):
    return f'data-path="{folder}" device="cpu" {more}'


def examine(*arguments, **options):
    watched = []

    @contextlib.contextmanager
    def watch(text):
        watched.append(text)
        yield

    findings = Examination(Questions(*arguments, **options), watch).run()
    for finding in findings:
        assert "\n" not in finding.sentence
        assert finding.sentence[-1] in ".?"
        assert "Traceback" not in finding.sentence
    return findings, watched


def problems(*arguments, **options):
    findings, _ = examine(*arguments, **options)
    return {finding.check: finding.sentence for finding in findings if not finding.sound}


def test_a_sound_device_is_told_what_it_is(federation, tmp_path):
    findings, watched = examine(federation, own(write_images(tmp_path / "own")))
    assert all(finding.sound for finding in findings)
    said = {finding.check: finding.sentence for finding in findings}
    assert "images of 8x8 pixels" in said["federation"]
    assert f"images of its own in {tmp_path / 'own'}" in said["node configuration"]
    assert "CPU, " in said["device"]
    assert "GiB memory free" in said["device"]
    assert said["images"] == "6 images can be used; by class: cat 3, dog 3."
    assert "for the 7 steps of a round" in said["local step"]
    assert any("Timing a local step" in text for text in watched)


def test_a_class_that_is_missing_is_counted_as_none(federation, tmp_path):
    findings, _ = examine(federation, own(write_images(tmp_path / "own", classes=("dog",))))
    said = {finding.check: finding.sentence for finding in findings}
    assert said["images"] == "3 images can be used; by class: cat 0, dog 3."


def test_a_device_without_images_of_its_own_is_given_a_partition(tmp_path):
    path = tmp_path / "federation.json"
    plan = TrainingPlan(partition=PartitionConfig(samples_per_client=30))
    spec = ModelSpec("small_cnn", "he", 10, 1, 8, 8)
    Invitation(tuple("0123456789"), plan, spec, 1000).write(path)
    findings, _ = examine(path, 'device="cpu"')
    assert all(finding.sound for finding in findings)
    said = {finding.check: finding.sentence for finding in findings}
    assert "whose number the server hands out" in said["node configuration"]
    assert said["images"].startswith("30 images can be used")


def test_one_of_a_thing_is_said_in_the_singular(tmp_path, monkeypatch):
    path = tmp_path / "federation.json"
    plan = replace(PLAN, training=TrainingConfig(local_steps=1, batch_size=4))
    Invitation(("cat", "dog"), plan, SPEC, 1).write(path)
    folder = write_images(tmp_path / "own", classes=("cat",))
    for number in (1, 2):
        (folder / "train" / "cat" / f"{number}.png").unlink()
    before = torch.get_num_threads()
    try:
        findings, _ = examine(path, own(folder, "threads=1"))
    finally:
        torch.set_num_threads(before)
    said = {finding.check: finding.sentence for finding in findings}
    assert all(finding.sound for finding in findings)
    assert "CPU, 1 thread, " in said["device"]
    assert said["images"].startswith("1 image can be used")
    assert "for the 1 step of a round" in said["local step"]


# --- problems


def test_more_images_than_the_server_believes(tmp_path):
    path = tmp_path / "federation.json"
    Invitation(("cat", "dog"), PLAN, SPEC, 5).write(path)
    found = problems(path, own(write_images(tmp_path / "own")))
    assert set(found) == {"images"}
    assert (
        "6 images can be used, but the server refuses a device with more than 5" in found["images"]
    )
    assert "federation.max_num_examples=6 or more, or use fewer images" in found["images"]


@pytest.mark.parametrize(
    "partition", ["partition-id=0 num-partitions=3", "partition-id=12 num-partitions=13"]
)
def test_a_partition_of_another_federation(federation, partition):
    found = problems(federation, partition)
    assert set(found) == {"node configuration"}
    assert "set num-partitions=10, and partition-id to" in found["node configuration"]


@pytest.mark.timeout(60)
def test_a_pipe_among_the_images_keeps_nobody_waiting(federation, tmp_path):
    folder = write_images(tmp_path / "own")
    os.mkfifo(folder / "train" / "cat" / "pipe.png")
    message = problems(federation, own(folder))["images"]
    assert "pipe.png is a pipe, socket or device, and no image" in message


def test_every_problem_of_the_images_is_found_at_once(federation, tmp_path):
    folder = write_images(tmp_path / "own", classes=("Cat", "dog", "zebra"))
    (folder / "train" / "empty").mkdir()
    (folder / "train" / "dog" / "0.png").write_bytes(b"no image")
    Image.new("RGB", (9, 8)).save(folder / "train" / "dog" / "wide.png")
    findings, _ = examine(federation, own(folder))
    sentences = [finding.sentence for finding in findings if finding.check == "images"]
    for text in (
        f"{folder / 'train' / 'Cat'} is no class of the federation (cat, dog): rename it to cat",
        f"{folder / 'train' / 'zebra'} is no class of the federation (cat, dog): rename or remove",
        f"{folder / 'train' / 'empty'} holds no image",
        f"{folder / 'train' / 'dog' / '0.png'} cannot be read as an image",
        "wide.png is 9x8 pixels (images of this size: 1)",
    ):
        assert any(text in sentence for sentence in sentences), text
    # The speed does not depend on the images.
    assert {finding.check: finding.sound for finding in findings}["local step"]


def test_images_that_are_tested_on_are_looked_at_too(federation, tmp_path):
    folder = write_images(tmp_path / "own")
    assert "images" not in problems(federation, own(folder))
    (folder / "test" / "eel").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "test" / "eel" / "0.png")
    message = problems(federation, own(folder))["images"]
    assert f"{folder / 'test' / 'eel'} is no class of the federation (cat, dog)" in message


def test_many_broken_images_are_counted(federation, tmp_path):
    folder = write_images(tmp_path / "own")
    for number in range(9):
        (folder / "train" / "cat" / f"broken{number}.png").write_bytes(b"no image")
    findings, _ = examine(federation, own(folder))
    sentences = [finding.sentence for finding in findings if finding.check == "images"]
    assert len(sentences) == 6
    assert "cannot be read either (4 in number)" in sentences[-1]


@pytest.mark.parametrize("content", [None, "no folder", "classless"])
def test_a_folder_without_images(federation, tmp_path, content):
    if content == "no folder":
        (tmp_path / "own").write_text("a file")
    elif content == "classless":
        (tmp_path / "own" / "train").mkdir(parents=True)
    assert str(tmp_path / "own" / "train") in problems(federation, own(tmp_path / "own"))["images"]


def test_a_model_of_one_channel_takes_no_folder_of_images(tmp_path):
    path = tmp_path / "federation.json"
    Invitation(("cat", "dog"), PLAN, ModelSpec("small_cnn", "he", 2, 1, 8, 8), 9).write(path)
    message = problems(path, own(write_images(tmp_path / "own")))["images"]
    assert "channels of the federation's images are 1" in message


def test_a_data_set_that_this_machine_lacks(federation):
    assert "/not/on/this/machine" in problems(federation, 'device="cpu"')["images"]


@pytest.mark.parametrize(
    ("node_config", "text"),
    [
        ("sigma=3", "hyper-parameters come from the server alone"),
        ("data-path=photos", "cannot be read: give key=value pairs"),
        ("threads", "'threads' in the node configuration cannot be read"),
        ('device="cpu" and more', "'and more'"),
        ('data-path="photos"', "give a path from the root"),
        ("nowhere.toml", "cannot be read"),
        ('threads=1 threads=2 device="cpu"', "cannot be read"),
    ],
)
def test_a_node_configuration_that_cannot_be_used(federation, node_config, text):
    assert text in problems(federation, node_config)["node configuration"]


def test_an_invitation_that_cannot_be_read_leaves_the_rest_to_be_checked(tmp_path):
    found = problems(tmp_path / "nowhere.json", 'device="tpu"')
    assert "cannot be read" in found["federation"]
    assert "device='tpu' is unknown" in found["device"]


def test_too_small_a_batch_for_the_copies_of_one_image(federation, tmp_path):
    node_config = own(write_images(tmp_path / "own"), "max-batch=1")
    assert "needs max-batch=2 or more" in problems(federation, node_config)["local step"]


def out_of_memory(*arguments):
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_an_accelerator_that_is_too_small_is_told_what_fits(federation, tmp_path, monkeypatch):
    def small(model, data, plan, server_round, client, limits):
        if limits.max_batch > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(trainer, "train_stacked", out_of_memory)
    monkeypatch.setattr(trainer, "local_train", small)
    node_config = own(write_images(tmp_path / "own"))
    assert "set max-batch=2 in" in problems(federation, node_config)["local step"]


def test_an_accelerator_that_is_far_too_small(federation, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "train_stacked", out_of_memory)
    monkeypatch.setattr(trainer, "local_train", out_of_memory)
    node_config = own(write_images(tmp_path / "own"))
    assert 'set device="cpu"' in problems(federation, node_config)["local step"]


def test_a_build_of_pytorch_for_another_accelerator(federation, tmp_path, monkeypatch):
    def foreign(*arguments):
        raise RuntimeError("CUDA error: no kernel image is available\nfor execution on the device")

    monkeypatch.setattr(trainer, "train_stacked", foreign)
    message = problems(federation, own(write_images(tmp_path / "own")))["local step"]
    assert "install the build of PyTorch" in message


def test_a_bug_of_ours_does_not_end_the_examination(federation, tmp_path, monkeypatch):
    def broken(*arguments):
        raise ZeroDivisionError("of some\nkind")

    monkeypatch.setattr(client.doctor, "local_data", broken)
    found = problems(federation, own(write_images(tmp_path / "own")))
    assert "ZeroDivisionError: of some kind" in found["images"]
    assert set(found) == {"images"}


# --- the connection


def test_the_server_is_asked_last(federation, tmp_path):
    authority = Authority(tmp_path)
    with serving(authority.certify("127.0.0.1"), b"HTTP/1.1 502 Bad\r\n\r\n") as port:
        findings, _ = examine(
            federation,
            own(write_images(tmp_path / "own")),
            server=f"127.0.0.1:{port}",
            root_certificates=authority.certificate,
            key=make_key(tmp_path, "device"),
        )
    last = findings[-4:]
    assert [finding.check for finding in last] == ["key", "server", "certificate", "enrolment"]
    assert [finding.sound for finding in last] == [True, True, True, False]


def test_a_device_without_a_key_is_not_told_that_it_can_join(federation, tmp_path):
    authority = Authority(tmp_path)
    with serving(authority.certify("127.0.0.1")) as port:
        found = problems(
            federation,
            own(write_images(tmp_path / "own")),
            server=f"127.0.0.1:{port}",
            root_certificates=authority.certificate,
        )
    assert set(found) == {"key"}
    assert "--key" in found["key"]


def test_problems_of_the_connection_do_not_hide_each_other(federation, tmp_path):
    (tmp_path / "key").write_text("no key")
    found = problems(federation, "sigma=1", server="nowhere", key=tmp_path / "key")
    assert set(found) == {"node configuration", "key", "server"}


# --- the command


def test_the_command_prints_a_table_and_ends_with_1_when_something_is_wrong(
    federation, tmp_path, capsys
):
    folder = write_images(tmp_path / "own")
    main(["doctor", "--federation", str(federation), "--node-config", own(folder)])
    output = capsys.readouterr().out
    assert "This device can join." in output
    assert "ok" in output
    spoilt = write_images(tmp_path / "spoilt")
    (spoilt / "train" / "dog" / "0.png").write_bytes(b"no image")
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--federation", str(federation), "--node-config", own(spoilt)])
    assert end.value.code == 1
    assert "1 to mend before this device can join." in capsys.readouterr().out
