"""The number format that a model computes its scores in, while it is certified and while it serves."""

import copy

import torch
from torch import Tensor, nn

from fedsmooth_core.errors import CertificationError

PRECISIONS = ("float32", "bfloat16")


def in_precision(model: nn.Module, precision: str) -> nn.Module:
    """Return the model as it computes in a precision, from float32 images to scores.

    A certificate is about the classifier in the precision it was certified in: serve it so. Images
    and noise are float32 in either case, so the draws are the same.

    Args:
        model: with float32 weights; it is left as it is. Or what this function returned, also as a
            part of another model: that stays itself.
        precision: ``float32`` is the model itself. TF32 is switched off for this process, or CUDA
            would round convolutions to it. ``bfloat16`` is a copy whose weights, noisy images and
            arithmetic are bfloat16.

    Raises:
        CertificationError: for another precision.
    """
    if precision == "float32":
        torch.backends.cudnn.allow_tf32 = False
        return model
    if precision == "bfloat16":
        is_so = any(isinstance(module, _InBfloat16) for module in model.modules())
        return model if is_so else _InBfloat16(model)
    raise CertificationError(
        f"precision={precision!r} is unknown: allowed is one of {', '.join(PRECISIONS)}."
    )


class _InBfloat16(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.model(x.to(torch.bfloat16))
        return scores
