"""Normalisation as a layer, so that noise, attacks and radii live in [0, 1] pixel units."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedsmooth_core.errors import ConfigError


class Normalise(nn.Module):
    """Map images in [0, 1] (noisy ones may leave it) to (x - mean) / std, channel by channel.

    ``mean`` and ``std`` are float32 buffers of shape (channels, 1, 1) and part of the state dict.

    Raises:
        ConfigError: if a mean is not finite, or a std is not finite and positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if not all(math.isfinite(value) for value in mean):
            raise ConfigError(f"the normalisation's mean {list(mean)} must be finite numbers.")
        if not all(0 < value < math.inf for value in std):
            raise ConfigError(f"the normalisation's std {list(std)} must be finite numbers > 0.")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std
