"""Whether one training recipe certifies more than another, and what can be said of it for sure.

A recipe is trained with S seeds, and each of its models is certified on the same I test images. Two
recipes are paired: seed s of both has the same data partition and the same initial weights.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from fedsmooth_core.certification.bounds import ABSTAIN
from fedsmooth_core.certification.row_format import Rows
from fedsmooth_core.errors import CertificationError


@dataclass(frozen=True)
class Difference:
    """What recipe A has more than recipe B, on average, with a confidence interval."""

    estimate: float
    low: float
    high: float
    num_seeds: int
    """S; with 1 the interval does not cover the randomness of training."""
    num_images: int
    confidence: float


@dataclass(frozen=True)
class Ratio:
    """How many times as long as the other one of two things takes, with a confidence interval."""

    estimate: float
    low: float
    high: float
    num_pairs: int
    confidence: float


class Verdict(StrEnum):
    """What the measurements say of a statement."""

    HOLDS = "holds"
    DOES_NOT_HOLD = "does not hold"
    NOT_DECIDED = "not decided"


def certified_at(rows_of_seeds: Sequence[Rows], radius: float) -> NDArray[np.bool_]:
    """Which images each seed's model classifies correctly and certifies at ``radius``.

    Give both recipes' rows in one call and split the result: so their images are compared, too.

    Args:
        rows_of_seeds: the rows of each model, in any order of images.
        radius: in [0, 1] pixel units, >= 0.

    Returns:
        Booleans (models, images), images by ascending index. The mean of a line is the model's
        :func:`~fedsmooth_core.certification.analysis.certified_accuracy`.

    Raises:
        CertificationError: if there are no rows, or the models were certified on different images.
    """
    return _radii_of_same_images(rows_of_seeds) >= radius


def radii_of(rows_of_seeds: Sequence[Rows]) -> NDArray[np.float64]:
    """Return each image's certified radius for each seed's model, 0 where it is not correct.

    As :func:`certified_at`, but float64 in [0, 1] pixel units; the mean of a line is the model's
    average certified radius.

    Raises:
        CertificationError: as :func:`certified_at`.
    """
    return np.maximum(_radii_of_same_images(rows_of_seeds), 0.0)


def paired_difference(a: ArrayLike, b: ArrayLike, confidence: float = 0.95) -> Difference:
    """Mean of recipe A less mean of recipe B, with an interval over both seeds and test images.

    Seeds and images are crossed random effects of d = a - b: the squared standard error is the
    variance of the S seeds' means over S, plus that of the I images' means over I. What is
    particular to one seed and one image is in both, so the error is slightly too large. The interval
    is Student's, its degrees of freedom Satterthwaite's from S - 1 and I - 1.

    With one seed the interval is over images alone and does not cover the randomness of training.
    With few seeds it is approximate. At a confidence of 0.95 the worst coverage, simulated, is 0.92
    for three seeds and 0.87 for two, where the seeds vary so much that they make nine tenths of the
    squared error; where what is particular to seed and image dominates, it is above 0.95.

    Args:
        a: outcomes of recipe A, shape (S, I), S >= 1, I >= 2: whether an image is certified
            (:func:`certified_at`), or its certified radius (:func:`radii_of`).
        b: outcomes of recipe B, of the same seeds and images in the same places.
        confidence: in (0, 1).

    Returns:
        The difference in the outcomes' unit. Where all outcomes are in [0, 1], so is the size of
        the interval's ends.

    Raises:
        CertificationError: if the shapes differ or are too small, an outcome is not finite, or the
            confidence is out of range.
    """
    _check_confidence(confidence)
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 2 or first.shape[0] < 1 or first.shape[1] < 2:
        raise CertificationError(
            f"outcomes of shapes {first.shape} and {second.shape} cannot be compared: both must be "
            "(seeds, images), the same, with at least 1 seed and 2 images."
        )
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise CertificationError("an outcome is not a finite number: certify its image again.")
    difference = first - second
    num_seeds, num_images = difference.shape
    largest = float(max(np.abs(first).max(), np.abs(second).max())) or 1.0
    # Two disagreements more, one each way, as Bonett and Price (2012) add for paired proportions.
    # Where recipes differ on few images the variance seen is too small, and 0 where they differ on
    # none, though such images may be as many as 3 in I. All seeds may agree on an image that was
    # not met, so this is the images' part; an outcome's range is the largest one seen.
    images = difference.mean(axis=0)
    squares = np.square(images - images.mean()).sum() + 2 * largest**2
    parts = [(float(squares) / (num_images - 1) / num_images, num_images - 1)]
    if num_seeds > 1:
        parts.append((float(difference.mean(axis=1).var(ddof=1)) / num_seeds, num_seeds - 1))
    variance = sum(part for part, _ in parts)
    freedom = 1 / sum((part / variance) ** 2 / degrees for part, degrees in parts)
    estimate = float(difference.mean())
    half = _student(freedom, confidence) * float(np.sqrt(variance))
    limit = 1.0 if largest <= 1 else np.inf
    return Difference(
        estimate=estimate,
        low=max(estimate - half, -limit),
        high=min(estimate + half, limit),
        num_seeds=num_seeds,
        num_images=num_images,
        confidence=confidence,
    )


def ratio_interval(x: Sequence[float], y: Sequence[float], confidence: float = 0.95) -> Ratio:
    """Return how many times as long x takes as y, from timings taken in turn, pair by pair.

    The geometric mean of x[i] / y[i], with the paired Student interval of their logarithms: what
    slows down both halves of a pair alike does not count.

    Args:
        x: seconds, > 0, at least 2 of them.
        y: seconds, as many, each taken right after or before its x.
        confidence: in (0, 1).

    Raises:
        CertificationError: if an argument is outside these ranges.
    """
    _check_confidence(confidence)
    above, below = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if above.shape != below.shape or above.ndim != 1 or len(above) < 2:
        raise CertificationError(
            f"timings of shapes {above.shape} and {below.shape} are not pairs: give two sequences of "
            "one length, at least 2."
        )
    times = np.concatenate([above, below])
    if not ((times > 0) & (times < np.inf)).all():
        raise CertificationError("a timing is not a finite number of seconds > 0: measure again.")
    logs = np.log(above) - np.log(below)
    mean = float(logs.mean())
    half = _student(len(logs) - 1, confidence) * float(logs.std(ddof=1) / np.sqrt(len(logs)))
    low, estimate, high = np.exp([mean - half, mean, mean + half]).tolist()
    return Ratio(estimate, low, high, num_pairs=len(logs), confidence=confidence)


def equal_within(difference: Difference, margin: float) -> Verdict:
    """Say whether two recipes are equal up to ``margin``, both ways, from the whole interval.

    It holds where the interval is inside [-margin, margin]: two one-sided tests, each at
    (1 - confidence) / 2, which is also the largest chance of "holds" where it is false. It does not
    hold where the interval is wholly outside, wrongly with a chance of at most 1 - confidence.

    Args:
        difference: from :func:`paired_difference`.
        margin: >= 0, in the outcomes' unit.

    Raises:
        CertificationError: for another margin.
    """
    if not margin >= 0:
        raise CertificationError(f"margin={margin!r} is no tolerance: allowed is a number >= 0.")
    if -margin <= difference.low and difference.high <= margin:
        return Verdict.HOLDS
    if difference.low > margin or difference.high < -margin:
        return Verdict.DOES_NOT_HOLD
    return Verdict.NOT_DECIDED


def greater_by(difference: Difference, margin: float = 0.0) -> Verdict:
    """Say whether recipe A has more than ``margin`` more than recipe B, from the whole interval.

    More is strictly more: an interval that ends at the margin is not above it. Either answer is
    wrong with a chance of at most (1 - confidence) / 2, as far as the interval covers as it says.
    """
    if difference.low > margin:
        return Verdict.HOLDS
    if difference.high <= margin:
        return Verdict.DOES_NOT_HOLD
    return Verdict.NOT_DECIDED


def all_of(verdicts: Iterable[Verdict]) -> Verdict:
    """Judge a statement that says several things at once: it holds if all of them do.

    "Holds" is wrong no more often than that of a single comparison, however many there are (an
    intersection-union test): of a false statement one part is false, and it would have to hold. "Does
    not hold" of any of k comparisons may be wrong k times as often: where that matters, take each
    interval at a confidence of 1 - (1 - confidence) / k.

    Raises:
        CertificationError: if there are no verdicts.
    """
    found = set(verdicts)
    if not found:
        raise CertificationError("a statement without comparisons cannot be judged: give one.")
    if Verdict.DOES_NOT_HOLD in found:
        return Verdict.DOES_NOT_HOLD
    return Verdict.HOLDS if found == {Verdict.HOLDS} else Verdict.NOT_DECIDED


def _radii_of_same_images(rows_of_seeds: Sequence[Rows]) -> NDArray[np.float64]:
    """Minus infinity where a row is not correct: it is certified at no radius, not even 0."""
    if not rows_of_seeds or not len(rows_of_seeds[0]):
        raise CertificationError("there are no rows to compare: certify the models first.")
    orders = [np.argsort(rows.idx) for rows in rows_of_seeds]
    images = [
        (rows.idx[order], rows.label[order])
        for rows, order in zip(rows_of_seeds, orders, strict=True)
    ]
    for i, found in enumerate(images):
        if not all(map(np.array_equal, found, images[0])):
            raise CertificationError(
                f"rows {i} and rows 0 are not of the same images: certify all models on the same "
                "images of the same data set."
            )
    return np.stack(
        [
            np.where((rows.correct == 1) & (rows.predict != ABSTAIN), rows.radius, -np.inf)[order]
            for rows, order in zip(rows_of_seeds, orders, strict=True)
        ]
    )


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise CertificationError(f"confidence={confidence!r} is out of range: allowed is (0, 1).")


def _student(freedom: float, confidence: float) -> float:
    return float(stdtrit(freedom, (1 + confidence) / 2))
