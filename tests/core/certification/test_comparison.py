from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.special import expit
from scipy.stats import binom, multinomial, t, ttest_1samp

from fedsmooth_core.certification.analysis import average_certified_radius, certified_accuracy
from fedsmooth_core.certification.comparison import (
    Difference,
    Verdict,
    all_of,
    certified_at,
    equal_within,
    greater_by,
    paired_difference,
    radii_of,
    ratio_interval,
)
from fedsmooth_core.certification.row_format import CertifiedRow, Rows
from fedsmooth_core.errors import CertificationError

HOLDS, DOES_NOT_HOLD, NOT_DECIDED = Verdict.HOLDS, Verdict.DOES_NOT_HOLD, Verdict.NOT_DECIDED
NUM_IMAGES, REPEATS = 300, 5000


def made(idx, predict, radius):
    """Rows of class idx % 3."""
    rows = zip(idx, predict, radius, strict=True)
    return Rows.of(CertifiedRow(i, i % 3, p, r, int(p == i % 3), 1.0) for i, p, r in rows)


def interval(low, high):
    return Difference((low + high) / 2, low, high, num_seeds=3, num_images=300, confidence=0.95)


# From rows to outcomes


def test_outcomes_of_an_example_by_hand():
    first = made([7, 0, 4], predict=[1, 0, 2], radius=[0.5, 0.0, 2.0])
    second = made([0, 4, 7], predict=[-1, 1, 1], radius=[0.0, 0.25, 1.0])
    assert certified_at([first, second], 0).tolist() == [[True, False, True], [False, True, True]]
    assert certified_at([first, second], 0.5).tolist() == [[False] * 2 + [True]] * 2
    assert certified_at([first, second], 0.75).tolist() == [[False] * 3, [False] * 2 + [True]]
    assert radii_of([first, second]).tolist() == [[0, 0, 0.5], [0, 0.25, 1]]


def test_an_abstained_row_is_never_correct():
    rows = Rows.of([CertifiedRow(0, label=0, predict=-1, radius=0.5, correct=1, time=1.0)])
    assert certified_at([rows], 0).tolist() == [[False]]
    assert radii_of([rows]).tolist() == [[0]]


@given(
    st.lists(st.tuples(st.integers(-1, 2), st.floats(0, 2)), min_size=1, max_size=20),
    st.floats(0, 2),
)
def test_means_of_outcomes_are_the_figures_of_the_analysis(rows, radius):
    table = made(range(len(rows)), *zip(*rows, strict=True))
    assert certified_at([table], radius).mean() == pytest.approx(certified_accuracy(table, radius))
    assert radii_of([table]).mean() == pytest.approx(average_certified_radius(table))


ROWS = made([0, 1, 2], predict=[0, 1, 2], radius=[0.5, 0.5, 0.5])


@pytest.mark.parametrize(
    "other",
    [
        made([0, 1, 5], predict=[0, 1, 2], radius=[0.5, 0.5, 0.5]),
        made([0, 1], predict=[0, 1], radius=[0.5, 0.5]),
        replace(ROWS, label=np.array([0, 1, 0])),
    ],
    ids=["another image", "one image less", "another data set"],
)
def test_rows_of_different_images_are_refused(other):
    for outcomes in (radii_of, lambda rows: certified_at(rows, 0.25)):
        with pytest.raises(CertificationError, match="rows 2 and rows 0 are not of the same"):
            outcomes([ROWS, ROWS, other])


@pytest.mark.parametrize("rows", [[], [Rows.of([])]])
def test_no_rows_are_refused(rows):
    with pytest.raises(CertificationError, match="no rows"):
        radii_of(rows)


# The difference and its interval


def test_an_example_against_the_formula_written_out():
    a = np.array([[1, 1, 0, 1], [1, 0, 0, 1]], dtype=bool)
    b = np.array([[0, 1, 0, 0], [0, 1, 0, 1]], dtype=bool)
    found = paired_difference(a, b, confidence=0.9)
    # d = [[1, 0, 0, 1], [1, -1, 0, 0]]; means of seeds 1/2, 0; means of images 1, -1/2, 0, 1/2
    seeds = 0.125 / 2
    images = ((0.75**2 + 0.75**2 + 0.25**2 + 0.25**2) + 2) / 3 / 4
    freedom = (seeds + images) ** 2 / (seeds**2 / 1 + images**2 / 3)
    half = t.ppf(0.95, freedom) * np.sqrt(seeds + images)
    assert found.estimate == 0.25
    assert (found.low, found.high) == pytest.approx((max(0.25 - half, -1), min(0.25 + half, 1)))
    assert (found.num_seeds, found.num_images, found.confidence) == (2, 4, 0.9)


