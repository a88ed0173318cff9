"""The attack on the smoothed classifier, against a linear one whose robustness is known exactly."""

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm
from torch import nn

from fedsmooth_core.certification.counting import count_predictions
from fedsmooth_core.config import ModelConfig
from fedsmooth_core.data import DatasetInfo
from fedsmooth_core.empirical import (
    CHANCE,
    FreshNoise,
    accuracy_interval,
    attack_smoothed,
    compare,
    withstands,
)
from fedsmooth_core.errors import CertificationError, ConfigError
from fedsmooth_core.models import ModelSpec, build_model
from fedsmooth_core.seeding import Purpose, torch_generator

SHAPE = (2, 3, 4)
SIGMA = 0.25
RADIUS = 0.3
# l2 distances of images from the boundary: none near the radius that they are attacked with.
MARGINS = np.array([0.1, 0.15, 0.2, 0.35, 0.4, 0.5])


class Linear(nn.Module):
    """Class 1 where w.x + b > 0: smoothed, its exact radius at x is |w.x + b| / norm of w."""

    def __init__(self, steepness=3.0):
        super().__init__()
        w = torch.randn(24, generator=torch.Generator().manual_seed(5))
        self.normal = nn.Parameter(w / w.norm())
        self.steepness = steepness

    def forward(self, x):
        score = self.steepness * ((x - 0.5).flatten(1) @ self.normal)
        return torch.stack([-score, score], 1)


def on_both_sides():
    """Images, labels and true radii; within [0, 1] all around, so that no attack is cut."""
    normal = Linear().normal.detach()
    signed = torch.tensor(np.concatenate([MARGINS, -MARGINS]), dtype=torch.float32)
    images = 0.5 + (signed[:, None] * normal).view(-1, *SHAPE)
    furthest = RADIUS * normal.abs().max()
    assert images.min() - furthest > 0
    assert images.max() + furthest < 1
    return images, (signed > 0).long(), signed.abs().double().numpy()


def attack(model, images, labels, indices=None, **changes):
    settings = {
        "max_value": 1,
        "radius": RADIUS,
        "sigma": SIGMA,
        "steps": 10,
        "num_noise_vectors": 8,
        "n": 2000,
        "seed": 3,
        "precision": "float32",
        "batch_size": None,
        "device": "cpu",
    }
    indices = range(len(images)) if indices is None else indices
    groups = list(attack_smoothed(model, images, labels, indices, **settings | changes))
    taken = [image for group, _ in groups for image in range(group.start, group.stop)]
    assert taken == list(range(len(images)))
    return np.concatenate([counts for _, counts in groups])


@pytest.mark.parametrize("steepness", [0.1, 3.0, 300.0])
def test_exactly_the_images_within_the_radius_of_the_boundary_break(steepness):
    images, labels, radii = on_both_sides()
    counts = attack(Linear(steepness), images, labels)
    assert (withstands(counts, labels.numpy()) == (radii > RADIUS)).all()
    # The best attack there is: straight at the boundary, with all of the radius.
    of_label = counts[np.arange(len(labels)), labels]
    expected = norm.cdf((radii - RADIUS) / SIGMA)
    assert (np.abs(of_label / 2000 - expected) < 5 * 0.5 / np.sqrt(2000)).all()


def test_true_radii_hold_and_radii_that_are_too_large_are_refuted():
    images, labels, radii = on_both_sides()
    labels_ = labels.numpy()
    counts = attack(Linear(), images, labels)
    correct = np.ones(len(labels_), bool)
    true = compare(counts, labels_, correct, radii, RADIUS)
    assert true.holds
    assert true.certified_accuracy == np.mean(radii >= RADIUS)
    assert not true.is_broken.any()
    too_large = compare(counts, labels_, correct, 2 * radii, RADIUS)
    wrong = (radii < RADIUS) & (2 * radii >= RADIUS)
    assert wrong.sum() == 4
    assert (too_large.is_broken == wrong).all()
    assert (too_large.is_refuted == wrong).all()
    assert not too_large.holds


def cnn():
    info = DatasetInfo("x", ("a", "b", "c"), (1, 8, 8), 255, (0.5,), (0.3,), "")
    spec = ModelSpec.of(ModelConfig(name="small_cnn"), info)
    return build_model(spec, info.mean, info.std, torch.Generator().manual_seed(1))


def digits_like(number=40):
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (number, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return images, torch.randint(3, (number,), generator=generator)


def test_counts_do_not_depend_on_order_company_or_the_counting_batch():
    images, labels = digits_like()
    model, cost = cnn(), {"max_value": 255, "steps": 3, "n": 200, "num_noise_vectors": 16}
    indices = torch.arange(100, 140)
    together = attack(model, images, labels, indices.tolist(), **cost)
    assert len(np.unique(together, axis=0)) > 5
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(4))[:25]
    some = attack(
        model, images[order], labels[order], indices[order].tolist(), batch_size=300, **cost
    )
    assert (some == together[order]).all()


def test_every_image_and_step_has_fresh_noise_of_its_own():
    x = torch.zeros(3, *SHAPE)
    noise = torch.zeros(3, 4, *SHAPE).transpose(0, 1)
    generators = [torch_generator(3, Purpose.EMPIRICAL_ATTACK, index) for index in (7, 9)]
    estimate = FreshNoise(SIGMA, generators)
    seen = []
    for _ in range(2):
        estimate(Linear(), x, torch.zeros(3, dtype=torch.int64), noise)
        seen.append(noise.clone())
    assert not (seen[0][:, :2] == seen[1][:, :2]).any()
    assert not (seen[0][:, 0] == seen[0][:, 1]).any()
    assert not seen[1][:, 2].any()  # beyond the generators
    generator = torch_generator(3, Purpose.EMPIRICAL_ATTACK, 9)
    for step in seen:
        expected = torch.empty(4, *SHAPE).normal_(0.0, SIGMA, generator=generator)
        assert torch.equal(step[:, 1], expected)


