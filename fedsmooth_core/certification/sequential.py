"""The statistics of sequential certification: as many draws as a grid of radii needs, at most n.

Certified accuracy is asked for on a grid of radii r_0 = 0 < r_1 < ... So the question is not "what
is p", the chance of the selected class, but which hypotheses H_j: p <= t_j = Phi(r_j / sigma) are
false. Most images answer that long before n draws.

Why at most alpha of the certificates claim too much:

1. The e-value E_j is the likelihood of the draws so far under a prior for p on (t_j, 1], over their
   likelihood at t_j. Where p <= t_j it is a supermartingale that starts at 1, so the chance that it
   EVER reaches 1 / delta is at most delta (Ville 1939). One may look as often as one likes.
2. The hypotheses are nested and rejected in ascending order. The first false rejection could only
   be that of the smallest true H_j, so one delta = alpha / 5 covers all of them.
3. At the n-th draw Clopper-Pearson's bound is taken besides, at the remaining 4/5 alpha. It fails
   with at most that chance over all n draws, hence also where they are all drawn.
4. So with probability >= 1 - alpha neither fails, and the larger of the two radii is certified: a
   grid radius, or any real number where all n draws were needed.
5. Stopping earlier rejects nothing, so it cannot make an error: when to give up is free to choose.

Ville's inequality and mixtures: Robbins, Ann. Math. Stat. 41 (1970); e-values: Ramdas et al.,
"Game-theoretic statistics and safe anytime-valid inference", Stat. Sci. 38 (2023).
"""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betainc, betaln, log_ndtr, ndtr

from fedsmooth_core.certification.bounds import (
    certified_radius,
    check_alpha,
    check_sigma,
    p_a_lower,
)
from fedsmooth_core.certification.passes import NOISE_BLOCK
from fedsmooth_core.errors import CertificationError

LOOK_RATIO = 1.1
"""From one look to the next, about. Looks cost no certainty, only a little arithmetic."""

ALPHA_OF_LOOKS = 0.2
"""Share of alpha spent on the e-values; the rest is Clopper-Pearson's at the n-th draw."""

FUTILE_BELOW = 0.01
"""An image stops when its next radius is reached with less than this chance (predicted)."""

MOST_RADII = 1000
"""Radii of a grid, at most."""


