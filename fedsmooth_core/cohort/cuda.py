"""What a CUDA device adds: the fastest kernels by timing, graphs of a local step, chunks that fit."""

import torch
from torch import Tensor

from fedsmooth_core.cohort.convolution import Convolution, ConvShape, candidates
from fedsmooth_core.cohort.local_training import TakeStep

_WARM_UPS = 3
_TIMED = 5
_SHARE_OF_MEMORY = 0.8
_MOST_GRAPHS = 8

Inputs = tuple[Tensor, Tensor, Tensor]
"""Images, labels and noise of a step."""


class FastestWay:
    """Chooses how a convolution is computed: times the candidates once, and keeps the fastest.

    Args:
        num_clients: K of the timing.
        num_images: noisy copies a client passes through at once, n.
        dtype: of the arithmetic.
        device: a CUDA device.
    """

    def __init__(
        self, num_clients: int, num_images: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._size = (num_clients, num_images)
        self._dtype, self._device = dtype, device
        self._chosen: dict[ConvShape, Convolution] = {}

    def __call__(self, shape: ConvShape) -> Convolution:
        if shape not in self._chosen:
            ways = candidates(shape)
            self._chosen[shape] = min(ways, key=lambda way: self._seconds(way, shape))
        return self._chosen[shape]

    def _seconds(self, way: Convolution, shape: ConvShape) -> float:
        """Time what a local step does with a convolution: prepare, three passes, all gradients once."""
        num_clients, num_images = self._size
        maps = (num_clients, num_images, shape.in_channels, shape.height, shape.width)
        taps = (shape.out_channels, shape.in_channels, shape.kernel, shape.kernel)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        try:
            # Not drawn: the global generator is nobody's to advance.
            x = torch.ones(maps, device=self._device, dtype=self._dtype, requires_grad=True)
            weight = way.pack(torch.ones(num_clients, *taps, device=self._device))
            leaf = weight.contiguous().requires_grad_()
            for attempt in range(2):
                if attempt:
                    start.record()
                for _ in range(_TIMED):
                    prepared, _ = way.prepare(leaf, None, self._dtype)
                    for _ in range(2):
                        way_out = way.apply(x, prepared.detach(), None)
                        torch.autograd.grad(way_out, x, torch.ones_like(way_out))
                    out = way.apply(x, prepared, None)
                    torch.autograd.grad(out, [x, leaf], torch.ones_like(out))
            end.record()
            end.synchronize()
        except torch.OutOfMemoryError:
            return float("inf")
        seconds: float = start.elapsed_time(end)
        return seconds


class CapturedStep:
    """A local step as CUDA graphs, one for each size: one launch in place of hundreds.

    Args:
        step: works in place on tensors that stay where they are.
    """

    def __init__(self, step: TakeStep) -> None:
        self._step = step
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Inputs]] = {}
        # Graphs are replayed one after the other, so they may all work in the same memory.
        self._pool = torch.cuda.graph_pool_handle()

    def has(self, num_active: int, num_images: int) -> bool:
        """Whether the step is captured for so many clients and images of them all."""
        return (num_active, num_images) in self._graphs

    def warm_up(self, num_active: int, inputs: Inputs) -> None:
        """Take the step a few times beside the current stream: libraries choose kernels and workspaces."""
        device = inputs[0].device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._step(num_active, *inputs)
        torch.cuda.current_stream(device).wait_stream(stream)

    def capture(self, num_active: int, inputs: Inputs) -> None:
        """Capture the step for inputs of these sizes, which the graph will read from these tensors."""
        if len(self._graphs) == _MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        graph = torch.cuda.CUDAGraph()
        # Whatever becomes of the capture, afterwards the current stream is the one that it was.
        with (
            torch.cuda.stream(torch.cuda.current_stream(inputs[0].device)),
            torch.cuda.graph(graph, pool=self._pool, stream=torch.cuda.Stream(inputs[0].device)),
        ):
            self._step(num_active, *inputs)
        self._graphs[num_active, len(inputs[0])] = (graph, inputs)

    def __call__(self, num_active: int, x: Tensor, labels: Tensor, noise: Tensor) -> None:
        graph, inputs = self._graphs[num_active, len(x)]
        for static, tensor in zip(inputs, (x, labels, noise), strict=True):
            static.copy_(tensor)
        graph.replay()


def clients_that_fit(
    num_clients: int, bytes_per_client: int, bytes_kept: int, device: torch.device
) -> int:
    """Return how many clients to train at once: all, or equal chunks that fit into free memory.

    Args:
        num_clients: of the cohort.
        bytes_per_client: what a client in training takes.
        bytes_kept: what the results of the whole cohort take, for they stay on the device.
        device: a CUDA device.
    """
    free, _ = torch.cuda.mem_get_info(device)
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    room = _SHARE_OF_MEMORY * (free + reusable) - bytes_kept
    fit = max(1, min(num_clients, int(room // max(1, bytes_per_client))))
    return -(-num_clients // -(-num_clients // fit))
