"""Ways to compute one convolution for K clients, each with weights of its own.

All of them are exact: what they compute is the convolution, in another order of additions. Which is
fast depends on the machine, K and the sizes.

- :class:`Direct`: PyTorch's own, with a group for each client.
- :class:`SpaceToDepth`: blocks of stride x stride pixels become channels; the strided convolution
  becomes one of stride 1, with fewer and larger products. For a first layer of few channels.
- :class:`Unfolded`: a batched matrix product over the receptive fields.
- :class:`Dense`: a batched matrix product from all positions to all positions. On maps that are no
  larger than the kernel it does no more multiplications than the convolution with its padding.

Shapes: activations are (K, n, C, H, W), in any memory format.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedsmooth_core.config import AttackConfig


@dataclass(frozen=True)
class ConvShape:
    """What one convolution is: square kernel, stride and zero padding, ungrouped, undilated."""

    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    padding: int
    height: int
    """Of the maps that come in, in pixels."""
    width: int

    @classmethod
    def of(cls, layer: nn.Conv2d, height: int, width: int) -> "ConvShape | None":
        """Return a layer's shape for maps of a size, or None where it is of another kind."""
        square = all(
            isinstance(pair, tuple) and pair[0] == pair[1]
            for pair in (layer.kernel_size, layer.stride, layer.padding)
        )
        plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
        if not (square and plain):
            return None
        assert isinstance(layer.padding, tuple)
        kernel, stride, padding = layer.kernel_size[0], layer.stride[0], layer.padding[0]
        return cls(layer.in_channels, layer.out_channels, kernel, stride, padding, height, width)

    @property
    def out_height(self) -> int:
        return (self.height + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def out_width(self) -> int:
        return (self.width + 2 * self.padding - self.kernel) // self.stride + 1


class Convolution(Protocol):
    """One way. Weights are kept in a layout of its own, in which an SGD step is the same step."""

    def pack(self, weight: Tensor) -> Tensor:
        """Turn weights (..., Co, Ci, k, k) into the layout in which they are kept."""
        ...

    def unpack(self, weight: Tensor) -> Tensor:
        """Invert :meth:`pack`."""
        ...

    def prepare(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """Turn kept weights and biases (K, Co) into what :meth:`apply` takes, in the dtype that it is to
        compute in; differentiable."""
        ...

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve (K, n, Ci, H, W) with prepared weights: (K, n, Co, H', W'); differentiable."""
        ...


class _AsItIs:
    """Weights are kept in PyTorch's layout."""

    def pack(self, weight: Tensor) -> Tensor:
        return weight

    def unpack(self, weight: Tensor) -> Tensor:
        return weight


class _TapsFirst:
    """Weights (..., Co, Ci, k, k) are kept as (..., k, k, Ci, Co): what products take is contiguous."""

    def pack(self, weight: Tensor) -> Tensor:
        return weight.movedim((-4, -3), (-1, -2))

    def unpack(self, weight: Tensor) -> Tensor:
        return weight.movedim((-1, -2), (-4, -3))


class Direct(_AsItIs):
    """PyTorch's convolution; for more clients than one, of as many groups."""

    def __init__(self, shape: ConvShape) -> None:
        self.shape = shape

    def prepare(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        stride, padding = self.shape.stride, self.shape.padding
        num_clients, size = x.shape[:2]
        if num_clients == 1:
            # Squeezed, not indexed: the gradient of an index fills a tensor of zeros first.
            bias = None if bias is None else bias.squeeze(0)
            x = x.squeeze(0).contiguous()  # with the channels last, oneDNN's gradients are slower
            out = F.conv2d(x, weight.squeeze(0), bias, stride, padding)
            return out.unsqueeze(0)
        side_by_side = x.transpose(0, 1).flatten(1, 2)
        out = F.conv2d(
            side_by_side,
            weight.flatten(0, 1),
            None if bias is None else bias.flatten(),
            stride,
            padding,
            groups=num_clients,
        )
        return out.view(size, num_clients, -1, *out.shape[2:]).transpose(0, 1)


class SpaceToDepth(_AsItIs):
    """A strided convolution as one of stride 1 over blocks of pixels, by another way."""

    def __init__(self, shape: ConvShape, inner: type[Direct] | type["Unfolded"]) -> None:
        stride = shape.stride
        blocks = -(-shape.kernel // stride)
        # The weights are padded to whole blocks, and the image to what they then reach.
        self._more = blocks * stride - shape.kernel
        bottom = (shape.out_height - 1 + blocks) * stride - shape.height - shape.padding
        right = (shape.out_width - 1 + blocks) * stride - shape.width - shape.padding
        self._edges = (shape.padding, right, shape.padding, bottom)
        self._shape, self._blocks = shape, blocks
        self._inner = inner(
            ConvShape(
                shape.in_channels * stride**2,
                shape.out_channels,
                blocks,
                1,
                0,
                shape.out_height - 1 + blocks,
                shape.out_width - 1 + blocks,
            )
        )

    def prepare(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        blocks, stride = self._blocks, self._shape.stride
        padded = F.pad(weight, (0, self._more, 0, self._more))
        split = padded.unflatten(-1, (blocks, stride)).unflatten(-3, (blocks, stride))
        # (..., Ci, by, sy, bx, sx) to (..., Ci * sy * sx, by, bx), the order of pixel_unshuffle
        of_blocks = split.movedim((-4, -2), (-2, -1)).flatten(-5, -3)
        return self._inner.prepare(self._inner.pack(of_blocks), bias, dtype)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        blocks = F.pixel_unshuffle(F.pad(x, self._edges), self._shape.stride)
        return self._inner.apply(blocks, weight, bias)


class Unfolded(_TapsFirst):
    """Receptive fields as rows of a matrix; of stride 1."""

    def __init__(self, shape: ConvShape) -> None:
        assert shape.stride == 1
        self.shape = shape

    def prepare(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = _Unfolded.apply(x, weight, self.shape.padding)
        return out if bias is None else out + bias[:, None, :, None, None]


def _receptive_fields(x: Tensor, kernel: int, padding: int) -> Tensor:
    """Return (K, n * H' * W', k * k * C), ordered (row, column, channel), from (K, n, C, H, W)."""
    p = padding
    rows = F.pad(x.permute(0, 1, 3, 4, 2), (0, 0, p, p, p, p)).contiguous()
    num_clients, size, height, width, channels = rows.shape
    stride = rows.stride()
    fields = rows.as_strided(
        (num_clients, size, height - kernel + 1, width - kernel + 1, kernel, kernel * channels),
        (*stride[:4], stride[2], 1),
    )
    return fields.reshape(num_clients, -1, kernel * kernel * channels)


class _Unfolded(torch.autograd.Function):
    """Convolution of stride 1 of (K, n, C, H, W) with (K, k, k, C, Co)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, padding: int) -> Tensor:
        kernel, out_channels = weight.shape[1], weight.shape[-1]
        fields = _receptive_fields(x, kernel, padding)
        out = torch.bmm(fields, weight.flatten(1, 3))
        ctx.save_for_backward(fields if ctx.needs_input_grad[1] else None, weight)
        ctx.padding = padding
        height, width = (side + 2 * padding - kernel + 1 for side in x.shape[-2:])
        maps = out.view(*x.shape[:2], height, width, out_channels)
        return maps.permute(0, 1, 4, 2, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        fields, weight = ctx.saved_tensors
        kernel = weight.shape[1]
        of_x = of_weight = None
        if ctx.needs_input_grad[1]:
            rows = gradient.permute(0, 1, 3, 4, 2).flatten(1, 3)
            of_weight = torch.bmm(fields.transpose(1, 2), rows).view(weight.shape)
        if ctx.needs_input_grad[0]:
            # The convolution of the gradient with the kernel turned by half a circle.
            turned = weight.flip(1, 2).transpose(3, 4).flatten(1, 3)
            fields = _receptive_fields(gradient, kernel, kernel - 1 - ctx.padding)
            height, width = (side + kernel - 1 - 2 * ctx.padding for side in gradient.shape[-2:])
            of_x = torch.bmm(fields, turned).view(*gradient.shape[:2], height, width, -1)
            of_x = of_x.permute(0, 1, 4, 2, 3)
        return of_x, of_weight, None


class Dense(_TapsFirst):
    """From all positions of small maps to all positions, by one matrix that is made once a local step."""

    def __init__(self, shape: ConvShape) -> None:
        self.shape = shape

    def prepare(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        positions = self.shape.out_height * self.shape.out_width
        matrix: Tensor = _AllPositions.apply(weight, self.shape, dtype)
        # Cast last: the gradient of a bias is summed over positions in the precision of the weights.
        return matrix, None if bias is None else bias.repeat(1, positions).to(dtype)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.permute(0, 1, 3, 4, 2).flatten(2)
        if len(rows) == 1:
            bias = None if bias is None else bias.squeeze(0)
            out = F.linear(rows.squeeze(0), weight.squeeze(0).t(), bias).unsqueeze(0)
        elif bias is None:
            out = torch.bmm(rows, weight)
        else:
            out = torch.baddbmm(bias.unsqueeze(1), rows, weight)
        shape = self.shape
        maps = out.view(*x.shape[:2], shape.out_height, shape.out_width, shape.out_channels)
        return maps.permute(0, 1, 4, 2, 3)


class _AllPositions(torch.autograd.Function):
    """(K, k, k, Ci, Co) to (K, H * W * Ci, H' * W' * Co), zero where no tap joins two positions."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, shape: ConvShape, dtype: torch.dtype) -> Tensor:
        ctx.shape, ctx.weight_shape, ctx.weight_dtype = shape, weight.shape, weight.dtype
        num_clients = len(weight)
        joined = _joined(shape)
        matrix = weight.new_empty((num_clients, *_matrix_shape(shape)), dtype=dtype)
        if not _joins_all(shape):
            matrix.zero_()
        for place, taps in joined:
            matrix[place] = weight[taps]
        return matrix.view(
            num_clients,
            shape.height * shape.width * shape.in_channels,
            shape.out_height * shape.out_width * shape.out_channels,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        of_matrix = gradient.view(-1, *_matrix_shape(ctx.shape))
        of_weight = gradient.new_zeros(ctx.weight_shape, dtype=ctx.weight_dtype)
        for place, taps in _joined(ctx.shape):
            of_weight[taps] += of_matrix[place]
        return of_weight, None, None


def _matrix_shape(shape: ConvShape) -> tuple[int, ...]:
    return (
        shape.height,
        shape.width,
        shape.in_channels,
        shape.out_height,
        shape.out_width,
        shape.out_channels,
    )


def _joins_all(shape: ConvShape) -> bool:
    """Whether a tap joins every position with every other: the windows reach all of the map."""
    windows = [
        _window(out, side, shape)[0]
        for side, outs in ((shape.height, shape.out_height), (shape.width, shape.out_width))
        for out in range(outs)
    ]
    sides = [shape.height] * shape.out_height + [shape.width] * shape.out_width
    return all(window == slice(0, side) for window, side in zip(windows, sides, strict=True))


def _joined(shape: ConvShape) -> list[tuple[tuple[Any, ...], tuple[Any, ...]]]:
    """For each output position: the input positions it sees in the matrix, and their taps."""
    everything = slice(None)
    pairs = []
    for row in range(shape.out_height):
        rows, row_taps = _window(row, shape.height, shape)
        for column in range(shape.out_width):
            columns, column_taps = _window(column, shape.width, shape)
            place = (everything, rows, columns, everything, row, column)
            pairs.append((place, (everything, row_taps, column_taps)))
    return pairs


def _window(out: int, side: int, shape: ConvShape) -> tuple[slice, slice]:
    first = out * shape.stride - shape.padding
    low = max(0, first)
    high = max(low, min(side, first + shape.kernel))
    return slice(low, high), slice(low - first, high - first)


def for_one_client(attack: AttackConfig) -> Callable[[ConvShape], Convolution]:
    """Return how one client's convolutions are computed: a rule, so that results depend on no stopwatch.

    What an attack makes worth its while: space-to-depth, if it takes gradients to the image, for
    these are what it speeds up; dense matrices, which are made once a step, if there are more passes
    than one to use them.
    """
    differentiates = attack.attack_steps > 0 and attack.estimator == "stochastic"

    def choose(shape: ConvShape) -> Convolution:
        is_first = shape.stride > 1 and shape.in_channels <= 4
        if differentiates and is_first and _grows_by(shape) <= 1.3:
            return SpaceToDepth(shape, Direct)
        if attack.attack_steps and shape.height * shape.width <= 4 and shape.kernel > 1:
            return Dense(shape)
        return Direct(shape)

    return choose


def candidates(shape: ConvShape) -> list[Convolution]:
    """Return the ways that may be fastest for many clients on one accelerator."""
    ways: list[Convolution] = [Direct(shape)]
    if shape.stride == 1:
        ways.append(Unfolded(shape))
    elif _grows_by(shape) <= 2:
        ways.append(SpaceToDepth(shape, Unfolded))
    if shape.height * shape.width <= shape.kernel**2:
        ways.append(Dense(shape))
    return ways


def _grows_by(shape: ConvShape) -> float:
    """How many times more multiplications whole blocks of pixels take."""
    return (math.ceil(shape.kernel / shape.stride) * shape.stride / shape.kernel) ** 2
