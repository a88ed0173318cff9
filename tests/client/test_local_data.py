"""A device's own facts: which partition it is, or where its images are."""

import numpy as np
import pytest
import torch
from PIL import Image

from client.local_data import local_data, simulated_partition
from fedsmooth_core.config import DatasetConfig, PartitionConfig, TrainingPlan
from fedsmooth_core.data import client_indices, load_dataset
from fedsmooth_core.errors import ConfigError, DataError
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


def test_a_simulated_client_says_which_partition_it_is():
    assert simulated_partition({"partition-id": 3, "num-partitions": 10}) == (3, 10)
    assert simulated_partition({"partition-id": 0, "num-partitions": 1, "device": "cpu"}) == (0, 1)


def test_a_real_device_is_no_partition():
    assert simulated_partition({"data-path": "/data"}) is None


def test_neither_a_partition_nor_a_path_is_refused():
    message = refusal(ConfigError, simulated_partition, {"device": "cpu"})
    assert "neither a partition nor a data path" in message
    assert "'partition-id=K num-partitions=N'" in message


@pytest.mark.parametrize(
    "partition",
    [{"partition-id": 0, "num-partitions": 2}, {"partition-id": 0}, {"num-partitions": 2}],
)
def test_both_a_partition_and_a_path_are_refused(partition):
    message = refusal(ConfigError, simulated_partition, {"data-path": "/data"} | partition)
    assert "both a partition and a data path" in message


@pytest.mark.parametrize(
    ("partition", "total"),
    [(-1, 4), (4, 4), (5, 4), (0, 0), ("0", 4), (0, "4"), (1.0, 4), (None, 4), (0, None)],
)
def test_what_is_no_partition_is_refused_with_its_values(partition, total):
    given = {"partition-id": partition, "num-partitions": total}
    config = {key: value for key, value in given.items() if value is not None}
    message = refusal(ConfigError, simulated_partition, config)
    assert f"partition-id={partition} and num-partitions={total} are no partition" in message
    assert "0 <= partition-id < num-partitions" in message


def test_a_simulated_client_holds_its_partition_of_the_plans_data_set():
    plan = TrainingPlan(seed=3, partition=PartitionConfig(num_clients=4, samples_per_client=50))
    train = load_dataset(plan.dataset, "train")
    for number in (0, 3):
        node = {"partition-id": number, "num-partitions": 4}
        data = local_data(node, plan, DIGITS, train.info.class_names, number, CPU)
        indices = client_indices(train.labels, plan.partition, 3, number)
        assert np.array_equal(data.images.numpy(), train.images[indices])
        assert np.array_equal(data.labels.numpy(), train.labels[indices])
        assert data.max_value == 16


def test_a_real_device_holds_its_own_folder_whatever_the_plans_data_set(tmp_path):
    folder = write_images(tmp_path / "own")
    node = {"data-path": str(folder)}
    data = local_data(node, TrainingPlan(), SPEC, ["cat", "dog"], 7, CPU)
    own = DatasetConfig(name="imagefolder", root=str(folder))
    assert np.array_equal(data.images.numpy(), load_dataset(own, "train").images)
    assert data.labels.tolist() == [0] * 4 + [1] * 4
    assert data.num_examples == 8


@pytest.mark.parametrize("federation", [["dog", "cat"], ["cat"], ["cat", "dog", "eel"], ["0", "1"]])
def test_other_classes_than_the_federations_are_refused(tmp_path, federation):
    """The same names in another order would be other labels."""
    folder = write_images(tmp_path / "own")
    node = {"data-path": str(folder)}
    message = refusal(DataError, local_data, node, TrainingPlan(), SPEC, federation, 0, CPU)
    assert f"{folder} has the classes cat, dog" in message
    assert f"the federation's are {', '.join(federation)}" in message


def test_images_that_the_model_does_not_take_are_refused(tmp_path):
    folder = write_images(tmp_path / "own", size=10)
    node = {"data-path": str(folder)}
    message = refusal(DataError, local_data, node, TrainingPlan(), SPEC, ["cat", "dog"], 0, CPU)
    assert "(3, 10, 10)" in message
    assert "(3, 8, 8)" in message


def test_a_folder_that_is_not_there_is_named(tmp_path):
    node = {"data-path": str(tmp_path / "nowhere")}
    message = refusal(DataError, local_data, node, TrainingPlan(), SPEC, ["cat", "dog"], 0, CPU)
    assert str(tmp_path / "nowhere") in message