def test_one_seed_is_the_paired_t_interval_over_images_but_for_two_disagreements_more():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 1, 500)) < np.array([0.6, 0.5])[:, None, None]
    found = paired_difference(a, b)
    difference = a[0].astype(float) - b[0]
    plain = ttest_1samp(difference, 0).confidence_interval(0.95)
    assert found.estimate == difference.mean()
    wider = np.sqrt(1 + 2 / np.square(difference - difference.mean()).sum())
    assert found.high - found.low == pytest.approx((plain.high - plain.low) * wider)
    assert 1 < wider < 1.01


def logit_normal(rng, num_seeds, sd_seed, sd_image):
    """Outcomes of two recipes, (repeats, seeds, images), each, and the true difference.

    The logit is the recipe's, plus effects of the seed and of the image, each of which has one half
    (of the variance) in common between the recipes; the draws of the outcomes are the residual.
    """
    logits, shape = np.array([0.5, 0.0]), (2, REPEATS, num_seeds, NUM_IMAGES)

    def effects(sd, shape):
        both = sd / np.sqrt(2)
        return both * (rng.standard_normal((2, *shape)) + rng.standard_normal(shape))

    chances = expit(
        logits[:, None, None, None]
        + effects(sd_seed, (REPEATS, num_seeds, 1))
        + effects(sd_image, (REPEATS, 1, NUM_IMAGES))
    )
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    spread = np.hypot(sd_seed, sd_image)
    means = expit(logits[:, None] + spread * nodes) @ weights / weights.sum()
    a, b = rng.random(shape, dtype=np.float32) < chances
    return a, b, means[0] - means[1]


def num_missed(a, b, truth):
    found = [paired_difference(*pair) for pair in zip(a, b, strict=True)]
    return sum(not one.low <= truth <= one.high for one in found)


@pytest.mark.parametrize(
    ("num_seeds", "sd_seed", "sd_image"),
    [(3, 0.0, 0.0), (3, 0.0, 2.0), (3, 0.1, 2.0), (3, 0.5, 1.0), (3, 0.2, 4.0), (5, 0.3, 2.0)],
)
def test_the_interval_covers_the_truth_of_bernoulli_outcomes(num_seeds, sd_seed, sd_image):
    """Coverage >= 0.92: more misses than allowed here have probability below 1e-6."""
    rng = np.random.default_rng(0)
    missed = num_missed(*logit_normal(rng, num_seeds, sd_seed, sd_image))
    assert missed <= binom.isf(1e-6, REPEATS, 0.08)


def test_an_interval_over_images_alone_would_not_cover():
    """What the test above must notice: the means of three seeds taken for one seed's outcomes."""
    a, b, truth = logit_normal(np.random.default_rng(0), 3, 0.5, 1.0)
    missed = num_missed(a.mean(1, keepdims=True), b.mean(1, keepdims=True), truth)
    assert missed > 3 * binom.isf(1e-6, REPEATS, 0.08)


@pytest.mark.parametrize(
    ("seeds", "images", "residual", "coverage"),
    [
        (0.0, 1.0, 1.0, 0.95),
        (0.0, 0.0, 1.0, 0.95),
        (1.0, 0.0, 0.1, 0.95),
        (0.1, 1.0, 0.0, 0.92),  # where seeds make 9 tenths of the squared error: the worst case
    ],
)
def test_the_interval_covers_the_truth_of_normal_outcomes(seeds, images, residual, coverage):
    """Variances of each effect; three seeds. Wrong with probability 1e-6 if the coverage is right."""
    rng = np.random.default_rng(1)
    a = (
        np.sqrt(seeds) * rng.standard_normal((REPEATS, 3, 1))
        + np.sqrt(images) * rng.standard_normal((REPEATS, 1, NUM_IMAGES))
        + np.sqrt(residual) * rng.standard_normal((REPEATS, 3, NUM_IMAGES))
    )
    assert num_missed(a, np.zeros_like(a), 0.0) <= binom.isf(1e-6, REPEATS, 1 - coverage)


@pytest.mark.parametrize("images_of_b", [0, 1, 5])
def test_the_interval_covers_where_recipes_differ_on_few_images(images_of_b):
    """Exact, no sampling, one seed: the chances of the counts of images that A or B alone certifies."""
    most = 60
    low, high = np.empty((2, most, most))
    images = np.arange(NUM_IMAGES)
    for i in range(most):
        for j in range(most):
            a, b = images < i, (i <= images) & (images < i + j)
            found = paired_difference(a[None], b[None])
            low[i, j], high[i, j] = found.low, found.high
    only_a, only_b = np.indices((most, most))
    counts = np.stack([only_a, only_b, NUM_IMAGES - only_a - only_b], axis=-1)
    for images_of_a in np.arange(0.1, 20, 0.1):
        p_a, p_b = images_of_a / NUM_IMAGES, images_of_b / NUM_IMAGES
        chances = multinomial.pmf(counts, NUM_IMAGES, [p_a, p_b, 1 - p_a - p_b])
        assert chances[(low <= p_a - p_b) & (p_a - p_b <= high)].sum() >= 0.93


