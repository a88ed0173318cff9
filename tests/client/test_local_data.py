"""A device's own facts: which partition it is, or where its images are."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from client.local_data import local_data
from client.node import NodeFacts
from fedsmooth_core.config import DatasetConfig, PartitionConfig, TrainingPlan
from fedsmooth_core.data import client_indices, load_dataset
from fedsmooth_core.errors import DataError
from fedsmooth_core.models import ModelSpec

CPU = torch.device("cpu")
SPEC = ModelSpec("small_cnn", "he", 2, 3, 8, 8)
DIGITS = ModelSpec("small_cnn", "he", 10, 1, 8, 8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSMOOTH_CACHE", str(tmp_path / "cache"))


def write_images(root, classes=("cat", "dog"), per_class=4, size=8):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(per_class):
                pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def refusal(kind, function, *args):
    with pytest.raises(kind) as error:
        function(*args)
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def partitioned_plan():
    return TrainingPlan(seed=3, partition=PartitionConfig(num_clients=4, samples_per_client=50))


def assert_holds_partition(data, plan, number):
    train = load_dataset(plan.dataset, "train")
    indices = client_indices(train.labels, plan.partition, 3, number)
    assert np.array_equal(data.images.numpy(), train.images[indices])
    assert np.array_equal(data.labels.numpy(), train.labels[indices])
    assert data.max_value == 16


TEN = [str(k) for k in range(10)]


@pytest.mark.parametrize("number", [0, 3])
def test_a_simulated_client_holds_its_partition_of_the_plans_data_set(number):
    plan = partitioned_plan()
    data = local_data(NodeFacts(partition=(number, 4)), plan, DIGITS, TEN, number, CPU)
    assert_holds_partition(data, plan, number)


@pytest.mark.parametrize("number", [0, 3])
def test_a_node_that_says_nothing_holds_the_partition_it_was_given(number):
    plan = partitioned_plan()
    data = local_data(NodeFacts(), plan, DIGITS, TEN, number, CPU)
    assert_holds_partition(data, plan, number)


def test_a_partition_of_its_own_goes_before_the_one_it_was_given():
    plan = partitioned_plan()
    data = local_data(NodeFacts(partition=(1, 4)), plan, DIGITS, TEN, 3, CPU)
    assert_holds_partition(data, plan, 1)


def test_a_machine_keeps_the_federations_data_set_where_it_likes(tmp_path):
    write_images(tmp_path / "here")
    there = DatasetConfig(name="imagefolder", root="/not/on/this/machine")
    plan = TrainingPlan(dataset=there, partition=PartitionConfig(num_clients=2))
    facts = NodeFacts(dataset_root=str(tmp_path / "here"))
    data = local_data(facts, plan, SPEC, ["cat", "dog"], 1, CPU)
    assert data.num_examples == 4


def test_a_machine_whose_copy_is_another_data_set_is_refused(tmp_path):
    write_images(tmp_path / "here", classes=("ant", "bee"))
    there = DatasetConfig(name="imagefolder", root="/not/on/this/machine")
    plan = TrainingPlan(dataset=there, partition=PartitionConfig(num_clients=2))
    facts = NodeFacts(dataset_root=str(tmp_path / "here"))
    message = refusal(DataError, local_data, facts, plan, SPEC, ["cat", "dog"], 1, CPU)
    assert "ant, bee" in message
    assert "set dataset-root" in message


def own(folder):
    return NodeFacts(data_path=str(folder))


def test_a_real_device_holds_its_own_folder_whatever_the_plans_data_set(tmp_path):
    folder = write_images(tmp_path / "own")
    data = local_data(own(folder), TrainingPlan(), SPEC, ["cat", "dog"], 7, CPU)
    same = DatasetConfig(name="imagefolder", root=str(folder))
    assert np.array_equal(data.images.numpy(), load_dataset(same, "train").images)
    assert data.labels.tolist() == [0] * 4 + [1] * 4
    assert data.num_examples == 8


def test_a_label_means_the_same_class_on_every_device(tmp_path):
    folder = write_images(tmp_path / "own")
    data = local_data(own(folder), TrainingPlan(), SPEC, ["dog", "eel", "cat"], 0, CPU)
    assert data.labels.tolist() == [2] * 4 + [0] * 4


def test_a_device_needs_no_test_images(tmp_path):
    folder = write_images(tmp_path / "own")
    shutil.rmtree(folder / "test")
    data = local_data(own(folder), TrainingPlan(), SPEC, ["cat", "dog"], 0, CPU)
    assert data.num_examples == 8


def test_a_device_may_have_a_single_class(tmp_path):
    folder = write_images(tmp_path / "own", classes=("dog",))
    data = local_data(own(folder), TrainingPlan(), SPEC, ["cat", "dog"], 0, CPU)
    assert data.labels.tolist() == [1] * 4


@pytest.mark.parametrize("federation", [["cat"], ["0", "1"], ["Cat", "dog"]])
def test_a_class_that_the_federation_does_not_know_is_refused(tmp_path, federation):
    folder = write_images(tmp_path / "own")
    message = refusal(DataError, local_data, own(folder), TrainingPlan(), SPEC, federation, 0, CPU)
    assert f"{folder} has the classes cat, dog" in message
    assert f"the federation's are {', '.join(federation)}" in message


def test_images_that_the_model_does_not_take_are_refused(tmp_path):
    folder = write_images(tmp_path / "own", size=10)
    classes = ["cat", "dog"]
    message = refusal(DataError, local_data, own(folder), TrainingPlan(), SPEC, classes, 0, CPU)
    assert "(3, 10, 10)" in message
    assert "(3, 8, 8)" in message


def test_a_folder_that_is_not_there_is_named(tmp_path):
    node = own(tmp_path / "nowhere")
    message = refusal(DataError, local_data, node, TrainingPlan(), SPEC, ["cat", "dog"], 0, CPU)
    assert str(tmp_path / "nowhere") in message
    assert "test/" not in message


def test_clients_of_one_process_share_the_data_set():
    plan = partitioned_plan()
    facts = NodeFacts.read({"dataset-root": plan.dataset.root})
    shared = [local_data(facts, plan, DIGITS, TEN, number, CPU, True) for number in (1, 2, 1)]
    assert all(data.images is shared[0].images for data in shared)
    for number, data in zip((1, 2, 1), shared, strict=True):
        alone = local_data(facts, plan, DIGITS, TEN, number, CPU)
        assert len(data) == len(alone) == 50
        everything = torch.arange(50)
        for ours, theirs in zip(data.batch(everything), alone.batch(everything), strict=True):
            assert torch.equal(ours, theirs)
