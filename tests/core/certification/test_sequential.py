from dataclasses import replace

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from published_results import needs_reference
from scipy.integrate import quad
from scipy.special import ndtr, ndtri
from scipy.stats import binom
from sequential_benchmark import benchmark

from fedsmooth_core.certification.bounds import certified_radius, p_a_lower
from fedsmooth_core.certification.sequential import (
    ALPHA_OF_LOOKS,
    SequentialTest,
    log_e_value,
    look_schedule,
    sequential_test,
)
from fedsmooth_core.errors import CertificationError

simulate = benchmark.simulate


# --------------------------------------------------------------------------------------------------
# E-values


@pytest.mark.parametrize(
    ("count", "n", "z"),
    [(0, 1, 0.0), (1, 1, 0.0), (7, 10, 0.0), (90, 128, 0.5), (128, 128, 2.0), (20, 128, 1.0)],
)
def test_an_e_value_is_the_mean_likelihood_ratio_over_the_prior(count, n, z):
    """By numerical integration, straight from the definition."""
    t = ndtr(z)

    def prior(angle):  # q = sin(angle)^2 makes Beta(1/2, 1/2) uniform
        return np.sin(angle) ** 2

    def ratio(angle):
        q = prior(angle)
        return (q / t) ** count * ((1 - q) / (1 - t)) ** (n - count)

    low, high = np.arcsin(np.sqrt(t)), np.pi / 2
    mean = quad(ratio, low, high, epsabs=0, epsrel=1e-10)[0] / (high - low)
    assert log_e_value(count, n, z) == pytest.approx(np.log(mean), abs=1e-8)


@pytest.mark.parametrize(
    ("count", "n", "z"),
    [
        (50_489, 100_000, 0.0),
        (84_500, 100_000, 1.0),
        (99_990, 100_000, 3.5),
        (100_000, 100_000, 3.8),
        (99_800, 100_000, 3.0),
        (128, 128, 6.0),
    ],
)
def test_many_draws_and_thresholds_near_one_keep_their_digits(count, n, z):
    with mpmath.workdps(60):
        k, m, half = mpmath.mpf(count), mpmath.mpf(n), mpmath.mpf(1) / 2
        t, above = mpmath.ncdf(z), mpmath.ncdf(-z)
        a, b = k + half, m - k + half

        def density(s):  # s = log odds of q against those of the count: smooth and narrow
            q = 1 / (1 + mpmath.exp(-s))
            return mpmath.exp(a * mpmath.log(q) + b * mpmath.log1p(-q) - shift)

        start = mpmath.log(t / above)
        peak = max(start, mpmath.log(a / b))
        q = 1 / (1 + mpmath.exp(-peak))
        shift = a * mpmath.log(q) + b * mpmath.log1p(-q)
        width = 1 / mpmath.sqrt(m * q * (1 - q) + half)
        points = sorted({start, *(x for i in range(-30, 61, 5) if (x := peak + i * width) > start)})
        log_posterior = mpmath.log(mpmath.quad(density, [*points, points[-1] + 60])) + shift
        log_prior = mpmath.log(mpmath.pi - 2 * mpmath.asin(mpmath.sqrt(t)))
        expected = log_posterior - log_prior - k * mpmath.log(t) - (m - k) * mpmath.log(above)
    assert log_e_value(count, n, z) == pytest.approx(float(expected), rel=1e-9, abs=1e-7)


def test_no_draws_are_no_evidence():
    np.testing.assert_allclose(log_e_value(0, 0, np.linspace(0, 6, 50)), 0, atol=1e-12)


@given(
    n=st.integers(0, 20_000),
    deviations=st.floats(-10, 100),
    z=st.floats(0, 4),
    below=st.floats(0.01, 1),
)
def test_e_values_are_a_martingale_at_the_threshold_and_fall_below_it(n, deviations, z, below):
    """The mean of the next e-value, given the draws so far, is this one at p = t; less at p < t."""
    t = ndtr(z)
    count = round(float(np.clip(n * t + deviations * np.sqrt(n * t * (1 - t)), 0, n)))
    now = log_e_value(count, n, z)
    success, failure = log_e_value(count + 1, n + 1, z), log_e_value(count, n + 1, z)

    def mean_at(p):
        return np.logaddexp(np.log(p) + success, np.log1p(-p) + failure)

    assert mean_at(t) == pytest.approx(now, abs=1e-7)
    assert mean_at(below * t) <= now + 1e-7


def test_an_underflow_is_no_evidence_either():
    """Far below the threshold no number is left; the true e-value there is below 1."""
    counts = np.arange(0, 100_001, 50)
    values = log_e_value(counts, 100_000, 3.0)
    assert (values == -np.inf).any()
    assert (counts[values == -np.inf] < 100_000 * ndtr(3.0)).all()
    assert (values[counts < 100_000 * ndtr(3.0)] < 0).all()


# --------------------------------------------------------------------------------------------------
# The grid, the looks, the tables


