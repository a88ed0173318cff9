"""Forward passes of one shape over noisy images: blocks of noise in, counts of the classes out.

An image's noise is a sequence of blocks of ``NOISE_BLOCK`` draws, each filled by exactly one ``normal_``
of that image's own generator. PyTorch's streams are not invariant to how they are chunked: the CPU's
wants multiples of 16 elements, CUDA's depends on the size of each launch.
"""

import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedsmooth_core.certification.compiling import compiled_if_faster
from fedsmooth_core.certification.precision import Computing
from fedsmooth_core.errors import CertificationError

NOISE_BLOCK = 128
"""Draws that one ``normal_`` fills. Part of what a certificate's noise is: never change it."""

LARGEST_OUTPUT = {"cpu": 4 * 2**20, "cuda": 128 * 2**20}
"""Bytes that a layer's output takes at most in a pass whose size nobody set, beyond one block of noise.

On a CPU what leaves the cache costs time, and what leaves malloc's heap costs page faults at each layer.
A GPU wants as many images as its multiprocessors can share; more than this gains nothing.
"""

MOST_BLOCKS = {"cpu": 8, "cuda": 128}
"""Blocks of noise in such a pass, at most: 1,024 images on a CPU, 16,384 on CUDA."""

logger = logging.getLogger(__name__)


class Block(NamedTuple):
    """The next ``NOISE_BLOCK`` draws of one noise stream of an image."""

    image: int
    """Row of the image among those at hand."""
    generator: torch.Generator
    """The stream; it moves on by one block."""
    tally: int
    """Which tally the predictions are counted in."""
    counted: int
    """How many of the draws, from the first on, count."""


class StoppedError(Exception):
    """The passes were stopped while blocks were left."""


