"""K clients' copies of one model as one network of stacked weights.

The model is read by recording one pass. What consists of the layers of
:mod:`fedsmooth_core.cohort.layers` becomes a :class:`StackedNetwork`; another model does not.
"""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsmooth_core.cohort.convolution import Convolution, ConvShape
from fedsmooth_core.cohort.copies import by_client, by_copy
from fedsmooth_core.cohort.layers import (
    BatchNormLayer,
    ConvolutionLayer,
    GroupNormLayer,
    ImageLayer,
    Layer,
    LinearLayer,
    MaxPoolLayer,
    NormaliseLayer,
    Weights,
    taken,
)
from fedsmooth_core.models import Normalise
from fedsmooth_core.models.recording import Call, UnreadableModelError, record
from fedsmooth_core.smoothing import NoisyClassifier

ChooseWay = Callable[[ConvShape], Convolution]

_IMAGE_MODULES = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.Tanh,
    nn.GELU,
    nn.SiLU,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Flatten,
    nn.Identity,
)
_IMAGE_FUNCTIONS = (
    F.relu,
    torch.relu,
    Tensor.relu,
    torch.tanh,
    Tensor.tanh,
    torch.flatten,
    Tensor.flatten,
    torch.mean,
    Tensor.mean,
)
_ADDITIONS = (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__)


class UnknownLayerError(Exception):
    """A model has a part that is not computed for many clients: what it is, after 'it'."""


def require_plain_weights(model: nn.Module) -> None:
    """Refuse what a module does beside its forward pass, which nobody would do for many clients.

    Raises:
        UnknownLayerError: for weights that are not trained, and for hooks on gradients.
    """
    for name, weight in model.named_parameters():
        if not weight.requires_grad or weight._backward_hooks:
            raise UnknownLayerError(f"it has a frozen or watched weight {name}")
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise UnknownLayerError(f"it watches the gradients of {name}")


class _Step(NamedTuple):
    """One operation of the model."""

    layer: Layer | None
    """None adds its two inputs."""
    inputs: tuple[int, ...]
    """Places of the values it takes: 0 is the image, i + 1 what step i gave."""


