"""The statistics of CERTIFY (Cohen et al. 2019): from a count to a bound, from it to a radius.

Everything here is float64 arithmetic on int64 counts; no model, no images.
"""

from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincinv, ndtri

from fedsmooth_core.errors import CertificationError

ABSTAIN = -1
"""What is predicted where the statistics allow no certificate."""

MAX_SIGMA = 1e6
"""The largest noise level: far beyond any use, and far below where float32 images overflow."""


def check_alpha(alpha: float) -> None:
    """Refuse a failure probability outside (0, 1) with a :class:`CertificationError`."""
    if not 0 < alpha < 1:
        raise CertificationError(f"alpha={alpha!r} is no failure probability: allowed is (0, 1).")


def check_sigma(sigma: float) -> None:
    """Refuse a noise level outside (0, ``MAX_SIGMA``] with a :class:`CertificationError`."""
    if not 0 < sigma <= MAX_SIGMA:
        raise CertificationError(
            f"sigma={sigma!r} cannot certify: allowed is a number > 0, up to {MAX_SIGMA:g} "
            "(in [0, 1] units)."
        )


@overload
def p_a_lower(count: int, n: int, alpha: float) -> float: ...
@overload
def p_a_lower(count: NDArray[np.int64], n: int, alpha: float) -> NDArray[np.float64]: ...
def p_a_lower(count: ArrayLike, n: int, alpha: float) -> float | NDArray[np.float64]:
    """Lower confidence bound on a probability that showed ``count`` times in ``n`` draws.

    One-sided Clopper-Pearson, the paper's LowerConfBound: p = BetaInv(alpha; k, n - k + 1), and 0
    at k = 0. The chance that the bound exceeds the true probability is at most alpha.

    Args:
        count: k, an integer or an array of them, 0 <= k <= n.
        n: number of draws, >= 1.
        alpha: failure probability of each bound, in (0, 1).

    Returns:
        float64 in [0, 1), a scalar or in the shape of ``count``.

    Raises:
        CertificationError: for an argument outside these ranges.
    """
    check_alpha(alpha)
    k = np.asarray(count)
    if not np.issubdtype(k.dtype, np.integer):
        raise CertificationError(f"a count is a whole number of draws, but its type is {k.dtype}.")
    if n < 1 or (k < 0).any() or (k > n).any():
        raise CertificationError(
            f"count={count!r} of n={n!r} draws is impossible: allowed is 0 <= count <= n, n >= 1."
        )
    k = k.astype(np.int64)
    # BetaInv has no value at k = 0; there the bound is 0 by definition.
    bound = np.where(k == 0, 0.0, betaincinv(np.maximum(k, 1), n - k + 1, alpha))
    return bound if bound.ndim else float(bound)


@overload
def certified_radius(p_a: float, sigma: float) -> float: ...
@overload
def certified_radius(p_a: NDArray[np.float64], sigma: float) -> NDArray[np.float64]: ...
def certified_radius(p_a: ArrayLike, sigma: float) -> float | NDArray[np.float64]:
    """Radius within which no l2 perturbation changes the smoothed prediction (Cohen et al., eq. 3).

    sigma * Phi^-1(p_a) with the binary bound p_b = 1 - p_a, as in CERTIFY; 0 where p_a < 1/2, which
    is an abstention.

    Args:
        p_a: lower bound on the top class's probability, in [0, 1], a number or an array.
        sigma: noise level in [0, 1] pixel units, > 0, at most ``MAX_SIGMA``.

    Returns:
        float64 >= 0 in [0, 1] pixel units (infinite at p_a = 1), a scalar or shaped as ``p_a``.

    Raises:
        CertificationError: for an argument outside these ranges.
    """
    check_sigma(sigma)
    p = np.asarray(p_a, dtype=np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise CertificationError(f"p_a={p_a!r} is no probability: allowed is [0, 1].")
    radius = np.where(p < 0.5, 0.0, sigma * ndtri(np.maximum(p, 0.5)))
    return radius if radius.ndim else float(radius)
