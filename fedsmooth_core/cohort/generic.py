"""K clients' copies of any model, by PyTorch's vectorising map: for models of unknown layers."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedsmooth_core.cohort.copies import by_client, by_copy
from fedsmooth_core.cohort.layers import Weights
from fedsmooth_core.cohort.network import UnknownLayerError, require_plain_weights
from fedsmooth_core.smoothing import NoisyClassifier


class MappedNetwork:
    """As :class:`~fedsmooth_core.cohort.network.StackedNetwork`, for whatever ``vmap`` can map.

    Args:
        model: what each client trains; its own weights are never used, and its modes change.
        num_clients: K.
        bf16: whether to compute in bfloat16 where autocast does.

    Raises:
        UnknownLayerError: for a model that shares or freezes weights, or keeps what no state has.
    """

    def __init__(self, model: nn.Module, num_clients: int, bf16: bool = False) -> None:
        self.num_clients, self._bf16 = num_clients, bf16
        self._model = model
        self._names = list(model.state_dict())
        weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        if sorted([*weights, *buffers]) != sorted(self._names):
            raise UnknownLayerError("it shares weights, or has buffers that are not in its state")
        require_plain_weights(model)
        self._weight_names, self._buffer_names = list(weights), list(buffers)

        def stack(tensor: Tensor) -> Tensor:
            return tensor.detach().new_empty((num_clients, *tensor.shape))

        self.weights = [stack(weight) for weight in weights.values()]
        self.buffers = [stack(buffer) for buffer in buffers.values()]

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Let every client start from one state, in place."""
        for name, tensor in self._named():
            tensor.copy_(state[name])

    @torch.no_grad()
    def states(self, num_clients: int) -> list[dict[str, Tensor]]:
        """Return the states of the first clients, as views of new stacks."""
        stacks = {name: tensor[:num_clients].clone() for name, tensor in self._named()}
        return [
            {name: stacks[name][client] for name in self._names} for client in range(num_clients)
        ]

    def prepare(self, weights: Sequence[Tensor]) -> list[Weights]:
        """Return the weights as they are."""
        return [tuple(weights)]

    def logits(self, prepared: Sequence[Weights], x: Tensor, training: bool) -> Tensor:
        """Return the logits (K, n, classes) of images (K, n, C, H, W)."""
        (weights,) = prepared
        self._model.train(training)
        named = dict(zip(self._weight_names, weights, strict=True))
        buffers = {
            name: buffer[: len(x)]
            for name, buffer in zip(self._buffer_names, self.buffers, strict=True)
        }

        def of_client(
            weights: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor
        ) -> Tensor:
            logits: Tensor = functional_call(self._model, (weights, buffers), (images,))
            return logits

        with torch.autocast(x.device.type, torch.bfloat16, enabled=self._bf16):
            logits: Tensor = vmap(of_client)(named, buffers, x)
        return logits.to(self.weights[0].dtype)

    def at_noise(self, prepared: Sequence[Weights], noise: Tensor) -> NoisyClassifier:
        """Return the classifiers in eval mode."""
        return _Mapped(self, prepared)

    def _named(self) -> list[tuple[str, Tensor]]:
        names = self._weight_names + self._buffer_names
        return list(zip(names, self.weights + self.buffers, strict=True))


class _Mapped:
    def __init__(self, network: MappedNetwork, prepared: Sequence[Weights]) -> None:
        self._network, self._prepared = network, prepared

    def noisy_logits(self, x: Tensor, noise: Tensor) -> Tensor:
        copies = by_client(x + noise, len(self._prepared[0][0]))
        return by_copy(self._network.logits(self._prepared, copies, training=False), len(noise))
