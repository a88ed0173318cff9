"""Which architectures there are, by name, and how a model is built from its name."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from fedsmooth_core.config import ModelConfig, Section, at_least
from fedsmooth_core.data import DatasetInfo
from fedsmooth_core.errors import ConfigError
from fedsmooth_core.models.initialisation import drawing_from, initialise
from fedsmooth_core.models.normalisation import Normalise


@dataclass(frozen=True)
class ModelSpec(Section):
    """All that an architecture depends on; a checkpoint keeps it beside the weights."""

    SECTION = "model"
    name: str
    """Name in the registry, e.g. ``alexnet``."""
    init: str
    """How the weights start: a name that :func:`~fedsmooth_core.models.initialise` knows."""
    num_classes: int = field(metadata={"allowed": at_least(2)})
    channels: int = field(metadata={"allowed": at_least(1)})
    height: int = field(metadata={"allowed": at_least(1)})
    """Image height in pixels."""
    width: int = field(metadata={"allowed": at_least(1)})
    """Image width in pixels."""

    @classmethod
    def of(cls, model: ModelConfig, images: DatasetInfo) -> "ModelSpec":
        """Return the specification of the configured architecture for a data set's images."""
        channels, height, width = images.shape
        return cls(model.name, model.init, images.num_classes, channels, height, width)


NORMALISATION = "normalise."
"""What the names of the normalisation's tensors begin with, in every model's state dict."""

Architecture = Callable[[ModelSpec], nn.Module]
_ARCHITECTURES: dict[str, Architecture] = {}


def register(name: str) -> Callable[[Architecture], Architecture]:
    """Add an architecture under a name that ``model.name`` can then take.

    The decorated function turns a :class:`ModelSpec` into a module from normalised images
    (batch, channels, height, width) to logits (batch, num_classes). Normalisation and initial
    weights are not its business: :func:`build_model` adds them.

        @register("linear")
        def linear(spec: ModelSpec) -> nn.Module:
            pixels = spec.channels * spec.height * spec.width
            return nn.Sequential(nn.Flatten(), nn.Linear(pixels, spec.num_classes))

    Raises:
        ConfigError: if the name is taken.
    """

    def add(architecture: Architecture) -> Architecture:
        if name in _ARCHITECTURES:
            raise ConfigError(f"model.name={name!r} is already registered: choose another name.")
        _ARCHITECTURES[name] = architecture
        return architecture

    return add


def build_model(
    spec: ModelSpec, mean: Sequence[float], std: Sequence[float], generator: torch.Generator
) -> nn.Module:
    """Build a model with its initial weights: images in [0, 1] in, logits out.

    The model is ``Sequential(normalise, network)``: normalisation is the first layer and its mean
    and std are in the state dict, so weights that travel carry it with them.

    Args:
        spec: the architecture, its initialisation and its shapes.
        mean: per channel, in [0, 1] pixel units.
        std: per channel, in [0, 1] pixel units.
        generator: a CPU generator, the only source of the initial weights; it is advanced, and
            PyTorch's global generator is left as it was.

    Returns:
        A float32 model on the CPU, in training mode, from (batch, channels, height, width) to
        (batch, num_classes).

    Raises:
        ConfigError: for an unknown architecture or initialisation, an image size that the
            architecture cannot take, or a mean or std that does not fit the channels.
    """
    architecture = _architecture(spec.name)
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != spec.channels:
            raise ConfigError(
                f"the normalisation's {name} has {len(values)} values, but the images have "
                f"{spec.channels} channels: give one value per channel."
            )
    with drawing_from(generator):
        network = architecture(spec)
    initialise(network, spec.init, generator)
    return nn.Sequential(OrderedDict(normalise=Normalise(mean, std), network=network))


def check_buildable(spec: ModelSpec) -> None:
    """Check that there is this architecture for images of these sizes; nothing is allocated for it.

    Raises:
        ConfigError: for an unknown architecture, or an image size that it cannot take.
    """
    architecture = _architecture(spec.name)
    with torch.device("meta"):
        architecture(spec)


def _architecture(name: str) -> Architecture:
    if name not in _ARCHITECTURES:
        known = ", ".join(sorted(_ARCHITECTURES))
        raise ConfigError(f"model.name={name!r} is not known: allowed is one of {known}.")
    return _ARCHITECTURES[name]
