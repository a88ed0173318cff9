from dataclasses import replace

import numpy as np
import pytest
import torch
from known_classifiers import half_space, images_at, random_images, small_network
from scipy.special import ndtr
from scipy.stats import binom
from sequential_benchmark import benchmark
from torch import nn

from fedsmooth_core.certification.analysis import certified_accuracy
from fedsmooth_core.certification.bounds import ABSTAIN, certified_radius
from fedsmooth_core.certification.certify_sequential import certify_sequential
from fedsmooth_core.certification.counting import count_predictions
from fedsmooth_core.certification.procedure import Procedure
from fedsmooth_core.certification.rows import RowFile, read_rows
from fedsmooth_core.certification.sequential import sequential_test
from fedsmooth_core.config import DatasetConfig
from fedsmooth_core.data import load_dataset
from fedsmooth_core.errors import CertificationError
from fedsmooth_core.seeding import Purpose

SHAPE = (3, 5, 5)
SETTING = {
    "max_value": 255,
    "sigma": 0.25,
    "n0": 50,
    "n": 3000,
    "alpha": 0.001,
    "radius_step": 0.1,
    "seed": 1,
    "batch_size": 512,
    "device": "cpu",
}


def rows_of(model, images, labels=None, indices=None, **changes):
    labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
    indices = range(len(images)) if indices is None else indices
    return list(certify_sequential(model, images, labels, indices, **(SETTING | changes)))


def untimed(rows):
    return [replace(row, time=0.0) for row in rows]


def test_a_row_is_what_the_statistics_say_of_the_first_draws_of_fixed_n():
    """Recomputed look by look, each from counts of its own; one draws 150 that select, in two blocks."""
    model, images, labels = small_network(SHAPE), random_images(12, SHAPE), torch.arange(12)
    indices = list(range(0, 240, 20))
    test = sequential_test(0.25, 3000, 0.001, 0.1)
    looks = [(Purpose.ESTIMATION, int(n)) for n in test.looks]
    keys = ("max_value", "sigma", "seed", "batch_size", "device")
    setting = {key: SETTING[key] for key in keys}
    streams = [(Purpose.SELECTION, 150), *looks]
    groups = count_predictions(model, images, indices, streams, **setting)
    counts = np.concatenate([counts for _, counts in groups])
    rows = rows_of(model, images, labels, indices, n0=150)
    assert [row.idx for row in rows] == indices
    assert len({row.n for row in rows}) >= 5
    assert {row.predict for row in rows} > {ABSTAIN}
    for row, (selection, *estimation), label in zip(rows, counts, labels.tolist(), strict=True):
        top_class, level = int(selection.argmax()), np.array([0])
        for i, counted in enumerate(estimation):
            look, count = np.array([i]), counted[[top_class]]
            level, is_decided = test.decide(look, level, count)
            if is_decided[0]:
                break
        radius, is_certified = test.certificate(look, level, count)
        assert row.n == test.looks[i]
        assert row.label == label
        assert row.predict == (top_class if is_certified[0] else ABSTAIN)
        assert row.radius == radius[0]
        assert row.correct == (row.predict == label)
        assert row.time > 0


@pytest.mark.parametrize("shape", [(3, 5, 5), (1, 8, 8)])
def test_rows_do_not_depend_on_batch_size_order_or_company(shape):
    """At 4096, what an image needs next fills no forward pass: it draws far ahead of its look."""
    model, images, labels = small_network(shape), random_images(16, shape), torch.arange(16)
    reference = untimed(rows_of(model, images, labels))
    for batch_size in (1, 128, 640, 4096):
        assert untimed(rows_of(model, images, labels, batch_size=batch_size)) == reference
    order = torch.tensor([6, 1, 3])
    shuffled = rows_of(model, images[order], labels[order], order.tolist())
    assert untimed(shuffled) == [reference[i] for i in order]
    alone = rows_of(model, images[9:10], labels[9:10], [9], batch_size=4096)
    assert untimed(alone) == reference[9:10]
    assert len({row.n for row in reference}) >= 5