@pytest.mark.parametrize("num_seeds", [1, 3])
@pytest.mark.parametrize("value", [False, True, 0.0, 1.0])
def test_no_disagreement_is_no_certainty(num_seeds, value):
    """Images the recipes differ on may be 3 in I and none of them met: the rule of three."""
    outcomes = np.full((num_seeds, NUM_IMAGES), value)
    found = paired_difference(outcomes, outcomes)
    assert found.estimate == 0
    assert found.high == -found.low
    assert 2.5 / NUM_IMAGES < found.high < 3.5 / NUM_IMAGES


OUTCOMES = st.tuples(st.integers(1, 4), st.integers(2, 12)).flatmap(
    lambda shape: st.one_of(
        st.tuples(*[arrays.arrays(np.bool_, shape)] * 2),
        st.tuples(*[arrays.arrays(np.float64, shape, elements=st.floats(0, 4, width=32))] * 2),
    )
)


@given(OUTCOMES, st.floats(0.5, 0.999))
def test_exchanging_the_recipes_changes_the_sign_alone(outcomes, confidence):
    a, b = outcomes
    found, other = paired_difference(a, b, confidence), paired_difference(b, a, confidence)
    assert (other.estimate, other.low, other.high) == (-found.estimate, -found.high, -found.low)
    assert found.estimate == pytest.approx(a.mean() - b.mean(), abs=1e-12)
    assert found.low <= found.estimate <= found.high
    assert (found.num_seeds, found.num_images) == a.shape
    if max(a.max(), b.max()) <= 1:
        assert found.low >= -1
        assert found.high <= 1


@given(OUTCOMES)
def test_the_unit_of_the_outcomes_does_not_matter(outcomes):
    a, b = 2 + outcomes[0], 2 + outcomes[1]  # above 1, where nothing is clipped
    found, larger = paired_difference(a, b), paired_difference(255 * a, 255 * b)
    assert larger.low == pytest.approx(255 * found.low)
    assert larger.high == pytest.approx(255 * found.high)


def test_ends_are_clipped_where_outcomes_are_shares_and_not_where_they_are_beyond_1():
    a, b = np.ones((2, 4), dtype=bool), np.zeros((2, 4), dtype=bool)
    assert paired_difference(a, b).high == 1
    assert paired_difference(b, a).low == -1
    assert paired_difference(2.0 * a, 2.0 * b).high > 2


@pytest.mark.parametrize(
    ("shape_of_a", "shape_of_b"),
    [((2, 5), (3, 5)), ((2, 5), (2, 6)), ((5,), (5,)), ((0, 5), (0, 5)), ((3, 1), (3, 1))],
)
def test_outcomes_that_are_no_pairs_are_refused(shape_of_a, shape_of_b):
    with pytest.raises(CertificationError, match="cannot be compared"):
        paired_difference(np.zeros(shape_of_a), np.zeros(shape_of_b))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_outcomes_that_are_not_finite_are_refused(value):
    with pytest.raises(CertificationError, match="not a finite number"):
        paired_difference(np.zeros((1, 2)), np.array([[0, value]]))


@pytest.mark.parametrize("confidence", [0, 1, 95, np.nan])
def test_an_impossible_confidence_is_refused(confidence):
    with pytest.raises(CertificationError, match="confidence="):
        paired_difference(np.zeros((1, 2)), np.zeros((1, 2)), confidence)
    with pytest.raises(CertificationError, match="confidence="):
        ratio_interval([1, 2], [1, 2], confidence)


# Verdicts


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-0.5, 0.5, HOLDS),
        (0.25, 0.5, HOLDS),
        (-0.5, 0.75, NOT_DECIDED),
        (-0.75, 0.5, NOT_DECIDED),
        (-0.75, 0.75, NOT_DECIDED),
        (0.5, 0.75, NOT_DECIDED),  # it touches the margin
        (-0.75, -0.5, NOT_DECIDED),
        (np.nextafter(0.5, 1), 0.75, DOES_NOT_HOLD),
        (-0.75, np.nextafter(-0.5, -1), DOES_NOT_HOLD),
    ],
)
def test_equal_within_at_its_edges(low, high, expected):
    assert equal_within(interval(low, high), 0.5) is expected


