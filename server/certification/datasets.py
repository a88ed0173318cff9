"""The images that a service can certify on: its operator names them, never a client."""

import threading
from collections.abc import Mapping
from pathlib import Path

from fedsmooth_core.config import FILE_NAME, DatasetConfig
from fedsmooth_core.data import ArrayDataset, dataset_names, load_dataset
from fedsmooth_core.errors import ConfigError, DataError

_FOLDER = "imagefolder"


class Datasets:
    """Test sets by name, opened when they are first asked for and kept open.

    Every data set that the core can load by itself is there: ``digits``, and those of torchvision,
    which are downloaded to the default folder when they are first asked for. A folder adds a name.

    Args:
        folders: name -> folder. Under the name of a torchvision data set it holds that set's files,
            under any other one images as ``test/<class>/*`` and ``train/<class>/*``.

    Raises:
        ConfigError: for a name that cannot be one, or that needs no folder.
    """

    def __init__(self, folders: Mapping[str, Path] | None = None) -> None:
        self._folders = dict(folders or {})
        for name in self._folders:
            if not FILE_NAME.test(name):
                raise ConfigError(
                    f"{name!r} cannot name a data set: allowed is {FILE_NAME.text}, e.g. "
                    "signs=/data/signs."
                )
            if name == "digits":
                raise ConfigError(
                    "digits come with the program and take no folder: choose another name."
                )
        self._lock = threading.Lock()
        self._open: dict[tuple[str, int | None], ArrayDataset] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that a job may ask for."""
        known = [name for name in dataset_names() if name != _FOLDER]
        return (*known, *(name for name in self._folders if name not in known))

    def test_set(self, name: str, image_size: int | None = None) -> ArrayDataset:
        """Return the test images of a name; the first call may take long.

        Args:
            name: one of :attr:`names`.
            image_size: side in pixels that the images of a folder are resized to.

        Raises:
            DataError: if there are none of this name, or they cannot be read.
        """
        if name not in self.names:
            raise DataError(
                f"this service has no data set {name!r}, only {', '.join(self.names)}: its operator "
                "can add a folder of images."
            )
        # One at a time: two calls for one set would decode it twice.
        with self._lock:
            if (name, image_size) not in self._open:
                self._open[name, image_size] = self._load(name, image_size)
            return self._open[name, image_size]

    def _load(self, name: str, image_size: int | None) -> ArrayDataset:
        known = name in dataset_names()
        folder = self._folders.get(name)
        root = DatasetConfig.root if folder is None else str(folder)
        config = DatasetConfig(name if known else _FOLDER, root, image_size)
        try:
            return load_dataset(config, "test")
        except ConfigError as error:
            raise DataError(f"the data set {name!r} cannot be opened: {error}") from error