@pytest.mark.parametrize("batch_size", [128, 1024])
def test_forward_passes_are_well_filled_while_images_drop_out(batch_size):
    """Nearly all blocks drawn are those that rows say they took, for many images at once."""
    sizes = []
    model = small_network(SHAPE)
    model.register_forward_hook(lambda _, x, __: sizes.append(len(x[0])))
    rows = rows_of(model, random_images(100, SHAPE), n=10_000, batch_size=batch_size)
    needed = sum(128 * (1 + -(-row.n // 128)) for row in rows)
    assert set(sizes) == {batch_size}
    assert needed <= sum(sizes) < 1.1 * needed


def test_an_image_alone_fills_forward_passes_too():
    """What its next look leaves of a pass draws ahead for later looks."""
    sizes = []
    model = small_network(SHAPE)
    model.register_forward_hook(lambda _, x, __: sizes.append(len(x[0])))
    rows = rows_of(model, random_images(40, SHAPE), n=10_000)
    last = max(rows, key=lambda row: row.n)
    assert last.n == 10_000
    sizes.clear()
    alone = rows_of(model, random_images(40, SHAPE)[[last.idx]], indices=[last.idx], n=10_000)
    assert untimed(alone) == untimed([last])
    assert sum(sizes) <= 10_000 + 128 + 512
    sizes.clear()
    rows_of(
        model, random_images(40, SHAPE)[[last.idx]], None, [last.idx], n=10_000, batch_size=4096
    )
    assert len(sizes) == 3


def test_rows_come_before_all_images_are_done():
    forward_passes = []
    model = small_network(SHAPE)
    model.register_forward_hook(lambda *_: forward_passes.append(1))
    images, labels = random_images(60, SHAPE), torch.zeros(60, dtype=torch.int64)
    rows = certify_sequential(model, images, labels, range(60), **SETTING)
    assert not forward_passes
    next(rows)
    first = len(forward_passes)
    assert len(list(rows)) == 59
    assert first <= len(forward_passes) / 2


def test_a_closed_form_smoothed_classifier_is_certified_soundly():
    """A half-space: the true radius is the distance to the plane.

    A row may claim too much with probability at most alpha, so over 400 images at alpha = 0.01 more
    than 12 too large radii (or wrong classes) have probability below 1e-3 if the code is right.
    """
    alpha, step = 0.01, 0.1
    plane, distances = half_space(), torch.linspace(-0.5, 0.5, 400)
    images = images_at(plane, distances)
    rows = rows_of(plane, images, alpha=alpha, n=5000, max_value=1, radius_step=step)
    assert binom.sf(12, 400, alpha) < 1e-3
    true_radius = distances.abs().double().numpy()
    radius = np.array([row.radius for row in rows])
    predict = np.array([row.predict for row in rows])
    wrong = (predict != ABSTAIN) & (predict != (distances > 0).numpy())
    assert ((radius > true_radius) | wrong).sum() <= 12
    # And the grid radii that 5,000 draws show clearly are certified, in fewer draws.
    p = ndtr(true_radius / 0.25)
    shown = np.nextafter(certified_radius(p - 5 * np.sqrt(p * (1 - p) / 5000), 0.25), 0)
    owed = np.floor(shown / step) * step
    assert (radius[true_radius > 0.1] >= owed[true_radius > 0.1] - 1e-9).mean() > 0.97
    assert np.mean([row.n for row in rows]) < 3000


def test_the_last_draws_give_a_radius_between_the_grids():
    """An image that takes all n draws has Clopper-Pearson's bound besides, at .8 alpha."""
    plane = half_space()
    rows = rows_of(plane, images_at(plane, torch.linspace(0.05, 0.5, 60)), max_value=1)
    took_all = [row for row in rows if row.n == 3000 and row.predict != ABSTAIN]
    between = [row for row in took_all if row.radius % 0.1 > 1e-6]
    assert between
    on_grid = [row.radius for row in rows if row.n < 3000]
    np.testing.assert_allclose(on_grid, np.round(on_grid, 1), atol=1e-12)


def test_rows_in_a_file_are_continued_to_those_of_an_undisturbed_run(tmp_path):
    model, images, labels = small_network(SHAPE), random_images(30, SHAPE), torch.arange(30)
    terms = Procedure(sigma=0.25, n0=50, n=3000, radius_step=0.1, method="sequential").terms
    path = tmp_path / "rows.tsv"
    for stop in (3, 11, 30):
        with RowFile(path, terms) as file:
            todo = [i for i in range(30) if i not in file.done]
            rows = certify_sequential(model, images[todo], labels[todo], todo, **SETTING)
            for row in rows:
                file.append(row)
                if len(file.done) == stop:
                    break
    read, reference = read_rows(path), rows_of(model, images, labels)
    for column in ("idx", "label", "predict", "radius", "correct", "n"):
        expected = [getattr(row, column) for row in reference]
        np.testing.assert_array_equal(getattr(read, column), expected)


def test_the_model_is_left_as_it_was():
    model = small_network(SHAPE).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows_of(model, random_images(3, SHAPE))
    assert model.training
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"n0": 0},
        {"n": 0},
        {"alpha": 0.0},
        {"alpha": 1.0},
        {"sigma": 0.0},
        {"radius_step": 0.0},
        {"batch_size": 0},
    ],
)
def test_impossible_settings_are_refused_at_the_call(changes):
    images, labels = random_images(1, SHAPE), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(CertificationError):
        certify_sequential(nn.Flatten(), images, labels, [0], **(SETTING | changes))


def test_labels_must_belong_to_the_images():
    with pytest.raises(CertificationError, match="one label per image"):
        rows_of(nn.Flatten(), random_images(2, SHAPE), torch.zeros(3), [0, 1])


def test_weights_that_diverged_are_refused():
    model = small_network(SHAPE)
    torch.nn.init.constant_(model[-1].bias, torch.nan)
    with pytest.raises(CertificationError, match="not finite"):
        rows_of(model, random_images(2, SHAPE))


def test_no_images_give_no_rows():
    assert rows_of(nn.Flatten(), random_images(0, SHAPE)) == []


def test_too_few_draws_for_any_radius_abstain():
    rows = rows_of(half_space(), images_at(half_space(), torch.tensor([0.5])), n=5, max_value=1)
    assert [(row.predict, row.radius, row.n) for row in rows] == [(ABSTAIN, 0.0, 5)]


@pytest.mark.slow
def test_a_trained_model_keeps_its_certified_accuracy_with_fewer_draws():
    """The digits, a network trained with noise: both methods on the same images and noise."""
    sigma, n, num_images = 0.25, 3000, 50
    model = benchmark.trained_model(sigma, steps=200)
    test_set = load_dataset(DatasetConfig(), "test")
    procedure = Procedure(sigma=sigma, n=n)
    fixed, _ = benchmark.certified(model, test_set, num_images, procedure)
    sequential = replace(procedure, method="sequential", radius_step=0.25)
    rows, _ = benchmark.certified(model, test_set, num_images, sequential)
    radii = np.array([0, 0.25, 0.5, 0.75])
    by_fixed = certified_accuracy(fixed, radii)
    assert by_fixed[0] > 0.9
    assert by_fixed[2] > 0.2
    # One image of 50 is 2 points: at most one may differ, and only downwards or by the draws' luck.
    assert np.abs(by_fixed - certified_accuracy(rows, radii)).max() <= 1 / num_images + 1e-9
    assert n / rows.n.mean() > 1.5