@pytest.mark.parametrize("margin", [-0.1, np.nan])
def test_a_margin_that_is_no_tolerance_is_refused(margin):
    with pytest.raises(CertificationError, match="tolerance"):
        equal_within(interval(0, 1), margin)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (np.nextafter(0.5, 1), 1.0, HOLDS),
        (0.5, 1.0, NOT_DECIDED),
        (-1.0, np.nextafter(0.5, 1), NOT_DECIDED),
        (-1.0, 0.5, DOES_NOT_HOLD),
    ],
)
def test_greater_by_at_its_edges(low, high, expected):
    assert greater_by(interval(low, high), 0.5) is expected
    assert greater_by(interval(low - 0.5, high - 0.5)) is expected


@given(st.lists(st.sampled_from(Verdict), min_size=1))
def test_all_of_needs_all_to_hold_and_one_to_fail(verdicts):
    found = all_of(iter(verdicts))
    assert (found is HOLDS) == all(verdict is HOLDS for verdict in verdicts)
    assert (found is DOES_NOT_HOLD) == any(verdict is DOES_NOT_HOLD for verdict in verdicts)


def test_a_statement_without_comparisons_is_refused():
    with pytest.raises(CertificationError, match="without comparisons"):
        all_of([])


def test_verdicts_at_the_edge_of_a_statement_are_wrong_no_more_often_than_they_say():
    """Where the true difference is the margin itself, each verdict errs most often.

    Either verdict of either statement: at most 0.025 in the long run, and more than is allowed here
    has probability below 1e-6.
    """
    a, b, truth = logit_normal(np.random.default_rng(2), 3, 0.2, 2.0)
    found = [paired_difference(*pair) for pair in zip(a, b, strict=True)]
    for verdicts in (
        [greater_by(one, truth) for one in found],
        [equal_within(one, truth) for one in found],
    ):
        assert 0 < verdicts.count(HOLDS) <= binom.isf(1e-6, REPEATS, 0.025)
        assert 0 < verdicts.count(DOES_NOT_HOLD) <= binom.isf(1e-6, REPEATS, 0.025)


# Timings


def test_the_ratio_is_that_of_the_geometric_means_whatever_slows_down_both():
    x, y, slower = np.array([2.0, 4.0, 4.0]), np.array([1.0, 1.0, 2.0]), np.array([1.0, 7.0, 0.2])
    found = ratio_interval(x, y)
    half = t.ppf(0.975, 2) * np.std(np.log([2, 4, 2]), ddof=1) / np.sqrt(3)
    assert found.estimate == pytest.approx(2 ** (4 / 3))
    assert found.low == pytest.approx(2 ** (4 / 3) * np.exp(-half))
    assert found.high == pytest.approx(2 ** (4 / 3) * np.exp(half))
    assert (found.num_pairs, found.confidence) == (3, 0.95)
    again = ratio_interval(x * slower, y * slower)
    assert (again.low, again.high) == pytest.approx((found.low, found.high))
    turned = ratio_interval(y, x)
    assert (turned.low, turned.high) == pytest.approx((1 / found.high, 1 / found.low))


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_ratio_interval_covers_exactly_as_often_as_it_says(confidence):
    """The interval of log-normal timings is exact: both tails of 1e-6 / 2 are the false alarms."""
    rng, repeats = np.random.default_rng(0), 5000
    drift = rng.standard_normal((repeats, 6))
    x = 2.5 * np.exp(drift + 0.1 * rng.standard_normal((repeats, 6)))
    y = np.exp(drift + 0.05 * rng.standard_normal((repeats, 6)))
    found = [ratio_interval(*pair, confidence) for pair in zip(x, y, strict=True)]
    missed = sum(not one.low <= 2.5 <= one.high for one in found)
    expected = binom(repeats, 1 - confidence)
    assert expected.ppf(5e-7) <= missed <= expected.isf(5e-7)


@pytest.mark.parametrize(
    ("x", "y", "sentence"),
    [
        ([1.0], [1.0], "not pairs"),
        ([1.0, 2.0], [1.0, 2.0, 3.0], "not pairs"),
        ([[1.0, 2.0]], [[1.0, 2.0]], "not pairs"),
        ([1.0, 0.0], [1.0, 2.0], "seconds > 0"),
        ([1.0, 2.0], [1.0, -2.0], "seconds > 0"),
        ([1.0, np.nan], [1.0, 2.0], "seconds > 0"),
        ([1.0, np.inf], [1.0, 2.0], "seconds > 0"),
    ],
)
def test_timings_that_are_no_pairs_are_refused(x, y, sentence):
    with pytest.raises(CertificationError, match=sentence):
        ratio_interval(x, y)
