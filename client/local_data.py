"""Find this device's own training data, from its node configuration."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import torch

from fedsmooth_core import wire
from fedsmooth_core.config import DatasetConfig, Scalar, TrainingPlan
from fedsmooth_core.data import ArrayDataset, ClientData, client_indices, load_dataset
from fedsmooth_core.errors import ConfigError, DataError
from fedsmooth_core.models import ModelSpec


@lru_cache(maxsize=2)
def _training_set(config: DatasetConfig) -> ArrayDataset:
    """Open the training set once a process: a simulation answers thousands of messages in one."""
    return load_dataset(config, "train")


def simulated_partition(node_config: Mapping[str, Scalar]) -> tuple[int, int] | None:
    """Return (partition-id, num-partitions) of a simulated client, or None for a real device.

    Raises:
        ConfigError: when the node configuration describes neither or both, or no valid partition.
    """
    is_simulated = wire.PARTITION_ID in node_config or wire.NUM_PARTITIONS in node_config
    if is_simulated == (wire.DATA_PATH in node_config):
        which = "both a partition and" if is_simulated else "neither a partition nor"
        raise ConfigError(
            f"This node's configuration gives {which} a data path: a simulated client has "
            f"'{wire.PARTITION_ID}=K {wire.NUM_PARTITIONS}=N', a real device '{wire.DATA_PATH}=\"...\"'."
        )
    if not is_simulated:
        return None
    numbers = [node_config.get(key) for key in (wire.PARTITION_ID, wire.NUM_PARTITIONS)]
    match numbers:
        case [int(partition), int(total)] if 0 <= partition < total:
            return partition, total
    raise ConfigError(
        f"This node's {wire.PARTITION_ID}={numbers[0]} and {wire.NUM_PARTITIONS}={numbers[1]} are no "
        f"partition: allowed are two integers with 0 <= {wire.PARTITION_ID} < {wire.NUM_PARTITIONS}."
    )


def local_data(
    node_config: Mapping[str, Scalar],
    plan: TrainingPlan,
    spec: ModelSpec,
    class_names: Sequence[str],
    client: int,
    device: torch.device,
) -> ClientData:
    """Load what this client trains on: its partition of the plan's data set, or its own folder.

    ``spec`` and ``class_names`` are the federation's: what a device holds must fit its model, and
    label k must mean the same everywhere.

    Raises:
        ConfigError, DataError: one sentence about what is wrong with the node or its data.
    """
    if simulated_partition(node_config) is None:
        folder = str(node_config[wire.DATA_PATH])
        own = replace(plan.dataset, name="imagefolder", root=folder)
        dataset = _training_set(own)
        if list(dataset.info.class_names) != list(class_names):
            raise DataError(
                f"{folder} has the classes {', '.join(dataset.info.class_names)}, but the federation's "
                f"are {', '.join(class_names)}: name the folders in train/ and test/ like these."
            )
        shape = (spec.channels, spec.height, spec.width)
        if dataset.info.shape != shape:
            raise DataError(
                f"{folder} holds images of (channels, height, width) {dataset.info.shape}, but the "
                f"federation's model takes {shape}: resize them, or convert them."
            )
        return ClientData.from_dataset(dataset, None, device)
    dataset = _training_set(plan.dataset)
    indices = client_indices(dataset.labels, plan.partition, plan.seed, client)
    return ClientData.from_dataset(dataset, indices, device)
