"""The CIFAR ResNets of He et al. (2016), with the shortcuts of Cohen et al. (2019)."""

import torch.nn.functional as F
from torch import Tensor, nn

from fedsmooth_core.errors import ConfigError
from fedsmooth_core.models.registry import ModelSpec, register


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation, and a shortcut around them.

    Where the block changes the shape, the shortcut is a 1x1 convolution with batch normalisation.
    """

    def __init__(self, in_width: int, out_width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, out_width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_width)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_width)
        self.shortcut = nn.Sequential()
        if (in_width, stride) != (out_width, 1):
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_width, out_width, 1, stride=stride, bias=False),
                nn.BatchNorm2d(out_width),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet of depth 6n + 2: three stages of n blocks, 16, 32 and 64 channels wide."""

    def __init__(self, spec: ModelSpec, blocks_per_stage: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(spec.channels, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        blocks: list[BasicBlock] = []
        in_width = 16
        for out_width, first_stride in ((16, 1), (32, 2), (64, 2)):
            for index in range(blocks_per_stage):
                stride = first_stride if index == 0 else 1
                blocks.append(BasicBlock(in_width, out_width, stride))
                in_width = out_width
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(in_width, spec.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        features = self.blocks(F.relu(self.norm(self.conv(x))))
        # The mean over whatever is left is Cohen et al.'s 8x8 average pool at 32x32.
        logits: Tensor = self.classifier(features.mean(dim=(2, 3)))
        return logits


def _require_room(spec: ModelSpec) -> None:
    if min(spec.height, spec.width) < 8:
        raise ConfigError(
            f"model.name={spec.name!r} cannot take {spec.height}x{spec.width} images: allowed is "
            "8x8 and larger."
        )


@register("resnet20")
def resnet20(spec: ModelSpec) -> nn.Module:
    """Build the 0.27 M parameter ResNet-20.

    Raises:
        ConfigError: for images smaller than 8x8.
    """
    _require_room(spec)
    return ResNet(spec, blocks_per_stage=3)


@register("resnet110")
def resnet110(spec: ModelSpec) -> nn.Module:
    """Build the 1.73 M parameter ResNet-110, the CIFAR-10 model of Cohen et al. (2019).

    Raises:
        ConfigError: for images smaller than 8x8.
    """
    _require_room(spec)
    return ResNet(spec, blocks_per_stage=18)
