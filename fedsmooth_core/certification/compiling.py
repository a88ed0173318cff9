"""torch.compile, where it gains: timed against the plain model on the machine at hand."""

import logging
import statistics
import time

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_ROUNDS = 5


def compiled_if_faster(model: nn.Module, batch: Tensor) -> nn.Module:
    """Compile a model for one shape of images; return that, or the model itself if it is not slower.

    Both are timed in turns on ``batch``, and the log says which is kept. The scores of a compiled model
    may differ from the model's in their last bits, so a count may differ by a draw.

    Args:
        model: in eval mode, on the device of ``batch``.
        batch: images of the shape that all passes will have.
    """
    try:
        compiled = torch.compile(model, dynamic=False)
        plain, faster = _medians(model, compiled, batch)
    # Its backends raise errors of many kinds: no C++ compiler, an operation that they do not know.
    except Exception as error:
        reason = str(error).strip().splitlines()
        logger.warning(
            "torch.compile fails here, so the model runs without it (%s).",
            reason[0] if reason else type(error).__name__,
        )
        return model
    gain = plain / faster
    if gain <= 1:
        logger.warning("torch.compile does not gain here (%.2fx): it is left out.", gain)
        return model
    logger.warning("torch.compile gains %.2fx here: it is used.", gain)
    return compiled  # type: ignore[return-value]


def _medians(model: nn.Module, compiled: object, batch: Tensor) -> tuple[float, float]:
    candidates = (model, compiled)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(_ROUNDS + 1):
        for candidate, its in zip(candidates, seconds, strict=True):
            _wait(batch)
            started = time.perf_counter()
            candidate(batch)  # type: ignore[operator]
            _wait(batch)
            its.append(time.perf_counter() - started)
    # The first round compiles.
    return statistics.median(seconds[0][1:]), statistics.median(seconds[1][1:])


def _wait(batch: Tensor) -> None:
    if batch.is_cuda:
        torch.cuda.synchronize(batch.device)
