"""Classifiers whose smoothed version is known in closed form, and small networks."""

import torch
from torch import Tensor, nn


class HalfSpace(nn.Module):
    """f(x) = 1 where w.x + b > 0. Smoothed: P(1) = Phi((w.x + b) / (sigma ||w||))."""

    def __init__(self, weight: Tensor, bias: float):
        super().__init__()
        self.register_buffer("weight", weight.flatten().double())
        self.bias = bias

    def margin(self, x: Tensor) -> Tensor:
        """Signed distance to the plane, in float64."""
        score = x.flatten(1).double() @ self.weight + self.bias
        return score / self.weight.norm()

    def forward(self, x: Tensor) -> Tensor:
        margin = self.margin(x)
        return torch.stack([-margin, margin], dim=1)


def half_space(shape: tuple[int, ...] = (1, 4, 4)) -> HalfSpace:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    # Through the middle of the image cube.
    return HalfSpace(weight, -0.5 * float(weight.sum()))


def images_at(plane: HalfSpace, distances: Tensor, shape: tuple[int, ...] = (1, 4, 4)) -> Tensor:
    """Images in [0, 1], one at each signed distance to the plane through the cube's middle."""
    normal = (plane.weight / plane.weight.norm()).view(shape)
    return 0.5 + distances.double().view(-1, 1, 1, 1) * normal


def small_network(shape: tuple[int, int, int], num_classes: int = 10) -> nn.Module:
    torch.manual_seed(3)
    channels, height, width = shape
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * height * width, num_classes),
    )


def with_statistics(model: nn.Module) -> nn.Module:
    """The model, its batch normalisation as if it had been trained: nothing is 0 or 1."""
    generator = torch.Generator().manual_seed(9)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.3, 3, generator=generator)
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5, generator=generator)
                nn.init.normal_(module.bias, 0, 0.3, generator=generator)
    return model


def trained_network(shape: tuple[int, int, int]) -> nn.Module:
    return with_statistics(small_network(shape))


def random_images(num: int, shape: tuple[int, int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.randint(0, 256, (num, *shape), dtype=torch.uint8, generator=generator)
