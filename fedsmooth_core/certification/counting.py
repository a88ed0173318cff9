"""Sampling under noise: how often a model predicts each class for noisy copies of each image.

CERTIFY and PREDICT both rest on it. Its promise is that an image's counts depend on the weights,
the image, sigma and (seed, purpose, dataset index) alone: not on the batch size, the order of the
images, which of them share a batch, or where a run was interrupted. Two measures keep it:

- An image's noise is a sequence of blocks of ``NOISE_BLOCK`` draws, each filled by exactly one
  ``normal_`` of that image's own generator. PyTorch's streams are not invariant to how they are
  chunked: the CPU's wants multiples of 16 elements, CUDA's depends on the size of each launch.
- Every forward pass has the same shape, whole blocks. On a CPU the scores of an image were seen to
  differ in the last bit below 50 images a pass, and never from there up (the networks of this
  package, batches of 50 to 1,024); another device or a new kernel choice may round otherwise.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsmooth_core.certification.bounds import check_sigma
from fedsmooth_core.errors import CertificationError
from fedsmooth_core.seeding import Purpose, torch_generator

NOISE_BLOCK = 128
"""Draws that one ``normal_`` fills. Part of what a certificate's noise is: never change it."""

BATCHES_PER_GROUP = 16
"""Batches, about, from one group of results to the next: few, to see progress; yet well filled."""

Stream = tuple[Purpose, int]
"""A noise stream of an image, and how many draws of it to count."""


class Block(NamedTuple):
    """The next ``NOISE_BLOCK`` draws of one noise stream of an image."""

    image: int
    """Row of the image among those at hand."""
    generator: torch.Generator
    """The stream; it moves on by one block."""
    tally: int
    """Which tally the predictions are counted in."""
    counted: int
    """How many of the draws, from the first on, count."""


