"""The images that a service can certify on: its operator names them, never a client."""

import contextlib
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path

from fedsmooth_core.config import FILE_NAME, DatasetConfig
from fedsmooth_core.data import ArrayDataset, dataset_names, load_dataset
from fedsmooth_core.errors import ConfigError, DataError, ServiceError

_FOLDER = "imagefolder"

_Key = tuple[str, int | None]


class Datasets:
    """Test sets by name, opened when they are first asked for and kept open.

    Every data set that the core can load by itself is there: ``digits``, and those of torchvision,
    which are downloaded to the default folder when they are first asked for. A folder adds a name.
    Safe for threads: nobody waits for the opening of a set that he has not asked for.

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
        self._open: dict[_Key, ArrayDataset] = {}
        self._opening: dict[_Key, threading.Lock] = {}
        self._asked: dict[_Key, Future[ArrayDataset]] = {}
        self._in_turn = threading.Lock()

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
        self._check_name(name)
        key = (name, image_size)
        with self._lock:
            if key in self._open:
                return self._open[key]
            opening = self._opening.setdefault(key, threading.Lock())
        # One at a time: two calls for one set would decode it twice.
        with opening:
            if key not in self._open:
                found = self._load(name, image_size)
                with self._lock:
                    self._open[key] = found
            return self._open[key]

    def ask(self, name: str, image_size: int | None, most_sizes: int) -> Future[ArrayDataset]:
        """Return the test images of a name as soon as a thread of this object has opened them.

        Folders are opened one after the other, however many are asked for. A set that could not be
        opened is tried anew when it is asked for again.

        Args:
            name: one of :attr:`names`.
            image_size: side in pixels that the images of a folder are resized to.
            most_sizes: in how many sizes the images of a name may be open, or be asked for: each is
                a copy on the disk.

        Raises:
            DataError: if there are none of this name. That they cannot be read, the future says.
            ServiceError: if this size would be one more.
        """
        self._check_name(name)
        key = (name, image_size)
        with self._lock:
            if key in self._asked:
                return self._asked[key]
            future: Future[ArrayDataset] = Future()
            # From now on it cannot be cancelled: it is everybody's who asks.
            future.set_running_or_notify_cancel()
            if key in self._open:
                future.set_result(self._open[key])
                return future
            sizes = {size for one, size in (*self._open, *self._asked) if one == name}
            if len(sizes) >= most_sizes:
                known = ", ".join(
                    sorted("its own" if size is None else str(size) for size in sizes)
                )
                raise ServiceError(
                    f"the images of {name!r} are in use in {len(sizes)} sizes already ({known}): ask for "
                    "one of these, or have the service restarted.",
                    "RESOURCE_EXHAUSTED",
                )
            self._asked[key] = future
        # A daemon: a download that never ends does not keep the process.
        threading.Thread(target=self._answer, args=(key, future), daemon=True).start()
        return future

    def _check_name(self, name: str) -> None:
        if name not in self.names:
            raise DataError(
                f"this service has no data set {name!r}, only {', '.join(self.names)}: its operator "
                "can add a folder of images."
            )

    def _answer(self, key: _Key, future: Future[ArrayDataset]) -> None:
        try:
            # A download is mostly waiting, and may hang: it holds up no folder.
            with self._in_turn if key[0] in self._folders else contextlib.nullcontext():
                found = self.test_set(*key)
        except BaseException as error:
            with self._lock:
                del self._asked[key]
            future.set_exception(error)
        else:
            with self._lock:
                del self._asked[key]
            future.set_result(found)

    def _load(self, name: str, image_size: int | None) -> ArrayDataset:
        known = name in dataset_names()
        folder = self._folders.get(name)
        root = DatasetConfig.root if folder is None else str(folder)
        config = DatasetConfig(name if known else _FOLDER, root, image_size)
        try:
            return load_dataset(config, "test")
        except ConfigError as error:
            raise DataError(f"the data set {name!r} cannot be opened: {error}") from error