def test_looks_are_whole_blocks_and_end_at_n():
    for n in (1, 100, 128, 129, 10_000, 100_000):
        looks = look_schedule(n)
        assert looks[-1] == n
        assert (looks[:-1] % 128 == 0).all()
        assert (np.diff(looks) > 0).all()
    assert look_schedule(100).tolist() == [100]
    assert look_schedule(300).tolist() == [128, 256, 300]
    assert len(look_schedule(100_000)) == 52
    # What is drawn first does not depend on how many draws there may be.
    short, long = look_schedule(10_000), look_schedule(100_000)
    np.testing.assert_array_equal(short[:-1], long[: len(short) - 1])


def test_the_grid_is_what_n_draws_can_certify():
    test = sequential_test(0.25, 100_000, 0.001, 0.25)
    assert test.radii.tolist() == [0, 0.25, 0.5, 0.75]
    np.testing.assert_allclose(test.thresholds, ndtr([0, 1, 2, 3]))
    assert certified_radius(p_a_lower(100_000, 100_000, 0.0008), 0.25) < 1
    # As they are printed: 3 steps of 0.1 are 0.3.
    assert sequential_test(0.25, 1000, 0.001, 0.1).radii[3] == 0.3
    assert len(sequential_test(0.25, 5, 0.001, 0.25).radii) == 0


@pytest.mark.parametrize("n", [100, 1000, 5000])
def test_tables_are_what_every_count_says(n):
    """Each count of each look, against what the tables were made from."""
    test = SequentialTest(0.25, n, 0.01, 0.1)
    for i, drawn in enumerate(test.looks.tolist()):
        counts = np.arange(drawn + 1)[:, np.newaxis]
        by_e_value = log_e_value(counts, drawn, test.radii / 0.25) >= -np.log(0.002)
        np.testing.assert_array_equal(counts >= test.reject_from[i], by_e_value)


def test_hypotheses_are_rejected_in_ascending_order_and_stay_so():
    test = sequential_test(0.25, 1000, 0.001, 0.25)
    level, decided = test.decide(np.array([0, 0, 3]), np.array([0, 2, 1]), np.array([128, 60, 0]))
    assert level[0] >= 1
    assert level[1] == 2  # what was rejected before, though these draws would not
    assert level[2] == 1
    assert decided.tolist() == [False, True, True]


def test_a_hypothesis_waits_for_those_below_it():
    """That all of them have one alpha rests on this order, whatever the tables say."""
    test = SequentialTest(0.25, 1000, 0.001, 0.25)
    test.reject_from[0] = [100, 120, 90]
    level, _ = test.decide(np.zeros(2, np.int64), np.zeros(2, np.int64), np.array([95, 110]))
    assert level.tolist() == [0, 1]


def test_the_last_look_takes_the_larger_of_both_radii():
    test = sequential_test(0.25, 1000, 0.001, 0.25)
    last = np.full(4, len(test.looks) - 1)
    count = np.array([400, 800, 800, 1000])
    radius, is_certified = test.certificate(last, np.array([0, 0, 3, 2]), count)
    by_count = certified_radius(p_a_lower(count, 1000, 0.0008), 0.25)
    np.testing.assert_array_equal(radius, [0, by_count[1], 0.5, by_count[3]])
    assert is_certified.tolist() == [False, True, True, True]
    # Before it the count is no bound, however large.
    radius, is_certified = test.certificate(last - 1, np.array([0, 0, 3, 2]), count - 200)
    np.testing.assert_array_equal(radius, [0, 0, 0.5, 0.25])
    assert is_certified.tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"radius_step": 0.0}, "allowed is > 0"),
        ({"radius_step": -1.0}, "allowed is > 0"),
        ({"radius_step": 1e-9}, "more than 1000 radii"),
        ({"n": 0}, "n0 and n must be >= 1"),
        ({"alpha": 0.0}, "alpha"),
        ({"sigma": 0.0}, "sigma"),
    ],
)
def test_impossible_settings_are_refused(changes, said):
    setting = {"sigma": 0.25, "n": 1000, "alpha": 0.001, "radius_step": 0.25}
    with pytest.raises(CertificationError, match=said):
        SequentialTest(**(setting | changes))


# --------------------------------------------------------------------------------------------------
# The guarantee, by simulation

ALPHA, REPEATS = 0.05, 40_000


def errors(test, p, j, seed):
    """How many of ``REPEATS`` certificates at chance p <= t_j claim H_j false, or too large a radius."""
    assert p <= test.thresholds[j]
    chances = np.full(REPEATS, p)
    radius, is_certified, _, _ = simulate(test, chances, np.random.default_rng(seed))
    too_large = (radius >= test.radii[j]) | (radius > certified_radius(p, test.sigma))
    return int(np.count_nonzero(is_certified & too_large))


@pytest.mark.parametrize("below", [0.0, 0.003])
@pytest.mark.parametrize("j", [0, 1, 2, 3])
def test_at_a_threshold_at_most_alpha_of_the_certificates_claim_too_much(j, below):
    """At p = t_j exactly, where a grid radius is most easily claimed wrongly, and slightly below.

    At alpha = 0.05, more than 2,230 errors of 40,000 have probability below 1e-6 if the code is right.
    """
    assert binom.sf(2230, REPEATS, ALPHA) < 1e-6
    test = sequential_test(0.25, 5000, ALPHA, 0.25)
    p = test.thresholds[j] - below
    found = errors(test, p, j, seed=j)
    assert found <= 2230
    if below == 0:
        # Not idle either: the looks or the bound at n do err now and then.
        assert found > REPEATS * ALPHA / 20


