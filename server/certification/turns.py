"""One device, shared forward pass by forward pass between certification and online calls."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Turns:
    """A lock that is given to threads in the order in which they asked for it."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Event] = deque()
        self._last_pass: torch.cuda.Event | None = None

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Wait for the turn and hold it for the length of the block."""
        with self._mutex:
            mine = threading.Event() if self._taken else None
            if mine is not None:
                self._waiting.append(mine)
            self._taken = True
        if mine is not None:
            mine.wait()
        try:
            yield
        finally:
            with self._mutex:
                # Handed over, not let go of: nobody who comes now gets in between.
                if self._waiting:
                    self._waiting.popleft().set()
                else:
                    self._taken = False

    def run(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return the model's scores for a batch, computed in one turn."""
        with self.taken():
            if not images.is_cuda:
                scores: Tensor = model(images)
                return scores
            # CUDA only queues the pass. Without a bound on that queue whoever comes next would wait
            # for all of it; one pass ahead keeps the device busy.
            if self._last_pass is not None:
                self._last_pass.synchronize()
            scores = model(images)
            self._last_pass = torch.cuda.Event()
            self._last_pass.record()
            return scores


class TakingTurns(nn.Module):
    """A model whose every forward pass takes a turn on the device.

    Args:
        model: from images to scores.
        turns: of the device.
        before: called before each pass; what it raises ends the work.
    """

    def __init__(
        self, model: nn.Module, turns: Turns, before: Callable[[], None] | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self._turns = turns
        self._before = before

    def forward(self, images: Tensor) -> Tensor:
        if self._before is not None:
            self._before()
        return self._turns.run(self.model, images)