class StackedNetwork:
    """The networks of ``num_clients`` clients, trained beside each other.

    Weights and buffers are tensors (K, ...). Where fewer clients than K take part in a step, they are
    the first ones, and everything is computed on views of these.

    Args:
        model: what each client trains; its weights do not matter, its device and dtype do.
        shape: (C, H, W) of an image.
        num_clients: K.
        choose_way: says how a convolution is computed.
        compute_dtype: of the arithmetic; weights, their updates and the logits keep the model's.

    Attributes:
        weights: (K, ...) each, in the layouts of the layers.
        buffers: (K, ...) each.

    Raises:
        UnknownLayerError: for a model with other parts than :mod:`fedsmooth_core.cohort.layers` has.
    """

    def __init__(
        self,
        model: nn.Module,
        shape: tuple[int, int, int],
        num_clients: int,
        choose_way: ChooseWay,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        state = dict(model.state_dict())
        self.num_clients = num_clients
        self._dtype = next(model.parameters()).dtype
        self._steps = _read(model, shape, choose_way, compute_dtype or self._dtype)
        self._layers = [step.layer for step in self._steps if step.layer is not None]
        names = [name for layer in self._layers for name in layer.kept.weights]
        buffers = [name for layer in self._layers for name in layer.kept.buffers]
        trained = [name for name, _ in model.named_parameters()]
        if sorted(names) != sorted(trained) or sorted(names + buffers) != sorted(state):
            raise UnknownLayerError("it uses a weight twice, not at all, or in an unknown layer")
        require_plain_weights(model)
        self._names = list(state)
        self._weights_of = _stretches([len(layer.kept.weights) for layer in self._layers])
        self._buffers_of = _stretches([len(layer.kept.buffers) for layer in self._layers])

        def stack(tensor: Tensor) -> Tensor:
            return tensor.new_empty((num_clients, *tensor.shape))

        self.weights = [
            stack(tensor)
            for layer in self._layers
            for tensor in layer.pack(taken(layer.kept.weights, state))
        ]
        self.buffers = [stack(state[name]) for name in buffers]
        # What is linear in the image, up to the first step after it: Normalise, then a convolution.
        self._linear_start = _linear_start(self._steps)

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Let every client start from one state, in place."""
        for layer, part, rest in self._parts():
            packed = layer.pack(taken(layer.kept.weights, state))
            for kept, tensor in zip(self.weights[part], packed, strict=True):
                kept.copy_(tensor)
            for kept, name in zip(self.buffers[rest], layer.kept.buffers, strict=True):
                kept.copy_(state[name])

    @torch.no_grad()
    def states(self, num_clients: int) -> list[dict[str, Tensor]]:
        """Return the states of the first clients, in the model's names, order and layout.

        The tensors of one name are views of one new stack.
        """
        stacks: dict[str, Tensor] = {}
        for layer, part, rest in self._parts():
            weights = tuple(weight[:num_clients] for weight in self.weights[part])
            for name, tensor in zip(layer.kept.weights, layer.unpack(weights), strict=True):
                stacks[name] = tensor.clone(memory_format=torch.contiguous_format)
            for name, tensor in zip(layer.kept.buffers, self.buffers[rest], strict=True):
                stacks[name] = tensor[:num_clients].clone()
        return [
            {name: stacks[name][client] for name in self._names} for client in range(num_clients)
        ]

    def prepare(self, weights: Sequence[Tensor]) -> list[Weights]:
        """Make of kept weights, for any first clients, what a local step computes with; differentiable."""
        return [layer.prepare(tuple(weights[part])) for layer, part, _ in self._parts()]

    def logits(self, prepared: Sequence[Weights], x: Tensor, training: bool) -> Tensor:
        """Return the logits (K, n, classes) of images (K, n, C, H, W).

        Args:
            prepared: of :meth:`prepare`, for as many clients as ``x`` has.
            x: images in [0, 1], or noisy ones.
            training: whether batch normalisation goes by the batch, and keeps its statistics.
        """
        return self._run(self._steps, 0, prepared, x, training)

    def at_noise(self, prepared: Sequence[Weights], noise: Tensor) -> NoisyClassifier:
        """Return the classifiers in eval mode, made quick for these noise vectors.

        To :func:`~fedsmooth_core.smoothing.noisy_logits` the images of all clients are one batch: x is
        (K * B, C, H, W) and noise (m, K * B, C, H, W), client after client.
        """
        return _AtNoise(self, prepared, noise)

    @property
    def splits(self) -> bool:
        """Whether the model starts with what is linear in the image."""
        return self._linear_start > 0

    def start(self, prepared: Sequence[Weights], x: Tensor) -> Tensor:
        """Return what the linear start makes of images (K, n, C, H, W)."""
        return self._run(self._steps[: self._linear_start], 0, prepared, x, False)

    def response(self, prepared: Sequence[Weights], noise: Tensor) -> Tensor:
        """Return what noise (K, n, C, H, W) adds to :meth:`start` when it is added to the images."""
        normalise, convolution = (step.layer for step in self._steps[: self._linear_start])
        assert isinstance(normalise, NormaliseLayer)
        assert isinstance(convolution, ConvolutionLayer)
        buffers = self._buffers(0, len(noise))
        return convolution.linear_part(prepared[1], normalise.linear_part(buffers, noise))

    def rest(self, prepared: Sequence[Weights], started: Tensor) -> Tensor:
        """Return the logits, given what the linear start made of noisy images."""
        return self._run(self._steps, self._linear_start, prepared, started, False)

    def _run(
        self,
        steps: Sequence[_Step],
        first: int,
        prepared: Sequence[Weights],
        x: Tensor,
        training: bool,
    ) -> Tensor:
        values = {first: x}
        layer_number = first  # the start has no additions, so steps and layers count alike there
        for number, step in enumerate(steps[first:], start=first):
            inputs = [values[place] for place in step.inputs]
            if step.layer is None:
                values[number + 1] = inputs[0] + inputs[1]
                continue
            buffers = self._buffers(layer_number, len(x))
            values[number + 1] = step.layer.apply(
                prepared[layer_number], buffers, inputs[0], training
            )
            layer_number += 1
        out = values[len(steps)]
        return out.to(self._dtype) if out.dim() == 3 else out

    def _buffers(self, layer: int, num_clients: int) -> Weights:
        return tuple(buffer[:num_clients] for buffer in self.buffers[self._buffers_of[layer]])

    def _parts(self) -> list[tuple[Layer, slice, slice]]:
        return list(zip(self._layers, self._weights_of, self._buffers_of, strict=True))


class _AtNoise:
    """F(x + d) where the first layer's share of d is computed once, not in every step of an attack."""

    def __init__(self, network: StackedNetwork, prepared: Sequence[Weights], noise: Tensor) -> None:
        self._network, self._prepared, self._noise = network, prepared, noise
        self._num_clients = _num_clients(prepared)
        self._response = self._respond(noise) if network.splits else None

    def noisy_logits(self, x: Tensor, noise: Tensor) -> Tensor:
        images = x.unflatten(0, (self._num_clients, -1))
        if self._response is None:
            copies = by_client(x + noise, self._num_clients)
            logits = self._network.logits(self._prepared, copies, training=False)
        else:
            response = self._response if noise is self._noise else self._respond(noise)
            started = self._network.start(self._prepared, images).unsqueeze(1)
            noisy = started + response.unflatten(1, (len(noise), -1))
            logits = self._network.rest(self._prepared, noisy.flatten(1, 2))
        return by_copy(logits, len(noise))

    @torch.no_grad()
    def _respond(self, noise: Tensor) -> Tensor:
        return self._network.response(self._prepared, by_client(noise, self._num_clients))


def _num_clients(prepared: Sequence[Weights]) -> int:
    return next(len(weights[0]) for weights in prepared if weights)


def _stretches(lengths: Sequence[int]) -> list[slice]:
    """Cut a list into stretches of these lengths."""
    ends = list(itertools.accumulate(lengths))
    return [slice(end - length, end) for length, end in zip(lengths, ends, strict=True)]


def _linear_start(steps: Sequence[_Step]) -> int:
    """Return how many first steps are linear in the image and serve nothing but the one after them."""
    kinds = [type(step.layer) for step in steps[:2]]
    used = [place for step in steps for place in step.inputs]
    if kinds == [NormaliseLayer, ConvolutionLayer] and used.count(0) == used.count(1) == 1:
        return 2
    return 0


def _read(
    model: nn.Module, shape: tuple[int, int, int], choose_way: ChooseWay, dtype: torch.dtype
) -> list[_Step]:
    """Read a model into steps.

    Raises:
        UnknownLayerError: where it cannot be read, or does something that no layer does.
    """
    try:
        calls = record(model, shape)
    except UnreadableModelError as error:
        raise UnknownLayerError(str(error)) from error
    return [_Step(_layer(call, model, choose_way, dtype), call.inputs) for call in calls]


def _layer(call: Call, model: nn.Module, choose_way: ChooseWay, dtype: torch.dtype) -> Layer | None:
    if isinstance(call.target, str) and len(call.inputs) == len(call.args) == 1:
        name, module = call.target, model.get_submodule(call.target)
        has_bias = getattr(module, "bias", None) is not None
        if type(module) is nn.Conv2d:
            height, width = call.args[0].shape[-2:]
            if (of_maps := ConvShape.of(module, height, width)) is not None:
                return ConvolutionLayer(name, has_bias, choose_way(of_maps), dtype)
        elif type(module) is nn.Linear:
            if call.output.dim() == 2:
                return LinearLayer(name, has_bias, dtype)
        elif type(module) is nn.BatchNorm2d:
            if module.momentum is not None and module.track_running_stats:
                return BatchNormLayer(name, module)
        elif type(module) is nn.GroupNorm:
            return GroupNormLayer(name, module)
        elif type(module) is Normalise:
            return NormaliseLayer(name)
        elif type(module) is nn.MaxPool2d:
            if call.output.dim() == 4 and not module.return_indices:
                return MaxPoolLayer(module)
        elif type(module) in _IMAGE_MODULES and getattr(module, "start_dim", 1) == 1:
            return ImageLayer(_not_in_place(module))
    elif call.target in _ADDITIONS and len(call.inputs) == len(call.args) == 2 and not call.kwargs:
        if len({argument.shape for argument in call.args}) == 1:
            return None
    elif call.target in _IMAGE_FUNCTIONS and len(call.inputs) == 1 and _keeps_images_apart(call):
        rest, options = call.args[1:], {k: v for k, v in call.kwargs.items() if k != "inplace"}
        function = call.target
        assert callable(function)
        return ImageLayer(lambda x: function(x, *rest, **options))
    raise UnknownLayerError(f"no layer computes {call.target} for many clients")


def _not_in_place(module: nn.Module) -> nn.Module:
    """Return an activation that leaves what it takes alone, for another step may still read it."""
    if not getattr(module, "inplace", False):
        return module
    module = copy.copy(module)
    module.inplace = False  # type: ignore[assignment]
    return module


def _keeps_images_apart(call: Call) -> bool:
    """Whether a function leaves the first dimension, the images, alone."""
    arguments = call.args[1:]
    if call.target in (torch.flatten, Tensor.flatten):
        first = arguments[0] if arguments else call.kwargs.get("start_dim", 0)
        return bool(first == 1)
    if call.target in (torch.mean, Tensor.mean):
        dims = arguments[0] if arguments else call.kwargs.get("dim")
        return isinstance(dims, tuple | list) and set(dims) <= {2, 3, -1, -2}
    return True
