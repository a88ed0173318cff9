"""The CIFAR AlexNet: five convolutions and one linear layer, 2.47 M parameters."""

from torch import nn

from fedsmooth_core.errors import ConfigError
from fedsmooth_core.models.registry import ModelSpec, register


@register("alexnet")
def alexnet(spec: ModelSpec) -> nn.Module:
    """Build it for 32x32 images; after Krizhevsky et al. (2012), cut to CIFAR's size.

    Raises:
        ConfigError: for images that are not 32x32.
    """
    if (spec.height, spec.width) != (32, 32):
        raise ConfigError(
            f"model.name='alexnet' cannot take {spec.height}x{spec.width} images: allowed is 32x32 "
            "(for other sizes choose model.name=resnet20 or, up to 32x32, model.name=small_cnn)."
        )
    # Max-pooling and ReLU commute; pooling first leaves ReLU a quarter of the values.
    return nn.Sequential(
        nn.Conv2d(spec.channels, 64, kernel_size=11, stride=4, padding=5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(64, 192, kernel_size=5, padding=2),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(192, 384, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, kernel_size=3, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, spec.num_classes),
    )
