"""What a data set is: its description, and one split of it as arrays."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SPLITS = ("train", "test")

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DatasetInfo:
    """Facts of a data set that hold for both of its splits."""

    name: str
    class_names: tuple[str, ...]
    """Label k is called ``class_names[k]``."""
    shape: tuple[int, int, int]
    """(C, H, W) of one image."""
    max_value: int
    """The uint8 value that means 1.0."""
    mean: tuple[float, ...]
    """Per channel, over the training images, in [0, 1] units."""
    std: tuple[float, ...]
    """Per channel, over the training images, in [0, 1] units; at least 1/255."""
    fingerprint: str
    """Digest of the decoded content: equal on two machines that hold the same images and labels."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


@dataclass(frozen=True, eq=False)
class ArrayDataset:
    """One split: all of its images and labels, memory-mapped from disk and read-only."""

    info: DatasetInfo
    split: str
    images: Images
    """uint8, (N, C, H, W), values 0 to ``info.max_value``."""
    labels: Labels
    """int64, (N,), values 0 to ``info.num_classes - 1``."""

    def __len__(self) -> int:
        return len(self.labels)