def test_the_looks_alone_err_less_than_their_share():
    """Ville's inequality: at p = t_j the e-value EVER rejects H_j at most alpha / 5 of the time."""
    test = sequential_test(0.25, 5000, ALPHA, 0.25)
    rng, j = np.random.default_rng(1), 1
    count, ever = np.zeros(REPEATS, np.int64), np.zeros(REPEATS, bool)
    naive = np.zeros(REPEATS, bool)
    for i, num_new in enumerate(np.diff(test.looks, prepend=0)):
        count += rng.binomial(num_new, test.thresholds[j], REPEATS)
        ever |= count >= test.reject_from[i, j]
        naive |= p_a_lower(count, int(test.looks[i]), ALPHA * ALPHA_OF_LOOKS) > test.thresholds[j]
    share = ALPHA * ALPHA_OF_LOOKS
    assert REPEATS * share / 10 < ever.sum() <= binom.isf(1e-6, REPEATS, share)
    # The same looks with a bound that is good for one look alone: what the test must notice.
    assert naive.sum() > 3 * binom.isf(1e-6, REPEATS, share)


def test_a_chance_well_above_a_threshold_is_certified_with_few_draws():
    test = sequential_test(0.25, 100_000, 0.001, 0.25)
    p = np.full(1000, ndtr(1.5))
    radius, is_certified, used, _ = simulate(test, p, np.random.default_rng(2))
    assert is_certified.all()
    assert np.count_nonzero(radius == 0.25) >= 995  # true radius .375
    assert used.mean() < 2000


def test_giving_up_loses_few_that_all_draws_would_have_certified():
    """At chances that n draws just about certify: where giving up could cost most."""
    test = sequential_test(0.25, 20_000, 0.001, 0.25)
    for j, t in enumerate(test.thresholds[:-1]):
        p = t + 4 * np.sqrt(t * (1 - t) / 20_000)
        radius, is_certified, used, count = simulate(
            test, np.full(5000, p), np.random.default_rng(j)
        )
        by_all = p_a_lower(count, 20_000, 0.0008) >= t
        lost = by_all & ~(is_certified & (radius >= test.radii[j]))
        assert by_all.mean() > 0.7
        assert lost.mean() < 0.05
        assert used.mean() < 20_000


@needs_reference
@pytest.mark.slow
@pytest.mark.parametrize(
    ("log", "sigma", "step", "factor"),
    [
        ("cohen_resnet110_sigma_0.12", 0.12, 0.25, 40),
        ("cohen_resnet110_sigma_0.25", 0.25, 0.25, 9),
        ("cohen_resnet110_sigma_0.25", 0.25, 0.125, 3),
        ("salman_pgd2_m8_eps255_sigma_0.25", 0.25, 0.25, 9),
    ],
)
def test_published_models_take_far_fewer_draws_for_the_same_accuracy(log, sigma, step, factor):
    result = benchmark.published(log, sigma, step, 100_000, repeats=100)
    assert result["factor"] > factor
    assert result["largest_loss_points"] <= 0.1


def test_radii_of_the_grid_and_thresholds_invert_each_other():
    test = sequential_test(0.5, 10_000, 0.001, 0.05)
    np.testing.assert_allclose(0.5 * ndtri(test.thresholds), test.radii, atol=1e-12)


def test_replayed_orders_of_counted_blocks_agree_with_both_methods():
    """In the order in which they were drawn, blocks give the rows of certify and certify_sequential."""
    sigma, n, step = 0.25, 3000, 0.25
    model = benchmark.trained_model(sigma, steps=60)
    test_set = benchmark.load_dataset(benchmark.DatasetConfig(), "test")
    by_block, correct = benchmark.counted_by_block(model, test_set, 12, sigma, n)
    procedure = benchmark.Procedure(sigma=sigma, n=n)
    fixed, _ = benchmark.certified(model, test_set, 12, procedure)
    p_a = p_a_lower(by_block.sum(axis=1), n, 0.001)
    np.testing.assert_array_equal(certified_radius(p_a, sigma), fixed.radius)
    np.testing.assert_array_equal(correct[p_a >= 0.5], fixed.correct[p_a >= 0.5] == 1)
    rows, _ = benchmark.certified(
        model, test_set, 12, replace(procedure, method="sequential", radius_step=step)
    )
    test = sequential_test(sigma, n, 0.001, step)
    so_far = by_block.cumsum(axis=1)[:, -(-test.looks // 128) - 1].T
    radius, _, used = benchmark.decided(test, so_far)
    np.testing.assert_array_equal(radius, rows.radius)
    np.testing.assert_array_equal(used, rows.n)
    result = benchmark.replayed("", by_block, correct, sigma, [step], n, repeats=3)[0]
    assert result["orders"] == 3
    assert 1 < result["factor"] < 10
