"""A user's own images: ``train/<class>/*`` and ``test/<class>/*``, as torchvision's ImageFolder."""

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fedsmooth_core.data.info import SPLITS, Images, Labels
from fedsmooth_core.data.source import Decoded
from fedsmooth_core.errors import DataError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")
# Named one by one: Pillow would else go by a file's content alone, and hand some formats (EPS) to
# other programs.
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")

_Listing = dict[str, dict[str, list[tuple[str, int, int]]]]
"""split -> class -> (file name, bytes, modification time in ns), all in ascending order."""


class ImageFolder:
    """RGB images of one size; hidden files and files that are no images are passed over.

    Classes are numbered by their folders' names in ascending order, samples follow (class, name).

    Args:
        root: what holds a folder for each of ``splits``.
        image_size: side in pixels that images are resized to; None keeps their one native size.
        splits: both, or one alone, as a device's are read: that may hold a single class.
    """

    def __init__(
        self, root: Path, image_size: int | None, splits: tuple[str, ...] = SPLITS
    ) -> None:
        self._root = root
        self._image_size = image_size
        self._splits = splits

    def state(self) -> str:
        return self._state(_scan(self._root, self._splits))

    def decode(self) -> Decoded:
        listing = _scan(self._root, self._splits)
        first = self._splits[0]
        class_names = tuple(listing[first])
        paths = {
            split: [
                self._root / split / name / file
                for name, files in classes.items()
                for file, _, _ in files
            ]
            for split, classes in listing.items()
        }
        size = self._size(paths[first][0])
        return Decoded(
            state=self._state(listing),
            class_names=class_names,
            max_value=255,
            splits={
                split: (
                    _decode_all(paths[split], size, resize=self._image_size is not None),
                    _labels(listing[split]),
                )
                for split in self._splits
            },
        )

    def _state(self, listing: _Listing) -> str:
        return json.dumps([str(self._root), self._image_size, listing])

    def _size(self, first: Path) -> tuple[int, int]:
        """Return (width, height) of every image: what was asked for, or that of the first."""
        if self._image_size is not None:
            return self._image_size, self._image_size
        _, height, width = decode_image(first).shape
        return width, height


def _scan(root: Path, splits: tuple[str, ...]) -> _Listing:
    listing: _Listing = {}
    for split in splits:
        folder = root / split
        if not folder.is_dir():
            wanted = " and ".join(f"{split}/<class>/" for split in splits)
            raise DataError(f"{folder} is missing: {root} must hold folders of images {wanted}.")
        listing[split] = {name: scan_class(folder / name) for name in class_folders(folder)}
    if len(splits) == 1:
        return listing
    _check_same_classes(root, listing)
    if len(listing["train"]) < 2:
        raise DataError(f"{root} holds one class alone: a classifier needs two or more.")
    return listing


def class_folders(folder: Path) -> list[str]:
    """Return the names of the class folders in ``train`` or ``test``, ascending.

    Raises:
        DataError: when there is none, or the folder cannot be listed.
    """
    with _listed(folder) as entries:
        names = sorted(entry.name for entry in entries if _is_class_folder(entry))
    if not names:
        raise DataError(
            f"{folder} holds no class folder: put its images in one folder a class, "
            f"{folder / '<class>'}."
        )
    return names


@contextmanager
def _listed(folder: Path) -> Iterator[Iterator[os.DirEntry[str]]]:
    try:
        with os.scandir(folder) as entries:
            yield entries
    except OSError as error:
        raise DataError(
            f"{folder} cannot be listed ({error.strerror}): make it readable for this user."
        ) from error


def _is_class_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")


def scan_class(folder: Path) -> list[tuple[str, int, int]]:
    """Return (file name, bytes, modification time in ns) of a class's images, ascending.

    Raises:
        DataError: when there is none, or the folder holds another one or what is no file.
    """
    files = []
    with _listed(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                raise DataError(
                    f"{entry.path} is a folder in a class folder: move its images into {folder}."
                )
            if entry.name.lower().endswith(_SUFFIXES):
                try:
                    facts = entry.stat()
                except OSError as error:
                    raise _unreadable(Path(entry.path), error) from error
                if not stat.S_ISREG(facts.st_mode):  # reading a pipe would wait for ever
                    raise DataError(
                        f"{entry.path} is a pipe, socket or device, and no image: remove it."
                    )
                files.append((entry.name, facts.st_size, facts.st_mtime_ns))
    if not files:
        raise DataError(
            f"{folder} holds no image ({', '.join(_SUFFIXES)}): add one, or remove the class."
        )
    return sorted(files)


def _check_same_classes(root: Path, listing: _Listing) -> None:
    for here, there in (("train", "test"), ("test", "train")):
        for name in listing[here]:
            if name not in listing[there]:
                raise DataError(
                    f"{root / here / name} has no counterpart {root / there / name}: train and "
                    "test must hold the same classes."
                )


def _labels(classes: dict[str, list[tuple[str, int, int]]]) -> Labels:
    counts = [len(files) for files in classes.values()]
    return np.repeat(np.arange(len(counts), dtype=np.int64), counts)


def _decode_all(paths: list[Path], size: tuple[int, int], resize: bool) -> Images:
    width, height = size
    images = np.empty((len(paths), 3, height, width), dtype=np.uint8)
    # One thread: on two cores, a pool made 32x32 JPEGs 1.5x slower (they are mostly Python's work).
    for index, path in enumerate(paths):
        image = decode_image(path, size if resize else None)
        if image.shape != images.shape[1:]:
            raise DataError(
                f"{path} is {image.shape[2]}x{image.shape[1]} pixels where the first image is "
                f"{width}x{height}: set dataset.image_size to resize all images to one size."
            )
        images[index] = image
    return images


def decode_image(path: Path, resize_to: tuple[int, int] | None = None) -> Images:
    """Return an image as uint8 (3, H, W), resized to (width, height) pixels if that is given.

    Raises:
        DataError: when the file is no sound 8-bit image.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image.mode.startswith(("I", "F")) or _is_deep(image):
                raise ValueError("it has more than 8 bits a channel")
            rgb = image.convert("RGB")
    except Exception as error:  # a broken file raises whatever its format's decoder stumbles over
        raise _unreadable(path, error) from error
    if resize_to is not None and rgb.size != resize_to:
        rgb = rgb.resize(resize_to, Image.Resampling.BILINEAR)
    return np.asarray(rgb, dtype=np.uint8).transpose(2, 0, 1)


def _is_deep(image: Any) -> bool:
    """Say whether an image that Pillow reads as 8-bit colours has more bits in its file.

    Pillow tells by the name of the file's own pixels, e.g. ``RGB;16B``, until they are decoded.
    """
    return any(re.search(";16[BLN]", str(tile[3])) for tile in getattr(image, "tile", ()))


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return DataError(
        f"{path} cannot be read as an image ({reason}): replace the file with a sound 8-bit image, "
        "or remove it."
    )
