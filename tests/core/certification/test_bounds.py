import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from published_results import REFERENCE, needs_reference
from scipy.special import ndtr
from scipy.stats import binom

from fedsmooth_core.certification.bounds import ABSTAIN, certified_radius, p_a_lower
from fedsmooth_core.errors import CertificationError


@needs_reference
def test_all_cases_of_the_oracle_to_1e_12():
    cases = json.loads((REFERENCE / "bounds_oracle.json").read_text())["cases"]
    assert len(cases) == 100
    for case in cases:
        bound = p_a_lower(case["count"], case["n"], case["alpha"])
        assert bound == pytest.approx(case["pA_lower"], rel=1e-12, abs=0)
        radius = certified_radius(bound, case["sigma"])
        assert radius == pytest.approx(case["radius"], rel=0, abs=1e-12)
        assert (bound < 0.5) == case["abstain"]
        # CERTIFY's class is the most frequent of the selection draws, the lowest of a tie.
        assert int(np.argmax(case["counts0"])) == case["selected"]
        assert (ABSTAIN if bound < 0.5 else case["selected"]) == case["prediction"]


def test_the_abstention_edge_of_the_papers_setting():
    assert p_a_lower(50_489, 100_000, 0.001) < 0.5
    assert p_a_lower(50_490, 100_000, 0.001) > 0.5
    assert certified_radius(p_a_lower(50_489, 100_000, 0.001), 0.25) == 0
    assert certified_radius(p_a_lower(50_490, 100_000, 0.001), 0.25) > 0


def test_values_known_in_closed_form():
    assert p_a_lower(0, 10, 0.001) == 0
    assert p_a_lower(10, 10, 0.001) == pytest.approx(0.001 ** (1 / 10), rel=1e-14)
    assert p_a_lower(1, 1, 0.25) == 0.25
    # k = 1: P(X >= 1) = 1 - (1 - p)^n = alpha
    assert p_a_lower(1, 100, 0.05) == pytest.approx(1 - 0.95 ** (1 / 100), rel=1e-12)
    assert certified_radius(0.5, 1.0) == 0
    assert certified_radius(0.4999, 1.0) == 0
    assert certified_radius(float(ndtr(1.5)), 0.5) == pytest.approx(0.75, rel=1e-12)
    assert certified_radius(1.0, 0.5) == np.inf


@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.3])
@pytest.mark.parametrize("n", [1, 2, 10, 100, 1000])
def test_the_bound_exceeds_the_truth_at_most_alpha_of_the_time(n, alpha):
    """Exact, no sampling: sum the binomial probabilities of the counts whose bound is too high."""
    bounds = p_a_lower(np.arange(n + 1), n, alpha)
    for p in np.linspace(0.001, 0.999, 201):
        error_rate = binom.pmf(np.arange(n + 1), n, p)[bounds > p].sum()
        assert error_rate <= alpha * (1 + 1e-9)


def test_the_bound_is_one_sided():
    """It spends alpha on one side: at its own value the tail is alpha, not alpha / 2."""
    k, n, alpha = 990, 1000, 0.001
    bound = p_a_lower(k, n, alpha)
    assert binom.sf(k - 1, n, bound) == pytest.approx(alpha, rel=1e-9)
    assert bound > p_a_lower(k, n, alpha / 2)


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n - 1), st.just(n))))
def test_the_bound_grows_with_the_count_and_stays_below_the_share(count_and_n):
    count, n = count_and_n
    low, high = p_a_lower(np.array([count, count + 1]), n, 0.001)
    assert 0 <= low < high < 1
    assert low <= count / n
    assert high <= (count + 1) / n


def test_arrays_are_float64_and_equal_to_scalars():
    counts = np.array([[0, 5], [9, 10]], dtype=np.int32)
    bounds = p_a_lower(counts, 10, 0.01)
    radii = certified_radius(bounds, 0.5)
    assert bounds.shape == radii.shape == (2, 2)
    assert bounds.dtype == radii.dtype == np.float64
    assert bounds[1, 1] == p_a_lower(10, 10, 0.01)
    assert radii[1, 1] == certified_radius(float(bounds[1, 1]), 0.5)


@pytest.mark.parametrize(
    ("count", "n", "alpha"),
    [(-1, 10, 0.1), (11, 10, 0.1), (0, 0, 0.1), (1, 10, 0), (1, 10, 1), (1, 10, np.nan)],
)
def test_impossible_counts_and_levels_are_refused(count, n, alpha):
    with pytest.raises(CertificationError):
        p_a_lower(count, n, alpha)


def test_counts_must_be_whole_numbers():
    with pytest.raises(CertificationError, match="whole number"):
        p_a_lower(np.array([1.0]), 10, 0.1)


@pytest.mark.parametrize(
    ("p_a", "sigma"),
    [(-0.1, 1), (1.1, 1), (np.nan, 1), (0.9, 0), (0.9, -1), (0.9, 2e6), (0.9, np.inf)],
)
def test_impossible_probabilities_and_noise_levels_are_refused(p_a, sigma):
    with pytest.raises(CertificationError):
        certified_radius(p_a, sigma)