@pytest.mark.parametrize("change", [{"radius": 0.0}, {"steps": 0}])
def test_without_a_radius_or_steps_the_clean_images_are_classified(change):
    images, labels = digits_like(5)
    model, cost = cnn(), {"max_value": 255, "n": 200}
    found = attack(model, images, labels, **cost, **change)
    streams = [(Purpose.PREDICTION, 200)]
    clean = count_predictions(
        model,
        images,
        range(5),
        streams,
        max_value=255,
        sigma=SIGMA,
        seed=3,
        batch_size=None,
        device="cpu",
    )
    assert (found == np.concatenate([counts[:, 0] for _, counts in clean])).all()


def test_draws_are_counted_in_the_precision_of_the_certificate():
    class Close(nn.Module):
        """Class 1 by less than bfloat16 tells from equality."""

        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.tensor([1.0, 1.0001]))

        def forward(self, x):
            return 0 * x.flatten(1)[:, :2] + self.bias

    images, labels, _ = on_both_sides()
    assert (attack(Close(), images, labels, n=50) == [0, 50]).all()
    assert (attack(Close(), images, labels, n=50, precision="bfloat16") == [50, 0]).all()


def test_the_model_is_left_as_it_was():
    images, labels = digits_like(3)
    model = cnn().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attack(model, images, labels, max_value=255, steps=2, n=10)
    assert all(module.training for module in model.modules())
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"radius": -1.0}, ConfigError),
        ({"radius": float("nan")}, ConfigError),
        ({"radius": 16.0}, ConfigError),
        ({"steps": -1}, ConfigError),
        ({"sigma": 0.0}, CertificationError),
        ({"n": 0}, CertificationError),
        ({"num_noise_vectors": 0}, CertificationError),
        ({"precision": "float16"}, CertificationError),
        ({"max_value": 0.5}, CertificationError),
        ({"indices": [1]}, CertificationError),
    ],
)
def test_what_cannot_be_attacked_is_refused(change, error):
    images, labels, _ = on_both_sides()
    with pytest.raises(error):
        attack(Linear(), images, labels, **change)


# --- comparison


def counted(of_label, n=1000):
    """Counts (N, 2) of images of class 0."""
    of_label = np.asarray(of_label)
    return np.stack([of_label, n - of_label], 1)


def test_a_tie_is_no_abstention():
    counts = np.array([[5, 5, 0], [0, 5, 5], [4, 3, 3]])
    assert withstands(counts, np.array([0, 1, 0])).tolist() == [True, True, True]
    assert withstands(counts, np.array([1, 2, 1])).tolist() == [False, False, False]


def test_what_is_certified_is_correct_and_has_the_radius():
    correct = np.array([True, True, False, True])
    radii = np.array([0.5, 0.49, 0.9, 0.51])
    found = compare(counted([0, 0, 0, 1000]), np.zeros(4, int), correct, radii, 0.5)
    assert found.is_certified.tolist() == [True, False, False, True]
    assert found.is_broken.tolist() == [True, False, False, False]
    assert found.certified_accuracy == 0.5


def test_a_broken_certificate_is_refuted_at_bonferronis_share_of_chance():
    num_certified, n = 40, 1000
    least = int(binom.ppf(CHANCE / num_certified, n, 0.5))
    assert binom.cdf(least - 1, n, 0.5) <= CHANCE / num_certified < binom.cdf(least, n, 0.5)
    of_label = np.full(50, n)
    of_label[:4] = [n // 2 - 1, least, least - 1, 0]
    # The last ten have no certificate at this radius, so that they do not make the others' share smaller.
    radii = np.where(np.arange(50) < num_certified, 1.0, 0.1)
    found = compare(counted(of_label), np.zeros(50, int), np.ones(50, bool), radii, 0.5)
    assert found.is_broken[:5].tolist() == [True, True, True, True, False]
    assert found.is_refuted[:5].tolist() == [False, False, True, True, False]
    assert not found.holds


def test_certificates_at_the_edge_of_their_radius_hold_almost_always():
    """P = 1/2, all that is promised: broken half of the time, refuted in one of a thousand comparisons."""
    draws = np.random.default_rng(0).binomial(1000, 0.5, (500, 100))
    nothing = np.zeros(100, int), np.ones(100, bool), np.ones(100)
    found = [compare(counted(one), *nothing, 1.0) for one in draws]
    assert np.mean([one.is_broken.mean() for one in found]) == pytest.approx(0.5, abs=0.02)
    assert sum(not one.holds for one in found) <= 4


def test_nothing_certified_holds_and_nothing_at_all_is_refused():
    found = compare(counted([0]), np.zeros(1, int), np.array([True]), np.array([0.1]), 0.5)
    assert found.holds
    with pytest.raises(CertificationError, match="cannot be compared"):
        compare(counted([]), np.zeros(0, int), np.ones(0, bool), np.ones(0), 0.5)
    with pytest.raises(CertificationError, match="cannot be compared"):
        compare(counted([1]), np.zeros(1, int), np.ones(2, bool), np.ones(2), 0.5)


def test_the_interval_is_clopper_and_pearsons():
    low, high = accuracy_interval(np.arange(10) < 8)
    assert binom.sf(7, 10, low) == pytest.approx(0.025)
    assert binom.cdf(8, 10, high) == pytest.approx(0.025)
    assert accuracy_interval(np.zeros(4, bool))[0] == 0
    assert accuracy_interval(np.ones(4, bool))[1] == 1
