"""Whether a network of many clients does what the model does: tried, in both modes, in float64.

Reading a model tells its layers, not what its modules do in training, in hooks, or by the size of a
batch. What cannot be told is tried: logits, statistics and gradients, on a few random images.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fedsmooth_core.cohort.local_training import CohortNetwork
from fedsmooth_core.cohort.network import UnknownLayerError, require_plain_weights

_NUM_IMAGES = 3
_TOLERANCE = 1e-6  # float64 agrees to 1e-12; layers that compute in float32 do to this


def require_agreement(
    make: Callable[[nn.Module], CohortNetwork], model: nn.Module, shape: tuple[int, int, int]
) -> None:
    """Compare a network of a model with it.

    Args:
        make: makes the network of one client, or more, of a model on the CPU.
        model: left as it is.
        shape: (C, H, W) of an image.

    Raises:
        UnknownLayerError: where they differ, or the network cannot be made or computed.
    """
    require_plain_weights(model)  # a copy has no hooks of its weights
    try:
        reference = copy.deepcopy(model).cpu().double()
        network = make(copy.deepcopy(reference))
        for training in (False, True):
            if not _agree(network, copy.deepcopy(reference), shape, training):
                raise UnknownLayerError("it does something else than its layers say")
    except UnknownLayerError:
        raise
    except Exception as error:  # whatever somebody's module does
        raise UnknownLayerError(f"it cannot be computed for many clients ({error})") from error


def _agree(
    network: CohortNetwork, model: nn.Module, shape: tuple[int, int, int], training: bool
) -> bool:
    random = torch.Generator().manual_seed(0)
    images = torch.rand(_NUM_IMAGES, *shape, generator=random, dtype=torch.float64)
    network.load(model.state_dict())
    leaves = [weight.detach().clone().requires_grad_() for weight in network.weights]
    copies = images.expand(network.num_clients, *images.shape)
    logits = network.logits(network.prepare(leaves), copies, training)
    direction = torch.rand(logits.shape[1:], generator=random, dtype=torch.float64)
    gradients = torch.autograd.grad((logits * direction).sum(), leaves)

    model.train(training)
    expected = model(images)
    weights = dict(model.named_parameters())
    of_model = torch.autograd.grad((expected * direction).sum(), list(weights.values()))
    # In the layout of the state: as if the gradients were the weights.
    for weight, gradient in zip(network.weights, gradients, strict=True):
        weight.copy_(gradient)
    state = network.states(1)[0]
    pairs = [(logits[0], expected)]
    pairs += [(state[name], of_model[i]) for i, name in enumerate(weights)]
    pairs += [(state[name], buffer) for name, buffer in model.named_buffers()]
    return all(_is_close(ours, theirs) for ours, theirs in pairs)


def _is_close(ours: Tensor, theirs: Tensor) -> bool:
    scale = max(1.0, theirs.abs().max().item()) if theirs.numel() else 1.0
    return torch.allclose(ours, theirs, rtol=_TOLERANCE, atol=_TOLERANCE * scale)
