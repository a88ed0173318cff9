"""The registry of data sets, and the one call that opens one of them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedsmooth_core.config import DatasetConfig
from fedsmooth_core.data.cache import open_cached
from fedsmooth_core.data.digits import Digits
from fedsmooth_core.data.imagefolder import ImageFolder
from fedsmooth_core.data.info import SPLITS, ArrayDataset
from fedsmooth_core.data.source import Source
from fedsmooth_core.data.torchvision_source import TORCHVISION_NAMES, TorchvisionSource
from fedsmooth_core.errors import ConfigError, DataError


def dataset_names() -> tuple[str, ...]:
    """Return every name that ``dataset.name`` may have."""
    return ("digits", *TORCHVISION_NAMES, "imagefolder")


def load_dataset(config: DatasetConfig, split: str) -> ArrayDataset:
    """Open one split (``train`` or ``test``) of a data set, memory-mapped from the decoded cache.

    The first call on a machine downloads what is missing and decodes; any later one, in any
    process, only maps files. The cache is the folder named by the environment variable
    FEDSMOOTH_CACHE, or ``~/.cache/fedsmooth/decoded``.

    Raises:
        ConfigError: for an unknown name or split, or settings that do not go together.
        DataError: when the images cannot be read or downloaded, or the cache cannot be written.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split!r} is not part of a data set: allowed are train, test.")
    return open_cached(config.name, _source(config), split)


def load_device_folder(
    folder: str, image_size: int | None, class_names: Sequence[str], split: str = "train"
) -> ArrayDataset:
    """Open a device's own images, ``<split>/<class>/*``, with the labels of its federation.

    A device may lack some of the classes; label k is ``class_names[k]`` all the same. Cached as
    :func:`load_dataset` does.

    Args:
        folder: what holds train/, and perhaps test/.
        image_size: side in pixels that images are resized to; None keeps their one native size.
        class_names: the federation's.
        split: ``train`` or ``test``; neither is looked at for the other.

    Raises:
        DataError: for a class that the federation does not know, or images that cannot be read.
    """
    root = Path(folder).expanduser().absolute()
    own = open_cached("device", ImageFolder(root, image_size, splits=(split,)), split)
    unknown = [name for name in own.info.class_names if name not in class_names]
    if unknown:
        raise DataError(
            f"{folder} has the classes {', '.join(own.info.class_names)}, but the federation's are "
            f"{', '.join(class_names)}: rename or remove {', '.join(unknown)} in {split}/."
        )
    label_of = np.array([class_names.index(name) for name in own.info.class_names], dtype=np.int64)
    info = replace(own.info, class_names=tuple(class_names))
    return ArrayDataset(info, split, own.images, label_of[own.labels])


def _source(config: DatasetConfig) -> Source:
    root = Path(config.root).expanduser().absolute()
    if config.name == "imagefolder":
        if config.root == DatasetConfig.root:
            raise ConfigError(
                f"dataset.name=imagefolder reads your own images, but dataset.root={config.root} "
                "is still its default: set it to the folder that holds train/ and test/."
            )
        return ImageFolder(root, config.image_size)
    if config.image_size is not None:
        raise ConfigError(
            f"dataset.image_size={config.image_size} belongs to dataset.name=imagefolder: set "
            f"dataset.image_size=null for {config.name}, whose images keep their own size."
        )
    if config.name == "digits":
        return Digits()
    if config.name in TORCHVISION_NAMES:
        return TorchvisionSource(config.name, root)
    raise ConfigError(
        f"dataset.name={config.name!r} is not a known data set: allowed are "
        f"{', '.join(dataset_names())}."
    )
