"""The data sets that torchvision downloads: CIFAR-10, CIFAR-100, SVHN, MNIST, Fashion-MNIST."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedsmooth_core.data.info import SPLITS, Images, Labels
from fedsmooth_core.data.source import Decoded
from fedsmooth_core.errors import DataError

_DIGITS = tuple("0123456789")


@dataclass(frozen=True)
class _Spec:
    """How torchvision keeps one data set."""

    class_name: str
    files: str
    """Glob of its raw files below the root."""
    axes: tuple[int, ...]
    """Transposes its stored arrays, with a channel axis added last if they have none, to NCHW."""
    class_names: tuple[str, ...] | None = None
    """None takes torchvision's own."""


_NHWC = (0, 3, 1, 2)
_NCHW = (0, 1, 2, 3)
_SPECS = {
    "cifar10": _Spec("CIFAR10", "cifar-10-batches-py/*", _NHWC),
    "cifar100": _Spec("CIFAR100", "cifar-100-python/*", _NHWC),
    "svhn": _Spec("SVHN", "*_32x32.mat", _NCHW, _DIGITS),
    "mnist": _Spec("MNIST", "MNIST/*/*", _NHWC, _DIGITS),
    "fashion_mnist": _Spec("FashionMNIST", "FashionMNIST/*/*", _NHWC),
}
TORCHVISION_NAMES = tuple(_SPECS)


class TorchvisionSource:
    """One of :data:`TORCHVISION_NAMES`, read from ``root`` and downloaded there when missing."""

    def __init__(self, name: str, root: Path) -> None:
        self._name = name
        self._root = root
        self._spec = _SPECS[name]

    def state(self) -> str:
        files = sorted(path for path in self._root.glob(self._spec.files) if path.is_file())
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return json.dumps([str(self._root), stats])

    def decode(self) -> Decoded:
        try:
            opened = {split: self._open(split) for split in SPLITS}
        except (
            Exception
        ) as error:  # torchvision raises many kinds, for a download as for a bad file
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
            raise DataError(
                f"dataset.name={self._name} could be neither read from {self._root} nor downloaded "
                f"({reason}): where there is no network, put torchvision's raw files there "
                f"({self._root / self._spec.files})."
            ) from error
        class_names = self._spec.class_names or tuple(opened["train"].classes)
        return Decoded(
            state=self.state(),  # after the download, which changed it
            class_names=class_names,
            max_value=255,
            splits={split: self._arrays(dataset) for split, dataset in opened.items()},
        )

    def _open(self, split: str) -> Any:
        import torchvision

        cls = getattr(torchvision.datasets, self._spec.class_name)
        if self._name == "svhn":
            return cls(self._root, split=split, download=True)
        return cls(self._root, train=split == "train", download=True)

    def _arrays(self, dataset: Any) -> tuple[Images, Labels]:
        images = np.asarray(dataset.data, dtype=np.uint8)
        if images.ndim == 3:
            images = images[..., np.newaxis]
        labels = dataset.labels if self._name == "svhn" else dataset.targets
        return (
            np.ascontiguousarray(images.transpose(self._spec.axes)),
            np.asarray(labels, dtype=np.int64),
        )
