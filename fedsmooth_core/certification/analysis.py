"""From certification rows to the field's figures: certified accuracy, average certified radius.

Every mean is over ALL rows; an abstained row is never correct.
"""

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedsmooth_core.certification.bounds import ABSTAIN, p_a_lower
from fedsmooth_core.certification.rows import Rows, read_rows

__all__ = [
    "Rows",
    "abstention_rate",
    "average_certified_radius",
    "certified_accuracy",
    "confidence_interval",
    "read_rows",
    "summary",
]


@overload
def certified_accuracy(rows: Rows, radius: float) -> float: ...
@overload
def certified_accuracy(rows: Rows, radius: NDArray[np.float64]) -> NDArray[np.float64]: ...
def certified_accuracy(rows: Rows, radius: ArrayLike) -> float | NDArray[np.float64]:
    """Share of images that no l2 perturbation up to ``radius`` takes from their true class.

    The mean over all rows of (correct and certified radius >= radius), in [0, 1], for a radius or
    an array of them in [0, 1] pixel units; NaN when there are no rows.
    """
    accuracy = _num_certified(rows, radius) / (len(rows) or np.nan)
    return accuracy if accuracy.ndim else float(accuracy)


def confidence_interval(
    rows: Rows, radius: ArrayLike, confidence: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two-sided Clopper-Pearson interval for a certified accuracy, over the choice of test images.

    It says how far the images looked at may be from all images of their kind; the certificates' own
    failure probability alpha comes on top.

    Returns:
        Lower and upper ends in the shape of ``radius``; 0 and 1 when there are no rows.
    """
    certified = _num_certified(rows, radius)
    if not len(rows):
        return np.zeros(certified.shape), np.ones(certified.shape)
    tail = (1 - confidence) / 2
    low = p_a_lower(certified, len(rows), tail)
    high = 1 - p_a_lower(len(rows) - certified, len(rows), tail)
    return np.asarray(low), np.asarray(high)


def average_certified_radius(rows: Rows) -> float:
    """Mean over all rows of the certified radius, 0 for those not correct; NaN without rows."""
    return float(np.sum(rows.radius[_correct(rows)]) / (len(rows) or np.nan))


def abstention_rate(rows: Rows) -> float:
    """Share of rows without a prediction, in [0, 1]; NaN without rows."""
    return float(np.count_nonzero(rows.predict == ABSTAIN) / (len(rows) or np.nan))


def summary(rows: Rows, radii: Sequence[float]) -> dict[str, Any]:
    """Return all figures at some radii, ready for JSON: null stands where there are no rows.

    Where rows say how many draws they took, ``mean_n`` is their mean.
    """
    grid = np.asarray(radii, dtype=np.float64)
    accuracy = certified_accuracy(rows, grid)
    low, high = confidence_interval(rows, grid)
    return {
        "num_images": len(rows),
        **({} if rows.n is None else {"mean_n": float(rows.n.mean())}),
        "average_certified_radius": _or_none(average_certified_radius(rows)),
        "abstention_rate": _or_none(abstention_rate(rows)),
        "certified_accuracy": [
            {
                "radius": float(grid[i]),
                "accuracy": _or_none(float(accuracy[i])),
                "confidence_interval_95": [float(low[i]), float(high[i])],
            }
            for i in range(len(grid))
        ],
    }


def _correct(rows: Rows) -> NDArray[np.bool_]:
    return np.asarray((rows.correct == 1) & (rows.predict != ABSTAIN))


def _num_certified(rows: Rows, radius: ArrayLike) -> NDArray[np.int64]:
    radii = np.sort(rows.radius[_correct(rows)])
    below = np.searchsorted(radii, np.asarray(radius, dtype=np.float64), side="left")
    return np.asarray(len(radii) - below, dtype=np.int64)


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else value
