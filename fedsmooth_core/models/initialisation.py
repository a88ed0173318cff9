"""How weights start, drawn from one given generator."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fedsmooth_core.errors import ConfigError


@contextmanager
def drawing_from(generator: torch.Generator) -> Iterator[None]:
    """Let layers made inside the block draw their weights from a CPU generator.

    PyTorch's layers know no generator but the global one. Inside the block it continues the given
    generator's stream; afterwards it is as it was before, and the given one has moved on.
    """
    before = torch.get_rng_state()
    torch.set_rng_state(generator.get_state())
    try:
        with torch.device("cpu"):
            yield
        generator.set_state(torch.get_rng_state())
    finally:
        torch.set_rng_state(before)


def _default(network: nn.Module, generator: torch.Generator) -> None:
    """Keep what the layers' own constructors drew, within :func:`drawing_from`."""


def _he(network: nn.Module, generator: torch.Generator) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(
                module.weight, mode="fan_out", nonlinearity="relu", generator=generator
            )
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(
                module.weight, mode="fan_in", nonlinearity="linear", generator=generator
            )
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_INITIALISATIONS: dict[str, Callable[[nn.Module, torch.Generator], None]] = {
    "he": _he,
    "default": _default,
}


def initialise(network: nn.Module, name: str, generator: torch.Generator) -> None:
    """Give a freshly built network its initial weights, in place.

    ``he``: He et al. (2015), as in Cohen et al.'s ResNet: convolutions from
    N(0, 2 / (out_channels * kernel area)), that is Kaiming normal by fan-out; linear layers, which
    no ReLU follows here, from N(0, 1 / in_features); zero biases.

    ``default``: PyTorch's own, uniform in +-1/sqrt(fan_in) for the weights and biases of
    convolutions and linear layers.

    Batch normalisation starts as the identity with both.

    Raises:
        ConfigError: for any other name.
    """
    if name not in _INITIALISATIONS:
        known = ", ".join(sorted(_INITIALISATIONS))
        raise ConfigError(f"model.init={name!r} is not known: allowed is one of {known}.")
    _INITIALISATIONS[name](network, generator)
