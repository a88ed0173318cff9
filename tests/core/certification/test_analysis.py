import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from published_results import REFERENCE, needs_reference
from scipy.stats import binomtest

from fedsmooth_core.certification.analysis import (
    abstention_rate,
    average_certified_radius,
    certified_accuracy,
    confidence_interval,
    read_rows,
    summary,
)
from fedsmooth_core.certification.row_format import CertifiedRow, Rows

RADII = np.array([0, 0.25, 0.5, 0.75, 1.0])
NO_ROWS = Rows.of([])


@needs_reference
@pytest.mark.parametrize(
    ("name", "accuracy", "average_radius"),
    [
        ("cohen_resnet110_sigma_0.12.tsv", [0.814, 0.586, 0, 0, 0], 0.2701),
        ("cohen_resnet110_sigma_0.25.tsv", [0.748, 0.600, 0.428, 0.266, 0], 0.4289),
        ("salman_pgd2_m8_eps255_sigma_0.25.tsv", [0.732, 0.648, 0.556, 0.458, 0], 0.5365),
    ],
)
def test_published_figures_are_reproduced(name, accuracy, average_radius):
    rows = read_rows(REFERENCE / name)
    assert len(rows) == 500
    np.testing.assert_array_equal(np.round(certified_accuracy(rows, RADII), 3), accuracy)
    assert round(average_certified_radius(rows), 4) == average_radius


def made(predict, radius, correct):
    rows = zip(predict, radius, correct, strict=True)
    return Rows.of(CertifiedRow(i, 0, p, r, c, 1.0) for i, (p, r, c) in enumerate(rows))


EXAMPLE = made(predict=[0, 0, 1, -1], radius=[0.5, 1.0, 2.0, 0.0], correct=[1, 1, 0, 0])


def test_figures_of_an_example_by_hand():
    assert certified_accuracy(EXAMPLE, 0) == 0.5
    assert certified_accuracy(EXAMPLE, 0.5) == 0.5  # a certificate holds at its radius, too
    assert certified_accuracy(EXAMPLE, np.nextafter(0.5, 1)) == 0.25
    assert certified_accuracy(EXAMPLE, 1.5) == 0
    assert average_certified_radius(EXAMPLE) == 1.5 / 4
    assert abstention_rate(EXAMPLE) == 0.25


def test_an_abstained_row_is_never_correct():
    rows = made(predict=[-1], radius=[0.5], correct=[1])
    assert certified_accuracy(rows, 0) == 0
    assert average_certified_radius(rows) == 0


@given(
    st.lists(st.tuples(st.integers(-1, 2), st.floats(0, 2), st.integers(0, 1)), min_size=1),
    st.lists(st.floats(0, 2), min_size=1),
)
def test_certified_accuracy_is_its_definition(rows, radii):
    table = made(*zip(*rows, strict=True))
    correct = (table.correct == 1) & (table.predict != -1)
    expected = [(correct & (table.radius >= radius)).mean() for radius in radii]
    np.testing.assert_allclose(certified_accuracy(table, np.array(radii)), expected, rtol=1e-12)
    assert certified_accuracy(table, radii[0]) == pytest.approx(expected[0])


@pytest.mark.parametrize(("certified", "num"), [(0, 7), (3, 7), (7, 7), (200, 500)])
def test_the_interval_is_clopper_pearsons(certified, num):
    rows = made([0] * num, [1.0] * num, [1] * certified + [0] * (num - certified))
    low, high = confidence_interval(rows, np.array([0.5, 1.0]))
    expected = binomtest(certified, num).proportion_ci(0.95, method="exact")
    np.testing.assert_allclose(low, expected.low, rtol=1e-9)
    np.testing.assert_allclose(high, expected.high, rtol=1e-9)


def test_no_rows_are_no_accuracy_and_no_warning():
    assert np.isnan(certified_accuracy(NO_ROWS, 0))
    assert np.isnan(certified_accuracy(NO_ROWS, RADII)).all()
    assert np.isnan(average_certified_radius(NO_ROWS))
    assert np.isnan(abstention_rate(NO_ROWS))
    low, high = confidence_interval(NO_ROWS, RADII)
    assert (low == 0).all()
    assert (high == 1).all()


def test_the_summary_says_how_many_draws_an_image_took():
    assert "mean_n" not in summary(EXAMPLE, [0])
    row = CertifiedRow(0, label=3, predict=3, radius=0.5, correct=1, time=1.0, n=128)
    rows = Rows.of([row, replace(row, idx=1, n=1000)])
    assert summary(rows, [0])["mean_n"] == 564


def test_the_summary_is_strict_json():
    figures = json.loads(json.dumps(summary(EXAMPLE, [0, 0.75]), allow_nan=False))
    assert figures["num_images"] == 4
    assert figures["average_certified_radius"] == 1.5 / 4
    assert figures["abstention_rate"] == 0.25
    assert [one["radius"] for one in figures["certified_accuracy"]] == [0, 0.75]
    assert [one["accuracy"] for one in figures["certified_accuracy"]] == [0.5, 0.25]
    low, high = figures["certified_accuracy"][0]["confidence_interval_95"]
    assert 0 < low < 0.5 < high < 1
    empty = json.loads(json.dumps(summary(NO_ROWS, [0]), allow_nan=False))
    assert empty["num_images"] == 0
    assert empty["certified_accuracy"][0]["accuracy"] is None
