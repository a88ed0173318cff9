"""What a node configuration may say, and what each mistake is answered with."""

import os

import pytest
import torch

from client.node import NodeFacts
from fedsmooth_core.errors import ConfigError
from fedsmooth_core.limits import DeviceLimits


def refusal(node_config):
    with pytest.raises(ConfigError) as error:
        NodeFacts.read(node_config)
    message = str(error.value)
    assert "\n" not in message
    assert message[-1] in ".?"
    return message


def test_a_node_may_say_nothing_at_all():
    assert NodeFacts.read({}) == NodeFacts()


def test_a_simulated_client_says_which_partition_it_is():
    assert NodeFacts.read({"partition-id": 3, "num-partitions": 10}).partition == (3, 10)
    assert NodeFacts.read({"partition-id": 0, "num-partitions": 1}).partition == (0, 1)


def test_a_real_device_says_where_its_images_are_and_what_fits():
    facts = NodeFacts.read(
        {"data-path": "/data", "device": "cpu", "threads": 3, "max-batch": 16, "bf16": True}
    )
    assert facts == NodeFacts(
        data_path="/data", device="cpu", threads=3, limits=DeviceLimits(max_batch=16, bf16=True)
    )


def test_a_device_may_say_how_it_computes():
    facts = NodeFacts.read({"tf32": True, "engine": "plain"})
    assert facts == NodeFacts(limits=DeviceLimits(tf32=True), engine="plain")
    assert NodeFacts.read({}).engine == "auto"


def test_a_machine_may_keep_the_federations_data_set_elsewhere():
    config = {"dataset-root": "/mnt/cifar", "partition-id": 0, "num-partitions": 2}
    assert NodeFacts.read(config).dataset_root == "/mnt/cifar"


@pytest.mark.parametrize(
    "partition",
    [{"partition-id": 0, "num-partitions": 2}, {"partition-id": 1, "num-partitions": 2}],
)
def test_both_a_partition_and_a_path_are_refused(partition):
    assert "both a partition and a data path" in refusal({"data-path": "/data"} | partition)


def test_a_path_and_a_data_set_of_the_federation_are_refused():
    message = refusal({"data-path": "/data", "dataset-root": "/mnt"})
    assert "both data-path" in message
    assert "dataset-root" in message


@pytest.mark.parametrize(
    ("partition", "total"),
    [
        (-1, 4),
        (4, 4),
        (5, 4),
        (0, 0),
        ("0", 4),
        (0, "4"),
        (1.0, 4),
        (None, 4),
        (0, None),
        (False, 4),
    ],
)
def test_what_is_no_partition_is_refused_with_its_values(partition, total):
    given = {"partition-id": partition, "num-partitions": total}
    config = {key: value for key, value in given.items() if value is not None}
    message = refusal(config)
    assert f"partition-id={partition} and num-partitions={total} are no partition" in message
    assert "0 <= partition-id < num-partitions" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data-path", 5),
        ("data-path", ""),
        ("dataset-root", True),
        ("device", 0),
        ("threads", 0),
        ("threads", "2"),
        ("threads", True),
        ("max-batch", -1),
        ("max-batch", 1.5),
        ("bf16", "yes"),
        ("bf16", 1),
        ("tf32", "on"),
        ("engine", 2),
    ],
)
def test_a_value_that_a_key_does_not_allow_is_named(key, value):
    message = refusal({key: value})
    assert f"{key}={value!r}" in message
    assert "allowed is" in message


def test_threads_are_bounded_by_the_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert NodeFacts.read({"threads": 8}).threads == 8
    message = refusal({"threads": 100000})
    assert "threads=100000" in message
    assert "allowed is an integer in 1 to 8, 4 for each CPU core" in message


def test_a_mistyped_key_is_answered_with_the_one_that_was_meant():
    message = refusal({"data_path": "/data"})
    assert "data_path is no fact" in message
    assert "did you mean data-path?" in message


def test_hyper_parameters_come_from_the_server_alone():
    message = refusal({"smoothing.sigma": 0.1})
    assert "smoothing.sigma is no fact" in message
    assert "hyper-parameters come from the server alone" in message
    assert "data-path" in message


def test_threads_are_set_and_the_device_is_chosen():
    before = torch.get_num_threads()
    try:
        assert NodeFacts(device="cpu", threads=2).prepare() == torch.device("cpu")
        assert torch.get_num_threads() == 2
        NodeFacts(device="cpu").prepare()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cuda:-1", "cpu:zero"])
def test_what_is_no_device_is_refused(device):
    with pytest.raises(ConfigError, match="device="):
        NodeFacts(device=device).prepare()