def count_predictions(
    model: nn.Module,
    images: Tensor,
    indices: Sequence[int],
    streams: Sequence[Stream],
    *,
    max_value: float,
    sigma: float,
    seed: int,
    batch_size: int,
    device: torch.device | str,
) -> Iterator[tuple[slice, NDArray[np.int64]]]:
    """Count the classes predicted for x + d, d ~ N(0, sigma^2 I), never clipped.

    Arguments are checked at the call; the work is done group by group as the result is iterated.

    Args:
        model: from float32 images in [0, 1] (normalisation inside) to scores (batch, classes), on
            ``device``. It runs in eval mode without gradients; its own modes are restored.
        images: (N, C, H, W), of any number type and on any device.
        indices: N dataset indices, which name the images' noise.
        streams: (purpose, number of draws >= 1) of each stream to count.
        max_value: the pixel value that means 1.0 (255 for 8-bit images, 1 for images in [0, 1]).
        sigma: noise level in [0, 1] pixel units, > 0.
        seed: of the run.
        batch_size: noisy images in one forward pass, rounded down to whole blocks, at least one.
        device: where to compute.

    Yields:
        (group, counts): a slice of the images, in order, and their counts
        (images of the group, streams, classes).

    Raises:
        CertificationError: for an argument outside these ranges, or a model whose scores are not
            (batch, classes >= 2) or not finite.
    """
    check_sampling(images, indices, sigma, batch_size)
    for purpose, num_draws in streams:
        check_draws(purpose, num_draws)
    blocks_per_image = sum(-(-num_draws // NOISE_BLOCK) for _, num_draws in streams)
    group_size = -(-BATCHES_PER_GROUP * blocks_in(batch_size) // blocks_per_image)

    def groups() -> Iterator[tuple[slice, NDArray[np.int64]]]:
        for start in range(0, len(images), group_size):
            group = slice(start, min(start + group_size, len(images)))
            x = unit_images(images[group], max_value, device)
            yield group, _count_group(model, x, indices[group], streams, sigma, seed, batch_size)

    return groups()


def blocks_in(batch_size: int) -> int:
    """Return how many whole blocks a forward pass takes, at least one."""
    return max(1, batch_size // NOISE_BLOCK)


def check_sampling(images: Tensor, indices: Sequence[int], sigma: float, batch_size: int) -> None:
    """Refuse what cannot be sampled with a :class:`CertificationError`."""
    check_sigma(sigma)
    if images.ndim != 4 or len(indices) != len(images):
        raise CertificationError(
            f"images of shape {tuple(images.shape)} with {len(indices)} indices cannot be sampled: "
            "give images (N, C, H, W) and N indices."
        )
    if batch_size < 1:
        raise CertificationError(f"batch_size={batch_size!r} is out of range: allowed is >= 1.")


def check_draws(purpose: Purpose, num_draws: int) -> None:
    """Refuse less than one draw with a :class:`CertificationError`."""
    if num_draws < 1:
        raise CertificationError(
            f"{num_draws!r} draws for {purpose.value} are none: n0 and n must be >= 1."
        )


def unit_images(images: Tensor, max_value: float, device: torch.device | str) -> Tensor:
    """Return images as float32 in [0, 1] on a device.

    Raises:
        CertificationError: where ``max_value`` does not take them there.
    """
    x = images.to(device, torch.float32) / max_value
    if not bool(((x >= 0) & (x <= 1)).all()):
        raise CertificationError(
            f"with max_value={max_value!r}, pixels lie outside [0, 1]: give the pixel value that "
            "means 1.0 (255 for 8-bit images)."
        )
    return x


def _count_group(
    model: nn.Module,
    x: Tensor,
    indices: Sequence[int],
    streams: Sequence[Stream],
    sigma: float,
    seed: int,
    batch_size: int,
) -> NDArray[np.int64]:
    # A tally is one (image, stream); its blocks follow each other, so its generator runs in order.
    blocks = []
    for image, index in enumerate(indices):
        for stream, (purpose, num_draws) in enumerate(streams):
            generator = torch_generator(seed, purpose, int(index), device=x.device)
            tally = image * len(streams) + stream
            blocks += [
                Block(image, generator, tally, min(NOISE_BLOCK, num_draws - first))
                for first in range(0, num_draws, NOISE_BLOCK)
            ]
    counts = count_blocks(model, x, indices, blocks, sigma=sigma, batch_size=batch_size)
    return counts.reshape(len(indices), len(streams), -1)


@torch.inference_mode()
def count_blocks(
    model: nn.Module,
    x: Tensor,
    indices: Sequence[int],
    blocks: Sequence[Block],
    *,
    sigma: float,
    batch_size: int,
) -> NDArray[np.int64]:
    """Draw blocks of noise in their order, and count what the model predicts, tally by tally.

    Args:
        model: as for :func:`count_predictions`.
        x: (N, C, H, W), float32 in [0, 1], on the model's device.
        indices: N dataset indices, for an error to name.
        blocks: what to draw, at least one block.
        sigma: noise level in [0, 1] pixel units, > 0.
        batch_size: noisy images in one forward pass, rounded down to whole blocks, at least one.

    Returns:
        Counts (tallies, classes); the tallies are as many as the blocks number.

    Raises:
        CertificationError: for a model whose scores are not (batch, classes >= 2) or not finite.
    """
    device = x.device
    blocks_per_batch = blocks_in(batch_size)
    num_tallies = 1 + max(block.tally for block in blocks)
    # Blocks that count nothing fill the last batch: every forward pass has one shape.
    padding = [(0, 0, 0)] * (-len(blocks) % blocks_per_batch)
    plan = torch.tensor(
        [(block.image, block.tally, block.counted) for block in blocks] + padding, device=device
    )
    within_block = torch.arange(NOISE_BLOCK, device=device)
    noisy = x.new_zeros((blocks_per_batch, NOISE_BLOCK, *x.shape[1:]))
    counts: Tensor | None = None
    finite = torch.ones((), dtype=torch.bool, device=device)
    with _evaluating(model):
        for first in range(0, len(blocks), blocks_per_batch):
            last = first + blocks_per_batch
            for block, noise in zip(blocks[first:last], noisy, strict=False):
                noise.normal_(0.0, sigma, generator=block.generator)
            image_of_block, tally_of_block, counted_of_block = plan[first:last].unbind(1)
            noisy += x[image_of_block].unsqueeze(1)
            scores = model(noisy.flatten(0, 1))
            if counts is None:
                counts = _empty_counts(scores, noisy.shape[:2].numel(), num_tallies)
            finite &= scores.isfinite().all()
            prediction = scores.argmax(1).view(-1, NOISE_BLOCK)
            counted = within_block < counted_of_block.unsqueeze(1)
            cell = tally_of_block.unsqueeze(1) * counts.shape[1] + prediction
            # Counts stay on the device: a copy per batch would stall it.
            counts.view(-1).scatter_add_(0, cell.flatten(), counted.flatten().long())
    assert counts is not None
    if not finite:
        raise CertificationError(
            f"the model's scores for images {indices[0]} to {indices[-1]} are not finite: these "
            "weights cannot be certified (did training diverge?)."
        )
    return np.asarray(counts.cpu().numpy())


def _empty_counts(scores: Tensor, batch: int, num_tallies: int) -> Tensor:
    if scores.ndim != 2 or scores.shape[0] != batch or scores.shape[1] < 2:
        raise CertificationError(
            f"the model turned {batch} images into scores of shape {tuple(scores.shape)}: "
            f"a classifier gives ({batch}, classes) with at least 2 classes."
        )
    return torch.zeros((num_tallies, scores.shape[1]), dtype=torch.int64, device=scores.device)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    # Module by module: a model may hold parts that its owner keeps in eval mode while training.
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
