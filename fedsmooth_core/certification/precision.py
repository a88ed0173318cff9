"""A model as it computes while it is certified and while it serves: number format, fewest operations."""

import torch
from torch import Tensor, nn

from fedsmooth_core.certification.fold import folded
from fedsmooth_core.errors import CertificationError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

PRECISIONS = tuple(_DTYPES)


class Computing(nn.Module):
    """A model as :func:`in_precision` returns it: in eval mode for good, and nobody else's.

    It does the same to any images, so it may be captured in a CUDA graph and shared by threads.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        computing = folded(model)
        if dtype is not torch.float32:
            computing = computing.to(dtype)
        # A rule, never a stopwatch: the last bit of a score must not depend on the machine's mood.
        # CUDA's float32 convolutions want NCHW, and its tensor cores NHWC.
        is_cuda = any(tensor.is_cuda for tensor in computing.parameters())
        if not is_cuda or dtype is not torch.float32:
            computing = computing.to(memory_format=torch.channels_last)
        self.model = computing
        self.dtype = dtype
        super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.model(x.to(self.dtype))
        return scores

    def train(self, mode: bool = True) -> "Computing":
        """Stay in eval mode, whatever the mode asked for."""
        return self


def in_precision(model: nn.Module, precision: str) -> nn.Module:
    """Return the model as it computes in a precision, from float32 images to scores.

    It is a copy in eval mode with batch normalisation folded into convolutions
    (:func:`~fedsmooth_core.certification.fold.folded`) and its weights in NHWC order, but for float32 on
    CUDA; convolutions follow the order of their weights. A certificate is about the classifier in the
    precision it was certified in: serve it so. Images and noise are float32 in either case, so the
    draws are the same.

    Args:
        model: with float32 weights; it is left as it is. Or what this function returned, also as a
            part of another model: that stays itself.
        precision: ``float32``; TF32 is switched off for this process, or CUDA would round
            convolutions to it. Or ``bfloat16``: weights, noisy images and arithmetic.

    Raises:
        CertificationError: for another precision, or one that the model was not made for.
    """
    if precision not in _DTYPES:
        raise CertificationError(
            f"precision={precision!r} is unknown: allowed is one of {', '.join(PRECISIONS)}."
        )
    if precision == "float32":
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
    for module in model.modules():
        if isinstance(module, Computing):
            if module.dtype is not _DTYPES[precision]:
                raise CertificationError(
                    f"the model computes in {str(module.dtype).removeprefix('torch.')} already, not in "
                    f"{precision}: give the model itself."
                )
            return model
    return Computing(model, _DTYPES[precision])
