"""Small networks, in float64, that together have every layer that is stacked."""

import torch
from torch import nn

from fedsmooth_core.data import ClientData
from fedsmooth_core.models import Normalise

SHAPE, CLASSES = (2, 12, 12), 4


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Residual(nn.Module):
    """Functions in place of layers, an addition, and a mean."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.conv_norm = nn.BatchNorm2d(4, affine=False)
        self.shortcut = nn.Sequential()
        self.down = nn.Conv2d(4, 6, 1, stride=2)
        self.classifier = nn.Linear(6, CLASSES)

    def forward(self, x):
        x = nn.functional.relu(self.norm(self.stem(x)))
        out = self.conv_norm(self.conv(x)) + self.shortcut(x)
        features = self.down(torch.relu(out)).mean(dim=(2, 3))
        return self.classifier(features)


def alexnet_like():
    """A strided start, pooling, and a map of 2x2 that is computed as a dense layer."""
    return nn.Sequential(
        nn.Conv2d(2, 6, 5, stride=3, padding=2),
        nn.MaxPool2d(2),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 5, 3, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(20, CLASSES),
    )


def with_group_norm():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(36, CLASSES, bias=False),
    )


def without_convolution():
    return nn.Sequential(nn.Flatten(), nn.Linear(288, 6), nn.GELU(), nn.Linear(6, CLASSES))


NETWORKS = {
    "alexnet-like": alexnet_like,
    "residual": Residual,
    "group-norm": with_group_norm,
    "linear": without_convolution,
}


def make_model(name="alexnet-like", seed=0, dtype=torch.float64):
    model = nn.Sequential(Normalise([0.4, 0.6], [0.25, 0.5]), NETWORKS[name]()).to(dtype)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.normal_(0, 0.4, generator=generator(seed))
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("running_var"):
                buffer.uniform_(0.5, 2, generator=generator(seed))
    return model


def make_data(size, seed=0):
    images = torch.randint(256, (size, *SHAPE), generator=generator(seed), dtype=torch.uint8)
    return ClientData(images, torch.randint(CLASSES, (size,), generator=generator(seed + 1)), 255)
