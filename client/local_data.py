"""Find this device's own training data, from its node configuration."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch

from client.node import NodeFacts
from fedsmooth_core import wire
from fedsmooth_core.config import DatasetConfig, TrainingPlan
from fedsmooth_core.data import (
    ArrayDataset,
    ClientData,
    client_indices,
    load_dataset,
    load_device_folder,
)
from fedsmooth_core.errors import DataError
from fedsmooth_core.models import ModelSpec


# Opened once a process: a simulation answers thousands of messages in one.
@lru_cache(maxsize=2)
def _training_set(config: DatasetConfig) -> ArrayDataset:
    return load_dataset(config, "train")


@lru_cache(maxsize=2)
def _own_images(folder: str, image_size: int | None, class_names: tuple[str, ...]) -> ArrayDataset:
    return load_device_folder(folder, image_size, class_names)


def local_data(
    facts: NodeFacts,
    plan: TrainingPlan,
    spec: ModelSpec,
    class_names: Sequence[str],
    client: int,
    device: torch.device,
) -> ClientData:
    """Load what this client trains on: its own folder, or its partition of the plan's data set.

    ``spec`` and ``class_names`` are the federation's: what a device holds must fit its model, and
    label k must mean the same everywhere. ``client`` is the number that the server handed out; a
    partition that the node names itself goes before it.

    Raises:
        ConfigError, DataError: one sentence about what is wrong with the node or its data.
    """
    if facts.data_path is not None:
        where = facts.data_path
        dataset = _own_images(where, plan.dataset.image_size, tuple(class_names))
    else:
        where = plan.dataset.root if facts.dataset_root is None else facts.dataset_root
        dataset = _training_set(replace(plan.dataset, root=where))
        if list(dataset.info.class_names) != list(class_names):
            raise DataError(
                f"The data set {plan.dataset.name} in {where} has the classes "
                f"{', '.join(dataset.info.class_names)}, but the federation's are "
                f"{', '.join(class_names)}: set {wire.DATASET_ROOT} to this machine's copy of it."
            )
    shape = (spec.channels, spec.height, spec.width)
    if dataset.info.shape != shape:
        raise DataError(
            f"{where} holds images of (channels, height, width) {dataset.info.shape}, but the "
            f"federation's model takes {shape}: resize them, or convert them."
        )
    if facts.data_path is not None:
        return ClientData.from_dataset(dataset, None, device)
    number = client if facts.partition is None else facts.partition[0]
    indices = client_indices(dataset.labels, plan.partition, plan.seed, number)
    return ClientData.from_dataset(dataset, indices, device)
