"""Images handed out in order to whoever certifies next, and rows put back in order."""

import threading
from collections.abc import Iterator

from fedsmooth_core.certification.row_format import CertifiedRow


class Handout:
    """Positions of images, from 0, each handed out once and in order; safe for threads.

    Args:
        num_images: how many there are.
        most_ahead: how many may be handed out beyond those that :meth:`advance` counted; None is no
            bound.
        num_takers: who take in turns. Nobody is given more than an equal share of what is left, so that
            all end at about the same time.
    """

    def __init__(self, num_images: int, most_ahead: int | None = None, num_takers: int = 1) -> None:
        self._num_images = num_images
        self._num_takers = num_takers
        self._most_ahead = num_images if most_ahead is None else most_ahead
        self._next = 0
        self._num_done = 0
        self._changed = threading.Condition()

    def take(self, most: int, *, wait: bool) -> list[int]:
        """Take the next positions.

        Args:
            most: how many at most; with 0 none are taken.
            wait: until there is one to take; so nothing at all means that all are handed out.
        """
        with self._changed:
            while wait and self._room == 0 and self._next < self._num_images:
                self._changed.wait()
            start = self._next
            share = -(-(self._num_images - start) // self._num_takers)
            self._next += min(most, self._room, share)
            return list(range(start, self._next))

    def advance(self) -> None:
        """Count one image as done with."""
        with self._changed:
            self._num_done += 1
            self._changed.notify_all()

    def close(self) -> None:
        """Hand out no more."""
        with self._changed:
            self._num_images = self._next
            self._changed.notify_all()

    @property
    def _room(self) -> int:
        return min(self._num_images, self._num_done + self._most_ahead) - self._next


def in_order(rows: Iterator[tuple[int, CertifiedRow]]) -> Iterator[CertifiedRow]:
    """Yield rows by ascending position, from 0, each as soon as those before it are there."""
    waiting: dict[int, CertifiedRow] = {}
    num_given = 0
    for position, row in rows:
        waiting[position] = row
        while num_given in waiting:
            yield waiting.pop(num_given)
            num_given += 1
