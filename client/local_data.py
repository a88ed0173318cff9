"""Find this device's own data, from its node configuration: what it trains on, what it certifies."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from client.node import NodeFacts
from fedsmooth_core import wire
from fedsmooth_core.config import DatasetConfig, PartitionConfig, TrainingPlan
from fedsmooth_core.data import (
    ArrayDataset,
    ClientData,
    client_indices,
    held_out_indices,
    load_dataset,
    load_device_folder,
)
from fedsmooth_core.errors import DataError
from fedsmooth_core.models import ModelSpec


# Opened once a process: a simulation answers thousands of messages in one.
@lru_cache(maxsize=4)
def _data_set(config: DatasetConfig, split: str) -> ArrayDataset:
    return load_dataset(config, split)


@lru_cache(maxsize=4)
def _own_images(
    folder: str, image_size: int | None, class_names: tuple[str, ...], split: str
) -> ArrayDataset:
    return load_device_folder(folder, image_size, class_names, split)


class OwnImages(NamedTuple):
    """Images that a client certifies."""

    data: ClientData
    indices: list[int]
    """Their places in the split that they are of."""
    are_held_out: bool
    """Whether they are of the ``test`` split, which nobody trains on."""


def local_data(
    facts: NodeFacts,
    plan: TrainingPlan,
    spec: ModelSpec,
    class_names: Sequence[str],
    client: int,
    device: torch.device,
    shared: bool = False,
) -> ClientData:
    """Load what this client trains on: its own folder, or its partition of the plan's data set.

    Where many clients live in one process, ``shared`` keeps the data set on the device, once for all.

    ``spec`` and ``class_names`` are the federation's: what a device holds must fit its model, and
    label k must mean the same everywhere. ``client`` is the number that the server handed out; a
    partition that the node names itself goes before it.

    Raises:
        ConfigError, DataError: one sentence about what is wrong with the node or its data.
    """
    dataset = _open(facts, plan, spec, class_names, "train")
    if facts.data_path is not None:
        return ClientData.from_dataset(dataset, None, device)
    if shared:
        whole = _resident(dataset, device)
        return whole.subset(_dealt_once(dataset, plan.partition, plan.seed, _number(facts, client)))
    return ClientData.from_dataset(dataset, _dealt(facts, plan, dataset, client), device)


# A data set is one object a process, see _data_set, so its identity will do.
@lru_cache(maxsize=2)
def _resident(dataset: ArrayDataset, device: torch.device) -> ClientData:
    return ClientData.from_dataset(dataset, None, device)


@lru_cache(maxsize=10_000)
def _dealt_once(
    dataset: ArrayDataset, partition: PartitionConfig, seed: int, number: int
) -> npt.NDArray[np.int64]:
    return client_indices(dataset.labels, partition, seed, number)


def images_to_certify(
    facts: NodeFacts,
    plan: TrainingPlan,
    spec: ModelSpec,
    class_names: Sequence[str],
    client: int,
    num_images: int,
    device: torch.device,
) -> OwnImages:
    """Load a few images of this client's own, the same ones in every round.

    A device with a folder takes evenly spaced ones of its ``test/``, or of its ``train/`` where there
    is no ``test/``. A client with a partition takes images of the data set's test split, of classes in
    the proportions that it trains on. Arguments are those of :func:`local_data`.

    Args:
        num_images: how many; fewer where there are fewer.

    Raises:
        ConfigError, DataError: one sentence about what is wrong with the node or its data.
    """
    split = "test"
    if facts.data_path is not None:
        if not (Path(facts.data_path).expanduser() / "test").is_dir():
            split = "train"
        dataset = _open(facts, plan, spec, class_names, split)
        wanted = min(num_images, len(dataset))
        # All of the folder, whose images are ordered by class, and not its first images alone.
        indices = np.arange(wanted) * len(dataset) // wanted
    else:
        train = _open(facts, plan, spec, class_names, "train")
        dataset = _open(facts, plan, spec, class_names, "test")
        own = train.labels[_dealt(facts, plan, train, client)]
        number = _number(facts, client)
        indices = held_out_indices(own, dataset.labels, num_images, plan.seed, number)
    data = ClientData.from_dataset(dataset, indices, device)
    return OwnImages(data, indices.tolist(), split == "test")


def _open(
    facts: NodeFacts,
    plan: TrainingPlan,
    spec: ModelSpec,
    class_names: Sequence[str],
    split: str,
) -> ArrayDataset:
    if facts.data_path is not None:
        where = facts.data_path
        dataset = _own_images(where, plan.dataset.image_size, tuple(class_names), split)
    else:
        where = plan.dataset.root if facts.dataset_root is None else facts.dataset_root
        dataset = _data_set(replace(plan.dataset, root=where), split)
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
    return dataset


def _number(facts: NodeFacts, client: int) -> int:
    return client if facts.partition is None else facts.partition[0]


def _dealt(
    facts: NodeFacts, plan: TrainingPlan, train: ArrayDataset, client: int
) -> npt.NDArray[np.int64]:
    return client_indices(train.labels, plan.partition, plan.seed, _number(facts, client))
