"""Everything that is wrong with a device's folder of images, not the first thing alone."""

import difflib
import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fedsmooth_core.data.imagefolder import class_folders, decode_image, scan_class
from fedsmooth_core.errors import DataError

_NAMED = 5  # files of one kind of problem; the others are counted


def folder_problems(
    folder: str,
    image_size: int | None,
    class_names: Sequence[str],
    shape: tuple[int, int, int],
) -> list[str]:
    """Return one sentence for each problem of ``folder/train`` and, where there is one, of
    ``folder/test``; reads every image.

    Args:
        folder: what holds train/, and perhaps test/.
        image_size: side in pixels that images are resized to; None keeps their own size.
        class_names: the federation's.
        shape: (C, H, W) of the images that the federation's model takes.
    """
    root = Path(folder).expanduser().absolute()
    train, test = root / "train", root / "test"
    if not train.is_dir():
        return [f"{train} is missing: put the images in one folder a class, {train / '<class>'}."]
    splits = [train, test] if test.is_dir() else [train]
    problems = [_split_problems(split, image_size, class_names, shape) for split in splits]
    return list(dict.fromkeys(itertools.chain.from_iterable(problems)))


def _split_problems(
    split: Path, image_size: int | None, class_names: Sequence[str], shape: tuple[int, int, int]
) -> list[str]:
    try:
        names = class_folders(split)
    except DataError as error:
        return [str(error)]
    problems = [
        _unknown_class(split / name, class_names) for name in names if name not in class_names
    ]
    unreadable: list[str] = []
    sizes: Counter[tuple[int, int]] = Counter()
    examples: dict[tuple[int, int], Path] = {}
    for name in names:
        try:
            files = [split / name / file for file, _, _ in scan_class(split / name)]
        except DataError as error:
            problems.append(str(error))
            continue
        for path in files:
            try:
                _, height, width = decode_image(path).shape
            except DataError as error:
                unreadable.append(str(error))
            else:
                sizes[width, height] += 1
                examples.setdefault((width, height), path)
    problems += unreadable[:_NAMED]
    if len(unreadable) > _NAMED:
        problems.append(
            f"Other images in {split} cannot be read either ({len(unreadable) - _NAMED} in number): "
            "replace or remove them."
        )
    return problems + _wrong_shape(image_size, shape, sizes, examples)


def _unknown_class(folder: Path, class_names: Sequence[str]) -> str:
    near = difflib.get_close_matches(folder.name, class_names, n=1, cutoff=0.5)
    near = near or [name for name in class_names if name.casefold() == folder.name.casefold()]
    known = ", ".join(class_names)
    if near:
        return f"{folder} is no class of the federation ({known}): rename it to {near[0]}, or remove it."
    return f"{folder} is no class of the federation ({known}): rename or remove the folder."


def _wrong_shape(
    image_size: int | None,
    shape: tuple[int, int, int],
    sizes: Counter[tuple[int, int]],
    examples: dict[tuple[int, int], Path],
) -> list[str]:
    channels, height, width = shape
    if channels != 3:
        return [
            f"The channels of the federation's images are {channels} in number, but a device's own images "
            "are read as RGB, 3 channels: leave out data-path, or ask the operator for a model of RGB."
        ]
    if image_size is not None:  # everything is resized, to what the model takes
        return []
    return [
        f"{examples[size]} is {size[0]}x{size[1]} pixels (images of this size: {count}), but the "
        f"federation's model takes {width}x{height}: resize such images."
        for size, count in sorted(sizes.items())
        if size != (width, height)
    ]
