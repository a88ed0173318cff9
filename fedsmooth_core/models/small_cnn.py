"""A small CNN for small images: quick on a CPU, without batch normalisation."""

from torch import nn

from fedsmooth_core.errors import ConfigError
from fedsmooth_core.models.registry import ModelSpec, register


@register("small_cnn")
def small_cnn(spec: ModelSpec) -> nn.Module:
    """Build three 3x3 convolutions and a linear layer, 58 k parameters at 1x8x8, 97 k at 3x32x32.

    Raises:
        ConfigError: for images smaller than 8x8 or larger than 32x32.
    """
    if min(spec.height, spec.width) < 8 or max(spec.height, spec.width) > 32:
        raise ConfigError(
            f"model.name='small_cnn' cannot take {spec.height}x{spec.width} images: allowed is 8x8 "
            "to 32x32 (for larger ones choose model.name=resnet20)."
        )
    # Max-pooling and ReLU commute; pooling first leaves ReLU a quarter of the values.
    return nn.Sequential(
        nn.Conv2d(spec.channels, 32, kernel_size=3, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, kernel_size=3, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * (spec.height // 4) * (spec.width // 4), spec.num_classes),
    )