class Passes:
    """A model's forward passes, all of one shape: whole blocks of noise around images.

    Noise is drawn into memory that is made once, images are added in place, and counts stay on the device
    until all blocks are done. On CUDA a pass of a :class:`Computing` model is captured in a CUDA graph, so
    the host launches noise and little else; where the capture fails, passes run operation by operation.

    On a CPU the scores of an image were seen to differ in the last bit below 50 images a pass, and never
    from there up (the networks of this package, passes of 50 to 1,024 images, one thread and two);
    another device or a new kernel choice may round otherwise.

    Args:
        model: from float32 images in [0, 1] (normalisation inside) to scores (batch, classes), on
            ``device``. It runs in eval mode without gradients; its own modes are restored.
        image_shape: (C, H, W).
        sigma: noise level in [0, 1] pixel units, > 0.
        device: where to compute.
        batch_size: noisy images in a pass, rounded down to whole blocks, at least one. None takes as many
            as ``LARGEST_OUTPUT`` and ``MOST_BLOCKS`` allow: the fastest on the machines tried.
        compile: try ``torch.compile`` at the first pass, and keep it if it gains there
            (:func:`~fedsmooth_core.certification.compiling.compiled_if_faster`).

    Attributes:
        num_blocks: blocks of noise in a pass.
        device: where to compute.
        stop: once set, counting ends with a :class:`StoppedError` before its next pass.
    """

    def __init__(
        self,
        model: nn.Module,
        image_shape: torch.Size,
        *,
        sigma: float,
        device: torch.device | str,
        batch_size: int | None,
        compile: bool = False,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise CertificationError(f"batch_size={batch_size!r} is out of range: allowed is >= 1.")
        self.device = torch.device(device)
        self.stop = threading.Event()
        self._model = model
        self._shape = image_shape
        self._sigma = sigma
        self._batch_size = batch_size
        self._compile = compile
        self._is_ready = False
        self._histogram: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def num_blocks(self) -> int:
        """Blocks of noise in a pass; without a batch size the model is asked, once."""
        if self._batch_size is None:
            with evaluating(self._model):
                self._batch_size = _fitting_batch_size(self._model, self._shape, self.device)
        return max(1, self._batch_size // NOISE_BLOCK)

    @torch.inference_mode()
    def count(
        self, x: Tensor, blocks: Iterable[Block], num_tallies: int, indices: Iterable[int]
    ) -> NDArray[np.int64]:
        """Draw blocks of noise in their order, and count what the model predicts, tally by tally.

        Args:
            x: (N, C, H, W), float32 in [0, 1], on the device.
            blocks: what to draw, at least one; they are taken pass by pass.
            num_tallies: above every block's tally.
            indices: the images' dataset indices, for an error to name.

        Returns:
            Counts (tallies, classes).

        Raises:
            CertificationError: for a model whose scores are not (batch, classes >= 2) or not finite.
            StoppedError: when ``stop`` is set.
        """
        counts: Tensor | None = None
        blocks = iter(blocks)
        with evaluating(self._model):
            if not self._is_ready:
                self._prepare()
            self._finite.fill_(True)
            while batch := list(islice(blocks, self.num_blocks)):
                if self.stop.is_set():
                    raise StoppedError
                tallies = self._fill(x, batch)
                histogram = self._pass()
                if counts is None:
                    counts = histogram.new_zeros((num_tallies, histogram.shape[1]))
                # Counts stay on the device: a copy per pass would stall it.
                counts.index_add_(0, tallies, histogram)
        assert counts is not None
        if not self._finite:
            known = list(indices)
            raise CertificationError(
                f"the model's scores for images {known[0]} to {known[-1]} are not finite: these "
                "weights cannot be certified (did training diverge?)."
            )
        return np.asarray(counts.cpu().numpy())

    def _prepare(self) -> None:
        blocks, device = self.num_blocks, self.device
        # Tensors of a CUDA graph: a pass reads and writes these, whoever's images they are.
        self._noisy = torch.zeros((blocks, NOISE_BLOCK, *self._shape), device=device)
        self._noise_of_block = list(self._noisy)
        self._images = torch.zeros((blocks, 1, *self._shape), device=device)
        self._counted = torch.zeros((blocks, 1), dtype=torch.int64, device=device)
        self._within_block = torch.arange(NOISE_BLOCK, device=device)
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        is_known = isinstance(self._model, Computing)
        if self._compile:
            self._model = compiled_if_faster(self._model, self._noisy.flatten(0, 1))
        if is_known and device.type == "cuda":
            self._capture()
        self._is_ready = True

    def _fill(self, x: Tensor, batch: list[Block]) -> Tensor:
        """Draw a pass's noise, name its images and draws that count, and return its tallies."""
        for block, noise in zip(batch, self._noise_of_block, strict=False):
            noise.normal_(0.0, self._sigma, generator=block.generator)
        # Blocks that count nothing fill the last pass: every pass has one shape.
        padding = [(0, 0, 0)] * (self.num_blocks - len(batch))
        plan = torch.tensor([(b.image, b.tally, b.counted) for b in batch] + padding)
        image, tally, counted = plan.to(self.device, non_blocking=True).unbind(1)
        torch.index_select(x, 0, image, out=self._images.squeeze(1))
        self._counted.copy_(counted.unsqueeze(1))
        return tally

    def _pass(self) -> Tensor:
        """Carry out a pass and return its counts (blocks, classes), which the next one overwrites."""
        if self._graph is None:
            return self._step()
        self._graph.replay()
        assert self._histogram is not None
        return self._histogram

    def _step(self) -> Tensor:
        self._noisy += self._images
        scores = self._model(self._noisy.flatten(0, 1))
        if self._histogram is None:
            _check_scores(scores, self.num_blocks * NOISE_BLOCK)
            self._histogram = self._counted.new_zeros((self.num_blocks, scores.shape[1]))
        self._finite &= scores.isfinite().all()
        prediction = scores.argmax(1).view(-1, NOISE_BLOCK)
        counts = (self._within_block < self._counted).long()
        return self._histogram.zero_().scatter_add_(1, prediction, counts)

    def _capture(self) -> None:
        """Capture a pass in a CUDA graph, after warm-up on a side stream as CUDA wants it."""
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            try:
                # PyTorch captures once at a time in a process, by default on one stream of one device for
                # all. Whatever becomes of it, this thread's stream is then the one that it was. Other
                # threads may go on allocating, for devices of their own.
                with (
                    _CAPTURING,
                    torch.cuda.stream(torch.cuda.current_stream()),
                    torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"),
                ):
                    self._step()
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                logger.warning("No CUDA graph can hold this model: it runs without (%s).", reason)
                return
        self._graph = graph


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode for the length of the block."""
    # Module by module: a model may hold parts that its owner keeps in eval mode while training.
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _check_scores(scores: Tensor, batch: int) -> None:
    if scores.ndim != 2 or scores.shape[0] != batch or scores.shape[1] < 2:
        raise CertificationError(
            f"the model turned {batch} images into scores of shape {tuple(scores.shape)}: "
            f"a classifier gives ({batch}, classes) with at least 2 classes."
        )


def _fitting_batch_size(model: nn.Module, shape: torch.Size, device: torch.device) -> int:
    seen = _LargestOutput()
    with torch.inference_mode(), seen:
        model(torch.zeros((_PROBED, *shape), device=device))
    bytes_per_image = max(1, seen.num_bytes // _PROBED)
    blocks = LARGEST_OUTPUT[_kind(device)] // (NOISE_BLOCK * bytes_per_image)
    return NOISE_BLOCK * min(max(1, blocks), MOST_BLOCKS[_kind(device)])


_PROBED = 2  # images; a model may squeeze the dimension of a single one
_CAPTURING = threading.Lock()


def _kind(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "cuda"


class _LargestOutput(TorchDispatchMode):
    """Notes the largest tensor that an operation of this thread returns, but for views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # Weights are cast and laid out, too; an image's own values have its batch dimension in front.
        if isinstance(result, Tensor) and result.ndim and result.shape[0] == _PROBED:
            self.num_bytes = max(self.num_bytes, result.nbytes)
        return result
