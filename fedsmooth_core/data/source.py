"""What every kind of data set offers to the cache: its state, and its decoded arrays."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from fedsmooth_core.data.info import Images, Labels


@dataclass(frozen=True, eq=False)
class Decoded:
    """A whole data set in memory, as a source decoded it."""

    state: str
    """The :meth:`Source.state` that these arrays were made from."""
    class_names: tuple[str, ...]
    max_value: int
    splits: Mapping[str, tuple[Images, Labels]]
    """``train`` and ``test`` (a device: one of them alone): images (N, C, H, W) and labels (N,)."""


class Source(Protocol):
    """Where a data set comes from."""

    def state(self) -> str:
        """Describe, cheaply, all that the decoded arrays depend on; they are cached under it.

        Raises:
            DataError: when the source cannot be used as it is.
        """
        ...

    def decode(self) -> Decoded:
        """Read (and where that is possible, first download) the data set; may take a minute.

        Raises:
            DataError: when it cannot be read, naming the file or folder at fault.
        """
        ...
