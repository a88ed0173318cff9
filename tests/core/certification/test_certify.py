from dataclasses import replace

import numpy as np
import pytest
import torch
from known_classifiers import half_space, images_at, random_images, small_network
from scipy.special import ndtr
from scipy.stats import binom
from torch import nn

from fedsmooth_core.certification.bounds import ABSTAIN, certified_radius, p_a_lower
from fedsmooth_core.certification.certify import certify
from fedsmooth_core.certification.counting import count_predictions
from fedsmooth_core.errors import CertificationError
from fedsmooth_core.seeding import Purpose

SHAPE = (3, 5, 5)
SETTING = {
    "max_value": 255,
    "sigma": 0.25,
    "n0": 50,
    "n": 1000,
    "alpha": 0.001,
    "seed": 1,
    "batch_size": 512,
    "device": "cpu",
}


def rows_of(model, images, labels=None, indices=None, **changes):
    labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
    indices = range(len(images)) if indices is None else indices
    return list(certify(model, images, labels, indices, **(SETTING | changes)))


def untimed(rows):
    return [replace(row, time=0.0) for row in rows]


def test_a_row_is_what_the_algorithm_says():
    """Recomputed step by step from the two streams' counts."""
    model, images, labels = small_network(SHAPE), random_images(6, SHAPE), torch.arange(6)
    indices = [0, 20, 40, 60, 80, 100]
    keys = ("max_value", "sigma", "seed", "batch_size", "device")
    streams = [(Purpose.SELECTION, 50), (Purpose.ESTIMATION, 1000)]
    setting = {key: SETTING[key] for key in keys}
    groups = count_predictions(model, images, indices, streams, **setting)
    counts = np.concatenate([counts for _, counts in groups])
    rows = rows_of(model, images, labels, indices)
    assert [row.idx for row in rows] == indices
    for row, (selection, estimation), label in zip(rows, counts, labels.tolist(), strict=True):
        top_class = int(selection.argmax())
        p_a = p_a_lower(int(estimation[top_class]), 1000, 0.001)
        assert row.label == label
        assert row.predict == (top_class if p_a >= 0.5 else ABSTAIN)
        assert row.radius == certified_radius(p_a, 0.25)
        assert row.correct == (row.predict == label)
        assert row.time > 0


@pytest.mark.parametrize("shape", [(3, 5, 5), (1, 8, 8)])
def test_rows_do_not_depend_on_batch_size_order_or_company(shape):
    model, images, labels = small_network(shape), random_images(8, shape), torch.arange(8)
    reference = untimed(rows_of(model, images, labels))
    for batch_size in (1, 128, 640, 4096):
        assert untimed(rows_of(model, images, labels, batch_size=batch_size)) == reference
    order = torch.tensor([6, 1, 3])
    shuffled = rows_of(model, images[order], labels[order], order.tolist())
    assert untimed(shuffled) == [reference[i] for i in order]
    assert len({row.radius for row in reference}) >= 3


def test_rows_come_before_all_images_are_done():
    forward_passes = []
    model = small_network(SHAPE)
    model.register_forward_hook(lambda *_: forward_passes.append(1))
    images = random_images(40, SHAPE)
    labels = torch.zeros(40, dtype=torch.int64)
    rows = certify(model, images, labels, range(40), **SETTING)
    assert not forward_passes
    next(rows)
    first = len(forward_passes)
    assert len(list(rows)) == 39
    assert first <= len(forward_passes) / 4


def test_a_closed_form_smoothed_classifier_is_certified_soundly_and_tightly():
    """A half-space: the true radius is the distance to the plane.

    A row may claim too much with probability at most alpha, so over 400 images at alpha = 0.01 more
    than 12 too large radii (or wrong classes) have probability below 1e-3 if the code is right.
    """
    alpha, sigma, n = 0.01, 0.25, 2000
    plane = half_space()
    distances = torch.linspace(-0.4, 0.4, 400)
    rows = rows_of(
        plane, images_at(plane, distances), sigma=sigma, n=n, alpha=alpha, n0=100, max_value=1
    )
    assert binom.sf(12, 400, alpha) < 1e-3
    true_radius = distances.abs().double().numpy()
    radius = np.array([row.radius for row in rows])
    predict = np.array([row.predict for row in rows])
    wrong = (predict != ABSTAIN) & (predict != (distances > 0).numpy())
    assert ((radius > true_radius) | wrong).sum() <= 12
    # And it is close: alpha costs 2.3 standard errors of p, the draws are less than 4 more off.
    # (Nearer the plane the selection may take the other class, which then abstains.)
    far = true_radius > 0.1
    p = ndtr(true_radius[far] / sigma)
    p_low = p - 6.3 * np.sqrt(p * (1 - p) / n)
    assert (radius[far] >= certified_radius(p_low, sigma)).all()


def test_more_draws_bring_the_radius_closer_to_the_truth():
    plane = half_space()
    images = images_at(plane, torch.full((4,), 0.2))
    gaps = [
        0.2 - np.mean([row.radius for row in rows_of(plane, images, n=n, max_value=1)])
        for n in (100, 1000, 10_000, 50_000)
    ]
    assert gaps == sorted(gaps, reverse=True)
    assert 0 < gaps[-1] < 0.01


def test_the_radius_holds_against_the_worst_perturbation():
    """Move each image straight to the plane: within its radius the smoothed class is the same."""
    plane, sigma = half_space(), 0.25
    distances = torch.tensor([0.05, 0.1, 0.2, 0.4])
    for row, distance in zip(
        rows_of(plane, images_at(plane, distances), max_value=1, n=5000), distances, strict=True
    ):
        assert row.predict == 1
        assert ndtr((float(distance) - row.radius) / sigma) > 0.5


def test_selection_and_estimation_use_different_draws():
    """Reusing the selection draws would make the bound too good: the selected class is lucky there.

    A plane through the image itself: p = 1/2, so a certificate there is an error, at most alpha of
    the time. With draws reused, max(k, n - k) is counted and the rate doubles.
    """
    plane, num, alpha = half_space(), 1500, 0.2
    images = images_at(plane, torch.zeros(num))
    rows = rows_of(plane, images, n0=100, n=100, alpha=alpha, max_value=1, batch_size=4096)
    certified = sum(row.predict != ABSTAIN for row in rows)
    # P(X >= 55 of 100) = .184 is the exact rate at this n; four standard errors above and below.
    exact = binom.sf(54, 100, 0.5)
    assert p_a_lower(55, 100, alpha) > 0.5 > p_a_lower(54, 100, alpha)
    assert certified / num == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / num))


def test_a_batchnorm_model_in_train_mode_keeps_its_statistics():
    model, images = small_network(SHAPE).train(), random_images(3, SHAPE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = rows_of(model, images)
    assert model.training
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert untimed(rows_of(model.eval(), images)) == untimed(rows)


@pytest.mark.parametrize(
    "changes", [{"n0": 0}, {"n": 0}, {"alpha": 0.0}, {"alpha": 1.0}, {"sigma": 0.0}]
)
def test_impossible_settings_are_refused_at_the_call(changes):
    images, labels = random_images(1, SHAPE), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(CertificationError):
        certify(nn.Flatten(), images, labels, [0], **(SETTING | changes))


def test_labels_must_belong_to_the_images():
    with pytest.raises(CertificationError, match="one label per image"):
        certify(nn.Flatten(), random_images(2, SHAPE), torch.zeros(3), [0, 1], **SETTING)


def test_no_images_give_no_rows():
    assert rows_of(nn.Flatten(), random_images(0, SHAPE)) == []
