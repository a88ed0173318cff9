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
    """A client's samples on one device, as bytes: a quarter of what float32 would take."""

    images: Tensor
    """uint8, (N, C, H, W), values 0 to ``max_value``."""
    labels: Tensor
    """int64, (N,)."""
    max_value: int
    """The uint8 value that means 1.0."""
    rows: Tensor | None = None
    """int64, (n,), on the same device: which of the N samples are this client's; None: all of them. So
    many clients share one data set."""

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

    def subset(self, rows: npt.NDArray[np.int64]) -> "ClientData":
        """Return the samples at ``rows`` of these as a client's own; no image is copied."""
        return ClientData(
            self.images,
            self.labels,
            self.max_value,
            torch.from_numpy(np.array(rows)).to(self.labels.device),
        )

    def __len__(self) -> int:
        return len(self.labels if self.rows is None else self.rows)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def num_examples(self) -> int:
        """n_k, the weight of this client in the average of the models."""
        return len(self)

    def batch(self, indices: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return images in [0, 1] of shape (B, C, H, W), and labels, int64 (B,).

        Args:
            indices: int64 (B,), on any device; the batch is on the data's device.
            dtype: of the images.
        """
        indices = self.places(indices)
        return self.images[indices].to(dtype) / self.max_value, self.labels[indices]

    def places(self, indices: Tensor) -> Tensor:
        """Return where in ``images`` this client's samples of these numbers are, on the device."""
        indices = indices.to(self.labels.device)
        return indices if self.rows is None else self.rows[indices]


@dataclass(frozen=True, eq=False)
class BatchOrder:
    """Which samples make the mini-batches of a client's round, and how each is augmented."""

    indices: Tensor
    """int64 (E, B), numbers of the client's samples."""
    moves: Tensor
    """int64 (E, B, 3): row and column of the crop in the padded image, 1 to mirror it."""


def draw_order(
    num_samples: int,
    batch_size: int,
    num_batches: int,
    generator: torch.Generator,
    flip: bool = False,
    crop_padding: int = 0,
) -> BatchOrder:
    """Draw ``num_batches`` (at least 1) mini-batches of an endless, shuffled stream.

    The stream is one permutation of the samples after another, cut into batches of exactly
    min(batch_size, N); a batch may straddle two permutations.

    Args:
        num_samples: N.
        batch_size: B, at most.
        num_batches: E.
        generator: a CPU generator, the source of all draws.
        flip: whether images are mirrored.
        crop_padding: black pixels added to each side before a crop.

    Raises:
        DataError: when there is no sample.
    """
    if not num_samples:
        raise DataError("There is no sample to train on: give this client at least one image.")
    size = min(batch_size, num_samples)
    total = size * num_batches
    num_permutations = -(-total // num_samples)
    order = [torch.randperm(num_samples, generator=generator) for _ in range(num_permutations)]
    indices = torch.cat(order)[:total]
    moves = _draw_moves(total, generator, flip, crop_padding)
    return BatchOrder(indices.view(num_batches, size), moves.view(num_batches, size, 3))


def training_batches(
    data: ClientData,
    batch_size: int,
    num_batches: int,
    generator: torch.Generator,
    flip: bool = False,
    crop_padding: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return the augmented mini-batches of :func:`draw_order`.

    Every draw is made, from the CPU ``generator``, by the time this returns: batches depend neither
    on the device nor on what else draws from the generator while they are used.

    Returns:
        Pairs as :meth:`ClientData.batch` gives them, on the data's device.

    Raises:
        DataError: when there is no sample.
    """
    drawn = draw_order(len(data), batch_size, num_batches, generator, flip, crop_padding)
    device = data.labels.device
    indices, moves = drawn.indices.to(device), drawn.moves.to(device)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for these, their_moves in zip(indices, moves, strict=True):
            x, y = data.batch(these, dtype)
            yield move_images(x, their_moves, flip, crop_padding), y

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
    return move_images(x, moves.to(x.device), flip, crop_padding)


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


def move_images(x: Tensor, moves: Tensor, flip: bool, crop_padding: int) -> Tensor:
    """Augment images (B, C, H, W) by their moves (B, 3), which a :class:`BatchOrder` holds."""
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
