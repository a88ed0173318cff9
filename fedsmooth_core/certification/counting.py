"""Sampling under noise: how often a model predicts each class for noisy copies of each image.

CERTIFY and PREDICT both rest on it. Its promise is that an image's counts depend on the weights,
the image, sigma and (seed, purpose, dataset index) alone: not on the batch size, the order of the
images, which of them share a batch, or where a run was interrupted. An image's noise has streams of its
own, and all passes have one shape: :mod:`~fedsmooth_core.certification.passes`.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsmooth_core.certification.bounds import check_sigma
from fedsmooth_core.certification.passes import NOISE_BLOCK, Block, Passes
from fedsmooth_core.errors import CertificationError
from fedsmooth_core.seeding import Purpose, torch_generator

PASSES_PER_GROUP = 16
"""Passes, about, from one group of results to the next: few, to see progress; yet well filled."""

Stream = tuple[Purpose, int]
"""A noise stream of an image, and how many draws of it to count."""


def count_predictions(
    model: nn.Module,
    images: Tensor,
    indices: Sequence[int],
    streams: Sequence[Stream],
    *,
    max_value: float,
    sigma: float,
    seed: int,
    batch_size: int | None,
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
        batch_size: noisy images in one forward pass, or None: as for
            :class:`~fedsmooth_core.certification.passes.Passes`.
        device: where to compute.

    Yields:
        (group, counts): a slice of the images, in order, and their counts
        (images of the group, streams, classes).

    Raises:
        CertificationError: for an argument outside these ranges, or a model whose scores are not
            (batch, classes >= 2) or not finite.
    """
    check_sampling(images, indices, sigma)
    for purpose, num_draws in streams:
        check_draws(purpose, num_draws)
    passes = Passes(model, images.shape[1:], sigma=sigma, device=device, batch_size=batch_size)

    def groups() -> Iterator[tuple[slice, NDArray[np.int64]]]:
        start = 0
        while start < len(images):
            group = slice(start, min(start + images_per_group(passes, streams), len(images)))
            x = unit_images(images[group], max_value, passes.device)
            yield group, count_group(passes, x, indices[group], streams, seed)
            start = group.stop

    return groups()


def images_per_group(passes: Passes, streams: Sequence[Stream]) -> int:
    """Return how many images ``PASSES_PER_GROUP`` passes count, rounded up."""
    blocks_per_image = sum(-(-num_draws // NOISE_BLOCK) for _, num_draws in streams)
    return -(-PASSES_PER_GROUP * passes.num_blocks // blocks_per_image)


def check_sampling(images: Tensor, indices: Sequence[int], sigma: float) -> None:
    """Refuse what cannot be sampled with a :class:`CertificationError`."""
    check_sigma(sigma)
    if images.ndim != 4 or len(indices) != len(images):
        raise CertificationError(
            f"images of shape {tuple(images.shape)} with {len(indices)} indices cannot be sampled: "
            "give images (N, C, H, W) and N indices."
        )


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


def count_group(
    passes: Passes, x: Tensor, indices: Sequence[int], streams: Sequence[Stream], seed: int
) -> NDArray[np.int64]:
    """Count all draws of some images, (images, streams, classes), as :func:`count_predictions`.

    Args:
        passes: of the model.
        x: (N, C, H, W), float32 in [0, 1], on the device of the passes.
        indices: N dataset indices, which name the images' noise.
        streams: (purpose, number of draws >= 1) of each stream to count.
        seed: of the run.
    """

    def blocks() -> Iterator[Block]:
        # A tally is one (image, stream); its blocks follow each other, so its generator runs in order.
        tally = 0
        for image, index in enumerate(indices):
            for purpose, num_draws in streams:
                generator = torch_generator(seed, purpose, int(index), device=x.device)
                for counted in counted_of_blocks(num_draws):
                    yield Block(image, generator, tally, counted)
                tally += 1

    counts = passes.count(x, blocks(), len(indices) * len(streams), indices)
    return counts.reshape(len(indices), len(streams), -1)


def counted_of_blocks(num_draws: int) -> Iterable[int]:
    """Return how many draws of each block count, block by block."""
    return (min(NOISE_BLOCK, num_draws - first) for first in range(0, num_draws, NOISE_BLOCK))