class SequentialTest:
    """Which grid radii a count of successes certifies, and when there is no point in going on.

    Tables of whole numbers, made once: a decision is a comparison of counts. Make it by
    :func:`sequential_test`, which keeps the last ones.

    Args:
        sigma: noise level in [0, 1] pixel units, > 0.
        n: draws an image may take, >= 1.
        alpha: failure probability of each image's certificate, in (0, 1).
        radius_step: step of the grid, in [0, 1] pixel units, > 0.

    Attributes:
        radii: (R,) the grid radii that n draws can certify, from 0; R is 0 when there are none.
        thresholds: (R,) t_j, the chances of the selected class that they need, from 1/2.
        looks: (L,) numbers of draws after which to decide, ascending, the last is n.
        reject_from: (L, R) the smallest count that rejects H_j at a look by its e-value (look + 1
            where none does).
        go_on_from: (L, R) the smallest count with which going on for radius j is not futile.

    Raises:
        CertificationError: for an argument outside these ranges, or a grid of more than
            ``MOST_RADII`` radii.
    """

    def __init__(self, sigma: float, n: int, alpha: float, radius_step: float) -> None:
        check_sigma(sigma)
        check_alpha(alpha)
        if n < 1:
            raise CertificationError(f"n={n!r} draws are none: n0 and n must be >= 1.")
        self.sigma, self.n = sigma, n
        self.alpha_at_n = (1 - ALPHA_OF_LOOKS) * alpha
        self.radii = _grid(sigma, n, self.alpha_at_n, radius_step)
        self.thresholds: NDArray[np.float64] = ndtr(self.radii / sigma)
        self.looks = look_schedule(n)
        enough_at_n = _smallest_count(
            lambda k: p_a_lower(k, n, self.alpha_at_n) >= self.thresholds,
            np.full(len(self.radii), n),
        )
        log_rejection = -math.log(ALPHA_OF_LOOKS * alpha)
        drawn = np.repeat(self.looks[:, np.newaxis], len(self.radii), axis=1)
        self.reject_from = _smallest_count(
            lambda k: log_e_value(k, drawn, self.radii / sigma) >= log_rejection, drawn
        )
        self.go_on_from = _smallest_count(
            lambda k: _chance_to_reach(enough_at_n, n, k, drawn) >= FUTILE_BELOW, drawn
        )

    def decide(
        self, look: NDArray[np.int64], level: NDArray[np.int64], count: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Look at images after ``looks[look]`` draws each.

        Args:
            look: (N,) which look it is for each image.
            level: (N,) hypotheses rejected so far, 0 before the first look.
            count: (N,) draws that showed the selected class.

        Returns:
            (N,) hypotheses rejected now, and (N,) whether the image is decided.
        """
        rejected = count[:, np.newaxis] >= self.reject_from[look]
        rejected |= np.arange(len(self.radii)) < level[:, np.newaxis]
        # In ascending order: up to the first that is not rejected.
        now = np.logical_and.accumulate(rejected, axis=1).sum(axis=1)
        decided = (now == len(self.radii)) | (look == len(self.looks) - 1)
        rest = np.flatnonzero(~decided)
        decided[rest] = count[rest] < self.go_on_from[look[rest], now[rest]]
        return now, decided

    def certificate(
        self, look: NDArray[np.int64], level: NDArray[np.int64], count: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Turn decided images, as in :meth:`decide`, into radii.

        Returns:
            (N,) certified radii, 0 for an abstention, and (N,) whether the image is certified.
        """
        by_looks = np.concatenate([[0.0], self.radii])[level]
        at_n = look == len(self.looks) - 1
        bound = p_a_lower(np.where(at_n, count, 0), self.n, self.alpha_at_n)
        radius = np.maximum(by_looks, certified_radius(bound, self.sigma))
        return radius, (level > 0) | (bound >= 0.5)


@lru_cache(maxsize=8)
def sequential_test(sigma: float, n: int, alpha: float, radius_step: float) -> SequentialTest:
    """Return the :class:`SequentialTest` of these settings; the last few are kept."""
    return SequentialTest(sigma, n, alpha, radius_step)


def look_schedule(n: int) -> NDArray[np.int64]:
    """Return after how many draws to look: whole blocks, ``LOOK_RATIO`` apart or one, and n."""
    looks, blocks = [], 1
    while blocks * NOISE_BLOCK < n:
        looks.append(blocks * NOISE_BLOCK)
        blocks = max(blocks + 1, math.ceil(blocks * LOOK_RATIO))
    return np.array([*looks, n], np.int64)


def log_e_value(count: ArrayLike, n: ArrayLike, z: ArrayLike) -> NDArray[np.float64]:
    """Return the log of the e-value against p <= t, t = Phi(z), of ``count`` successes in n draws.

    The mean over the prior Beta(1/2, 1/2) truncated to (t, 1] of
    (q / t)^count ((1 - q) / (1 - t))^(n - count). Both tails of t enter, so t may be near 1.

    Args:
        count: k, 0 <= k <= n.
        n: draws, >= 0.
        z: standard deviations, >= 0: a radius over sigma. All three broadcast.

    Returns:
        float64; -inf where so little of the likelihood lies beyond t that no number says it. There
        count / n < t, and the true value is below 0.
    """
    k, m, z = np.asarray(count), np.asarray(n), np.asarray(z, dtype=np.float64)
    above = ndtr(-z)
    with np.errstate(divide="ignore"):
        log_posterior = np.log(betainc(m - k + 0.5, k + 0.5, above))
    log_prior = betaln(0.5, 0.5) + np.log(betainc(0.5, 0.5, above))
    log_null = k * log_ndtr(z) + (m - k) * log_ndtr(-z)
    result = betaln(k + 0.5, m - k + 0.5) + log_posterior - log_prior - log_null
    return np.asarray(result, dtype=np.float64)


def check_grid(sigma: float, n: int, alpha: float, radius_step: float) -> None:
    """Refuse a grid of more than ``MOST_RADII`` radii with a :class:`CertificationError`."""
    _grid(sigma, n, (1 - ALPHA_OF_LOOKS) * alpha, radius_step)


def _grid(sigma: float, n: int, alpha: float, radius_step: float) -> NDArray[np.float64]:
    """Return the multiples of the step that all of n draws showing one class would certify."""
    if not 0 < radius_step < math.inf:
        raise CertificationError(f"radius_step={radius_step!r} makes no grid: allowed is > 0.")
    bound = p_a_lower(n, n, alpha)
    if bound < 0.5:
        return np.zeros(0)
    largest = certified_radius(bound, sigma)
    if largest / radius_step >= MOST_RADII:
        raise CertificationError(
            f"radius_step={radius_step:g} makes more than {MOST_RADII} radii up to {largest:.3g}, the "
            f"largest that n={n} draws can certify: take a larger step."
        )
    # As they are printed and asked for: 3 steps of 0.1 are 0.3.
    radii = np.round(np.arange(int(largest / radius_step) + 2) * radius_step, 12)
    return np.asarray(radii[ndtr(radii / sigma) <= bound])


def _smallest_count(
    enough: Callable[[NDArray[np.int64]], NDArray[np.bool_]], n: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return for each n the smallest count in [0, n] that is enough, n + 1 if none is (bisection)."""
    low, high = np.zeros_like(n), n + 1
    while (low < high).any():
        middle = (low + high) // 2
        # n + 1 is no count; there the search has ended, and the answer does not matter.
        is_enough = enough(np.minimum(middle, n))
        open_ = low < high
        high = np.where(open_ & is_enough, middle, high)
        low = np.where(open_ & ~is_enough, middle + 1, low)
    return low


def _chance_to_reach(
    target: NDArray[np.int64], n: int, count: NDArray[np.int64], drawn: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Predict how likely n draws show the class ``target`` times, after ``count`` of ``drawn`` did.

    The Beta-binomial of the draws to come, p under Jeffreys' prior, by its normal approximation:
    it decides when to give up, so nothing but speed and a few lost radii depend on it.
    """
    rest, a, b = n - drawn, count + 0.5, drawn - count + 0.5
    p = a / (a + b)
    spread = np.sqrt(rest * p * (1 - p) * (n + 1) / (drawn + 2))
    return np.asarray(ndtr((count + rest * p - target + 0.5) / np.maximum(spread, 0.5)))
