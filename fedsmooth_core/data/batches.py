"""A client's samples resident on its device, and the mini-batches of local training."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from fedsmooth_core.data.info import ArrayDataset
from fedsmooth_core.errors import DataError


@dataclass(frozen=True, eq=False)
class ClientData:
    """Images and labels on one device, as bytes: a quarter of what float32 would take."""

    images: Tensor
    """uint8, (N, C, H, W), values 0 to ``max_value``."""
    labels: Tensor
    """int64, (N,)."""
    max_value: int
    """The uint8 value that means 1.0."""

    @classmethod
    def from_dataset(
        cls,
        dataset: ArrayDataset,
        indices: npt.NDArray[np.int64] | None = None,
        device: torch.device | str = "cpu",
    ) -> "ClientData":
        """Copy the samples at ``indices`` (None: all of them, in order) to ``device``."""
        # Either way a copy in memory, which PyTorch may own: the mapped file is read-only.
        chosen = slice(None) if indices is None else indices
        images = np.array(dataset.images[chosen])
        labels = np.array(dataset.labels[chosen])
        return cls(
            images=torch.from_numpy(images).to(device),
            labels=torch.from_numpy(labels).to(device),
            max_value=dataset.info.max_value,
        )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_examples(self) -> int:
        """n_k, the weight of this client in the average of the models."""
        return len(self)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return images, float32 in [0, 1] of shape (B, C, H, W), and labels, int64 (B,).

        Args:
            indices: int64 (B,), on any device; the batch is on the data's device.
        """
        indices = indices.to(self.labels.device)
        return self.images[indices].to(torch.float32) / self.max_value, self.labels[indices]


def training_batches(
    data: ClientData,
    batch_size: int,
    num_batches: int,
    generator: torch.Generator,
    flip: bool = False,
    crop_padding: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return ``num_batches`` (at least 1) augmented mini-batches of an endless, shuffled stream.

    The stream is one permutation of the samples after another, cut into batches of exactly
    min(batch_size, N); a batch may straddle two permutations. Every draw is made, from the CPU
    ``generator``, by the time this returns: batches depend neither on the device nor on what else
    draws from the generator while they are used.

    Returns:
        Pairs as :meth:`ClientData.batch` gives them, on the data's device.

    Raises:
        DataError: when there is no sample.
    """
    if not len(data):
        raise DataError("There is no sample to train on: give this client at least one image.")
    size = min(batch_size, len(data))
    total = size * num_batches
    device = data.labels.device
    num_permutations = -(-total // len(data))
    order = [torch.randperm(len(data), generator=generator) for _ in range(num_permutations)]
    indices = torch.cat(order)[:total].to(device)
    moves = _draw_moves(total, generator, flip, crop_padding).to(device)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, total, size):
            part = slice(start, start + size)
            x, y = data.batch(indices[part])
            yield _move(x, moves[part], flip, crop_padding), y

    return batches()


def augment(x: Tensor, generator: torch.Generator, flip: bool, crop_padding: int) -> Tensor:
    """Mirror images left to right with probability 1/2 and crop them after padding them with zeros.

    Args:
        x: (B, C, H, W), any device.
        generator: a CPU generator, the source of all draws.
        flip: whether to mirror.
        crop_padding: black pixels added to each side before an H x W crop at a uniform place.

    Returns:
        As ``x``; ``x`` itself when neither is asked for.
    """
    moves = _draw_moves(len(x), generator, flip, crop_padding)
    return _move(x, moves.to(x.device), flip, crop_padding)


def _draw_moves(count: int, generator: torch.Generator, flip: bool, crop_padding: int) -> Tensor:
    """Return int64 (count, 3): row and column of the crop in the padded image, 1 to mirror it."""
    highs = (2 * crop_padding, 2 * crop_padding, int(flip))
    columns = [
        torch.randint(high + 1, (count,), generator=generator)
        if high
        else torch.zeros(count, dtype=torch.int64)
        for high in highs
    ]
    return torch.stack(columns, dim=1)


def _move(x: Tensor, moves: Tensor, flip: bool, crop_padding: int) -> Tensor:
    if not flip and not crop_padding:
        return x
    size, channels, height, width = x.shape
    row, column, mirrored = moves.unbind(1)
    across = torch.arange(width, device=x.device).expand(size, width)
    across = torch.where(mirrored.bool().unsqueeze(1), across.flip(1), across)
    columns = column.unsqueeze(1) + across
    rows = row.unsqueeze(1) + torch.arange(height, device=x.device)
    padded = F.pad(x, [crop_padding] * 4)
    # One gather for both: pixel (h, w) of image b comes from (rows[b, h], columns[b, w]).
    image = torch.arange(size, device=x.device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=x.device).view(1, -1, 1, 1)
    return padded[image, channel, rows.view(size, 1, height, 1), columns.view(size, 1, 1, width)]
