"""Data sets as cached arrays, who holds which samples, and batches that live on a device.

Importing this package imports neither torchvision, scikit-learn nor Pillow: Flower may start a
process for every message, and a data set that is already cached needs none of them.
"""

from fedsmooth_core.data.batches import (
    BatchOrder,
    ClientData,
    augment,
    draw_order,
    move_images,
    training_batches,
)
from fedsmooth_core.data.datasets import dataset_names, load_dataset, load_device_folder
from fedsmooth_core.data.info import ArrayDataset, DatasetInfo
from fedsmooth_core.data.inspection import folder_problems
from fedsmooth_core.data.partition import client_indices, held_out_indices

__all__ = [
    "ArrayDataset",
    "BatchOrder",
    "ClientData",
    "DatasetInfo",
    "augment",
    "client_indices",
    "dataset_names",
    "draw_order",
    "folder_problems",
    "held_out_indices",
    "load_dataset",
    "load_device_folder",
    "move_images",
    "training_batches",
]
