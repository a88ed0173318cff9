"""CERTIFY with as many draws as a grid of radii needs: most images are decided long before n."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsmooth_core.certification.bounds import ABSTAIN
from fedsmooth_core.certification.certify import check_labels
from fedsmooth_core.certification.counting import (
    PASSES_PER_GROUP,
    check_draws,
    check_sampling,
    counted_of_blocks,
    unit_images,
)
from fedsmooth_core.certification.handout import Handout, in_order
from fedsmooth_core.certification.passes import NOISE_BLOCK, Block, Passes
from fedsmooth_core.certification.row_format import CertifiedRow
from fedsmooth_core.certification.sequential import SequentialTest, sequential_test
from fedsmooth_core.seeding import Purpose, torch_generator

_SELECTION = -1
"""Stands where a look stands, for the draws before the first."""


def certify_sequential(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    indices: Sequence[int],
    *,
    max_value: float,
    sigma: float,
    n0: int,
    n: int,
    alpha: float,
    radius_step: float,
    seed: int,
    batch_size: int | None,
    device: torch.device | str,
) -> Iterator[CertifiedRow]:
    """Certify the smoothed classifier on a grid of radii, one row an image, in order.

    n0 draws select a class, as in :func:`~fedsmooth_core.certification.certify.certify`; FRESH
    draws, the first of those that ``certify`` would count, decide by
    :class:`~fedsmooth_core.certification.sequential.SequentialTest` which grid radii it has. A row
    says in ``n`` how many they were. With probability at least 1 - alpha for each image, the
    smoothed classifier predicts the row's class everywhere within its radius. Between grid radii a
    row claims less than it could: certified accuracy is meant at grid radii alone.

    A row depends on the weights, the image, sigma, n0, n, alpha, radius_step, seed and the image's
    dataset index alone. Images that are decided make room for others, so forward passes stay full.
    Arguments are as for ``certify`` and checked at the call.

    Args:
        model: as for ``certify``.
        images: (N, C, H, W), of any number type and on any device.
        labels: (N,) integers, the true classes.
        indices: N dataset indices: they name the rows and the images' noise.
        max_value: the pixel value that means 1.0.
        sigma: noise level in [0, 1] pixel units, > 0.
        n0: draws that select the class, >= 1.
        n: the most draws that estimate its probability, >= 1.
        alpha: failure probability, in (0, 1).
        radius_step: step of the grid in [0, 1] pixel units, > 0; at most 1,000 radii.
        seed: of the run.
        batch_size: noisy images in one forward pass, or None, as for ``certify``.
        device: where to compute.

    Raises:
        CertificationError: as ``certify``, and for a ``radius_step`` outside its range.
    """
    check_sampling(images, indices, sigma)
    check_labels(images, labels)
    check_draws(Purpose.SELECTION, n0)
    check_draws(Purpose.ESTIMATION, n)
    test = sequential_test(sigma, n, alpha, radius_step)
    passes = Passes(model, images.shape[1:], sigma=sigma, device=device, batch_size=batch_size)
    rows = sequential_rows(
        passes,
        Handout(len(images)),
        images,
        labels,
        indices,
        max_value=max_value,
        test=test,
        n0=n0,
        seed=seed,
    )
    return in_order(rows)


def sequential_rows(
    passes: Passes,
    handout: Handout,
    images: Tensor,
    labels: Tensor,
    indices: Sequence[int],
    *,
    max_value: float,
    test: SequentialTest,
    n0: int,
    seed: int,
) -> Iterator[tuple[int, CertifiedRow]]:
    """Certify what is handed out, as :func:`certify_sequential`, whose arguments were checked.

    Yields:
        Position among the images and row, as images are decided.
    """
    true_classes = labels.tolist()
    drawing = _Drawing(test, n0, passes.num_blocks)
    while True:
        newcomers = handout.take(drawing.room, wait=not drawing.flights)
        if not newcomers and not drawing.flights:
            return
        started = time.perf_counter()
        x = unit_images(images[newcomers], max_value, passes.device)
        for image, position in zip(x, newcomers, strict=True):
            selection, estimation = (
                torch_generator(seed, purpose, int(indices[position]), device=x.device)
                for purpose in (Purpose.SELECTION, Purpose.ESTIMATION)
            )
            drawing.start(_Flight(position, image, selection, estimation))
        blocks = drawing.next_blocks()
        counts = passes.count(
            torch.stack([flight.x for flight in drawing.flights]),
            blocks,
            drawing.num_tallies,
            [indices[flight.position] for flight in drawing.flights],
        )
        drawing.take_in(counts, time.perf_counter() - started)
        for flight in drawing.land():
            yield flight.position, _row(flight, indices, true_classes, test)


def _row(
    flight: "_Flight", indices: Sequence[int], true_classes: Sequence[int], test: SequentialTest
) -> CertifiedRow:
    label = true_classes[flight.position]
    predict = flight.top_class if flight.is_certified else ABSTAIN
    return CertifiedRow(
        idx=int(indices[flight.position]),
        label=label,
        predict=predict,
        radius=flight.radius,
        correct=int(predict == label),
        time=flight.seconds,
        n=int(test.looks[flight.look]),
    )


@dataclass(eq=False)
class _Flight:
    """An image that is being drawn for."""

    position: int
    """Among all images."""
    x: Tensor
    selection: torch.Generator
    estimation: torch.Generator
    top_class: int = -1
    """The class selected; -1 before."""
    num_drawn: int = 0
    """Blocks of estimation drawn; with room to spare they run ahead of the look."""
    ahead: dict[int, int] = field(default_factory=dict)
    """How often the class was counted between the look before and a look still to come."""
    look: int = 0
    """The next look; where the image is decided, the last one."""
    count: int = 0
    """How often the class was counted up to the last look."""
    level: int = 0
    """Hypotheses rejected."""
    seconds: float = 0.0
    radius: float = 0.0
    is_certified: bool = False


class _Drawing:
    """Whose turn it is: whole rounds of blocks, an image's up to its next look, the oldest first.

    A round that is not full takes more images; when there are none, what is left of its last forward
    pass draws ahead. That changes when an image is decided, never on which draws.
    """

    def __init__(self, test: SequentialTest, n0: int, blocks_per_pass: int) -> None:
        self.flights: list[_Flight] = []
        self._test = test
        self._blocks_per_pass = blocks_per_pass
        self._most_blocks = PASSES_PER_GROUP * blocks_per_pass
        self._counted_in_selection = list(counted_of_blocks(n0))
        self._blocks_to_look = -(-test.looks // NOISE_BLOCK)
        self._blocks: list[Block] = []
        self._tallies: dict[tuple[int, int], int] = {}

    @property
    def room(self) -> int:
        """How many more images the next round has room for."""
        taken = sum(self._wanted(flight) for flight in self.flights)
        each = len(self._counted_in_selection) + int(self._blocks_to_look[0])
        return max(0, -(-(self._most_blocks - taken) // each))

    def start(self, flight: _Flight) -> None:
        """Let an image take part from the next round on."""
        self.flights.append(flight)

    def next_blocks(self) -> list[Block]:
        """Return the next round's blocks, at least one; their images are rows of ``flights``."""
        self._blocks, self._tallies = [], {}
        for row, flight in enumerate(self.flights):
            if flight.top_class < 0:
                tally = self._tally(row, _SELECTION)
                for counted in self._counted_in_selection:
                    self._blocks.append(Block(row, flight.selection, tally, counted))
            room = max(0, self._most_blocks - len(self._blocks))
            self._draw(row, min(self._wanted(flight), room))
        for row in range(len(self.flights)):
            self._draw(row, -len(self._blocks) % self._blocks_per_pass)
        return self._blocks

    @property
    def num_tallies(self) -> int:
        """How many tallies the round's blocks are counted in."""
        return len(self._tallies)

    def take_in(self, counts: NDArray[np.int64], seconds: float) -> None:
        """Add what the round's blocks were predicted as, tallies by classes, and its time."""
        for (row, look), tally in self._tallies.items():  # an image's selection comes first
            flight = self.flights[row]
            if look == _SELECTION:
                flight.top_class = int(counts[tally].argmax())
            else:
                more = int(counts[tally, flight.top_class])
                flight.ahead[look] = flight.ahead.get(look, 0) + more
        for block in self._blocks:
            self.flights[block.image].seconds += seconds / len(self._blocks)

    def land(self) -> set[_Flight]:
        """Look at every image that is drawn far enough; return the decided, who take no more part."""
        landed: set[_Flight] = set()
        due = [flight for flight in self.flights if not self._wanted(flight)]
        while due:
            for flight in due:
                flight.count += flight.ahead.pop(flight.look)
            look, level, count = np.array([(one.look, one.level, one.count) for one in due]).T
            level, is_decided = self._test.decide(look, level, count)
            radius, is_certified = self._test.certificate(look, level, count)
            for i, flight in enumerate(due):
                flight.level = int(level[i])
                if is_decided[i]:
                    flight.radius, flight.is_certified = float(radius[i]), bool(is_certified[i])
                    landed.add(flight)
                else:
                    flight.look += 1
            due = [
                flight
                for flight, is_over in zip(due, is_decided, strict=True)
                if not is_over and not self._wanted(flight)
            ]
        self.flights = [flight for flight in self.flights if flight not in landed]
        return landed

    def _wanted(self, flight: _Flight) -> int:
        """How many blocks an image lacks for its next look."""
        return max(0, int(self._blocks_to_look[flight.look]) - flight.num_drawn)

    def _draw(self, row: int, num_blocks: int) -> None:
        flight = self.flights[row]
        end = min(flight.num_drawn + num_blocks, int(self._blocks_to_look[-1]))
        blocks = np.arange(flight.num_drawn, end)
        look_of_block = np.searchsorted(self._blocks_to_look, blocks, side="right").tolist()
        for block, look in zip(blocks.tolist(), look_of_block, strict=True):
            counted = min(NOISE_BLOCK, self._test.n - block * NOISE_BLOCK)
            self._blocks.append(Block(row, flight.estimation, self._tally(row, look), counted))
        flight.num_drawn = end

    def _tally(self, row: int, look: int) -> int:
        return self._tallies.setdefault((row, look), len(self._tallies))
