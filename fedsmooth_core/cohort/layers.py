"""The layers of K clients' networks at once: weights (K, ...), activations (K, n, ...).

A layer keeps its weights in a layout of its own, makes of them once a local step what its many
passes need (``prepare``), and is applied to the activations of all clients together.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsmooth_core.cohort.convolution import Convolution

Weights = tuple[Tensor, ...]
"""One layer's weights of K clients, each (K, ...)."""


class Kept(NamedTuple):
    """What a layer keeps of a model's state, by its names there."""

    weights: tuple[str, ...] = ()
    """Trained."""
    buffers: tuple[str, ...] = ()
    """Not trained."""


class Layer(Protocol):
    """One layer of K clients."""

    kept: Kept

    def pack(self, weights: Weights) -> Weights:
        """Turn weights as a model has them, each (..., *shape), into the kept layout."""
        ...

    def unpack(self, weights: Weights) -> Weights:
        """Invert :meth:`pack`."""
        ...

    def prepare(self, weights: Weights) -> Weights:
        """Turn kept weights into what :meth:`apply` takes, once a local step; differentiable."""
        ...

    def apply(self, prepared: Weights, buffers: Weights, x: Tensor, training: bool) -> Tensor:
        """Compute the layer, as its module does in training or in eval mode."""
        ...


class _AsItIs:
    """Weights are kept and used in the layout that the model has them in."""

    kept = Kept()

    def pack(self, weights: Weights) -> Weights:
        return weights

    def unpack(self, weights: Weights) -> Weights:
        return weights

    def prepare(self, weights: Weights) -> Weights:
        return weights


class ConvolutionLayer:
    """A convolution, computed in the given way and dtype."""

    def __init__(self, name: str, has_bias: bool, way: Convolution, dtype: torch.dtype) -> None:
        names = (f"{name}.weight", f"{name}.bias") if has_bias else (f"{name}.weight",)
        self.kept = Kept(names)
        self._way, self._dtype = way, dtype

    def pack(self, weights: Weights) -> Weights:
        return (self._way.pack(weights[0]), *weights[1:])

    def unpack(self, weights: Weights) -> Weights:
        return (self._way.unpack(weights[0]), *weights[1:])

    def prepare(self, weights: Weights) -> Weights:
        bias = weights[1] if len(weights) > 1 else None
        weight, bias = self._way.prepare(weights[0], bias, self._dtype)
        return (weight,) if bias is None else (weight, bias)

    def apply(self, prepared: Weights, buffers: Weights, x: Tensor, training: bool) -> Tensor:
        bias = prepared[1] if len(prepared) > 1 else None
        return self._way.apply(x.to(self._dtype), prepared[0], bias)

    def linear_part(self, prepared: Weights, x: Tensor) -> Tensor:
        """Convolve without the bias."""
        return self._way.apply(x.to(self._dtype), prepared[0], None)


class LinearLayer(_AsItIs):
    """x W^T + b for each client, in the given dtype."""

    def __init__(self, name: str, has_bias: bool, dtype: torch.dtype) -> None:
        self.kept = Kept((f"{name}.weight", f"{name}.bias") if has_bias else (f"{name}.weight",))
        self._dtype = dtype

    def prepare(self, weights: Weights) -> Weights:
        return tuple(weight.to(self._dtype) for weight in weights)

    def apply(self, prepared: Weights, buffers: Weights, x: Tensor, training: bool) -> Tensor:
        weight, bias = prepared[0], prepared[1] if len(prepared) > 1 else None
        x = x.to(self._dtype)
        if len(x) == 1:
            bias = None if bias is None else bias.squeeze(0)
            return F.linear(x.squeeze(0), weight.squeeze(0), bias).unsqueeze(0)
        if bias is None:
            return torch.bmm(x, weight.mT)
        return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)


class BatchNormLayer(_AsItIs):
    """Batch normalisation: statistics of each client's own batch while it trains."""

    def __init__(self, name: str, module: nn.BatchNorm2d) -> None:
        assert module.momentum is not None
        self.kept = Kept(
            (f"{name}.weight", f"{name}.bias") if module.affine else (),
            tuple(
                f"{name}.{key}" for key in ("running_mean", "running_var", "num_batches_tracked")
            ),
        )
        self._momentum, self._eps = module.momentum, module.eps

    def apply(self, prepared: Weights, buffers: Weights, x: Tensor, training: bool) -> Tensor:
        running_mean, running_var, num_batches = buffers
        if training:
            num_batches += 1
        # One batch normalisation over the channels of all clients side by side.
        side_by_side = x.transpose(0, 1).flatten(1, 2) if len(x) > 1 else x.squeeze(0)
        weight, bias = (each.flatten() for each in prepared) if prepared else (None, None)
        out = F.batch_norm(
            side_by_side,
            running_mean.view(-1),
            running_var.view(-1),
            weight,
            bias,
            training,
            self._momentum,
            self._eps,
        )
        maps: Tensor = out.unflatten(1, (len(x), -1))
        return maps.transpose(0, 1)


class GroupNormLayer(_AsItIs):
    """Group normalisation: statistics of each image, so clients are but more images."""

    def __init__(self, name: str, module: nn.GroupNorm) -> None:
        self.kept = Kept((f"{name}.weight", f"{name}.bias") if module.affine else ())
        self._groups, self._eps = module.num_groups, module.eps

    def apply(self, prepared: Weights, buffers: Weights, x: Tensor, training: bool) -> Tensor:
        out = F.group_norm(x.flatten(0, 1), self._groups, eps=self._eps).view(x.shape)
        if not prepared:
            return out
        weight, bias = (each[:, None, :, None, None] for each in prepared)
        return out * weight + bias


class NormaliseLayer(_AsItIs):
    """(x - mean) / std, channel by channel."""

    def __init__(self, name: str) -> None:
        self.kept = Kept((), (f"{name}.mean", f"{name}.std"))

    def apply(self, prepared: Weights, buffers: Weights, x: Tensor, training: bool) -> Tensor:
        mean, std = (each.unsqueeze(1) for each in buffers)
        return (x - mean) / std

    def linear_part(self, buffers: Weights, x: Tensor) -> Tensor:
        """x / std: what is added to the result when x is added to the image."""
        return x / buffers[1].unsqueeze(1)


class ImageLayer(_AsItIs):
    """A function of each image by itself, without weights: activation, pooling, flattening, mean."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function

    def apply(self, prepared: Weights, buffers: Weights, x: Tensor, training: bool) -> Tensor:
        out: Tensor = self._function(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return out


class MaxPoolLayer(_AsItIs):
    """Max-pooling; on a CPU with the channels last, where it is ten times as fast."""

    def __init__(self, module: nn.MaxPool2d) -> None:
        self._module = module

    def apply(self, prepared: Weights, buffers: Weights, x: Tensor, training: bool) -> Tensor:
        images = x.flatten(0, 1)
        if not x.is_cuda:
            images = images.contiguous(memory_format=torch.channels_last)
        out: Tensor = self._module(images).unflatten(0, x.shape[:2])
        return out


def taken(names: tuple[str, ...], state: Mapping[str, Tensor]) -> Weights:
    """Return the tensors of these names."""
    return tuple(state[name] for name in names)
