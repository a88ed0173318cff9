"""Decoded data sets on disk: made once, then memory-mapped by every process of the machine.

An entry is a folder named by a digest of its source's state, so a changed source never meets a
stale entry. It appears by one rename, so whoever sees it sees all of it. Entries may be deleted at
any time; they are made again.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np

from fedsmooth_core.data.info import ArrayDataset, DatasetInfo, Images
from fedsmooth_core.data.source import Decoded, Source
from fedsmooth_core.errors import DataError

try:
    import fcntl
except ImportError:  # no POSIX system: processes may decode twice, but never read half an entry
    fcntl = None  # type: ignore[assignment]

_FORMAT = 1
_MIN_STD = 1 / 255
_COUNTED_AT_ONCE = 4096  # images: bounds the memory that counting takes
_INFO = "info.json"

logger = logging.getLogger(__name__)


def open_cached(name: str, source: Source, split: str) -> ArrayDataset:
    """Open one split of a data set, decoding the whole of it first if no entry is there yet.

    Raises:
        DataError: when the source cannot be decoded, the cache folder cannot be written, or an
            entry is damaged.
    """
    folder = _cache_folder()
    entry = _entry(folder, name, source.state())
    if not entry.is_dir():
        entry = _make(entry, name, source)
    return _read(entry, split)


def _cache_folder() -> Path:
    return Path(os.environ.get("FEDSMOOTH_CACHE") or "~/.cache/fedsmooth/decoded").expanduser()


def _entry(folder: Path, name: str, state: str) -> Path:
    digest = hashlib.blake2b(f"{_FORMAT}\n{name}\n{state}".encode(), digest_size=12).hexdigest()
    return folder / f"{name}-{digest}"


def _make(entry: Path, name: str, source: Source) -> Path:
    folder = entry.parent
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(entry):
        entry = _entry(folder, name, source.state())
        if entry.is_dir():  # another process made it while this one waited for the lock
            return entry
        logger.info("Decoding the data set %s into %s (once).", name, folder)
        decoded = source.decode()
        entry = _entry(folder, name, decoded.state)
        with _explained(folder):
            _write(entry, name, decoded)
        return entry


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"The folder of decoded data sets {folder} cannot be written ({error.strerror}): set "
            "the environment variable FEDSMOOTH_CACHE to a writable folder with enough space."
        ) from error


@contextlib.contextmanager
def _locked(entry: Path) -> Iterator[None]:
    """Let one process at a time make an entry: the others would download and decode the same.

    The system releases the lock of a process that dies. The cache stays sound without the lock.
    """
    with contextlib.ExitStack() as stack:
        with _explained(entry.parent):
            file = stack.enter_context((entry.parent / f".{entry.name}.lock").open("w"))
        if fcntl is not None:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(entry: Path, name: str, decoded: Decoded) -> None:
    temporary = entry.parent / f".{entry.name}.{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        for split, (images, labels) in decoded.splits.items():
            for kind, array in (("images", images), ("labels", labels)):
                with _array_file(temporary, split, kind).open("wb") as file:
                    np.save(file, array, allow_pickle=False)
                    _to_disk(file)
        with (temporary / _INFO).open("w", encoding="utf-8") as file:
            json.dump(asdict(_describe(name, decoded)), file, indent=1)
            _to_disk(file)
        try:
            temporary.rename(entry)
        except OSError:
            if not entry.is_dir():  # else another writer was first, and its entry is as good
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _to_disk(file: IO[Any]) -> None:
    """After a power cut, a renamed folder must not hold files whose content was never written."""
    file.flush()
    os.fsync(file.fileno())


def _array_file(folder: Path, split: str, kind: str) -> Path:
    return folder / f"{split}_{kind}.npy"


def _describe(name: str, decoded: Decoded) -> DatasetInfo:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([name, decoded.class_names, decoded.max_value]).encode())
    for split in decoded.splits:
        for array in decoded.splits[split]:
            digest.update(json.dumps([split, array.shape]).encode())
            digest.update(np.ascontiguousarray(array).data)
    # A device's test images are decoded alone: what it tests on is no part of what it trains on.
    images, _ = decoded.splits.get("train") or decoded.splits["test"]
    mean, std = _mean_and_std(images, decoded.max_value)
    _, channels, height, width = images.shape
    return DatasetInfo(
        name=name,
        class_names=decoded.class_names,
        shape=(channels, height, width),
        max_value=decoded.max_value,
        mean=mean,
        std=std,
        fingerprint=digest.hexdigest(),
    )


def _mean_and_std(images: Images, max_value: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return each channel's float64 mean and std, from exact counts of its values."""
    counts = np.zeros((images.shape[1], 256), dtype=np.int64)
    for start in range(0, len(images), _COUNTED_AT_ONCE):
        for channel, count in enumerate(counts):
            some = images[start : start + _COUNTED_AT_ONCE, channel]
            count += np.bincount(some.ravel(), minlength=256)
    values = np.arange(256) / max_value
    shares = counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ values
    variance = (shares * (values - mean[:, np.newaxis]) ** 2).sum(axis=1)
    return tuple(mean.tolist()), tuple(np.maximum(np.sqrt(variance), _MIN_STD).tolist())


def _read(entry: Path, split: str) -> ArrayDataset:
    try:
        fields = json.loads((entry / _INFO).read_text(encoding="utf-8"))
        lists = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
        info = DatasetInfo(**{**fields, **lists})
        images = np.load(_array_file(entry, split, "images"), mmap_mode="r", allow_pickle=False)
        labels = np.load(_array_file(entry, split, "labels"), mmap_mode="r", allow_pickle=False)
        if images.shape != (len(labels), *info.shape):
            raise ValueError(f"{images.shape} images and {labels.shape} labels")
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise DataError(
            f"The decoded data set {entry} is damaged ({error}): delete that folder, and it will "
            "be made again."
        ) from error
    return ArrayDataset(info=info, split=split, images=images, labels=labels)
