"""Smoothing and both gradient estimators against closed forms and finite differences."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fedsmooth_core.config import AttackConfig
from fedsmooth_core.estimators import OnePoint, Stochastic, make_estimator
from fedsmooth_core.smoothing import draw_noise, log_smoothed_probability, noisy_logits

SIGMA = 0.5
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(80)  # E[f(Z)], Z ~ N(0, 1)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def linear_softmax(slope, bias=0.3):
    """F(x) = softmax(w.x + b, 0) for images of len(w) pixels, in float64."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(len(slope), 2)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([slope, [0.0] * len(slope)]))
        model[1].bias.copy_(torch.tensor([bias, 0.0]))
    return model


def tanh_network(pixels=6, classes=3, seed=0):
    """A smooth classifier with random weights, in float64."""
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(pixels, 8), nn.Tanh(), nn.Linear(8, classes)
    ).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 1, generator=generator(seed))
    return model


def smoothed(slope, x, bias=0.3, label=0):
    """G(x)_y and its gradient by quadrature: w.d is N(0, sigma^2 |w|^2), a single dimension."""
    w = np.array(slope)
    logit = w @ np.array(x) + bias + SIGMA * np.linalg.norm(w) * NODES
    probability = 1 / (1 + np.exp(-logit))
    derivative = (WEIGHTS @ (probability * (1 - probability))) * w
    value = WEIGHTS @ probability
    return (value, derivative) if label == 0 else (1 - value, -derivative)


def repeated(x, times):
    """One image of len(x) pixels many times over, (times, 1, 1, len(x)): independent trials."""
    return torch.tensor(x, dtype=torch.float64).view(1, 1, 1, -1).expand(times, 1, 1, -1)


def assert_mean(samples, expected, standard_errors=4.5):
    """The mean of independent rows is the expected vector, within its own standard error."""
    standard_error = samples.std(0) / math.sqrt(len(samples))
    deviation = (samples.mean(0) - torch.as_tensor(expected)).abs()
    assert (deviation <= standard_errors * standard_error).all(), deviation / standard_error


CASES = [([2.0], [0.4]), ([-3.0], [0.7]), ([1.5, -2.0, 0.5], [0.2, 0.9, 0.5])]


@pytest.mark.parametrize(("slope", "x"), CASES)
@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize(
    ("reduction", "num_noise_vectors"),
    [("none", 1), ("none", 3), ("antithetic", 1), ("leave_one_out", 2), ("leave_one_out", 5)],
)
def test_one_point_has_the_smoothed_gradient_as_its_mean(
    slope, x, label, reduction, num_noise_vectors
):
    images = repeated(x, 40_000)
    noise = draw_noise(images, SIGMA, num_noise_vectors, generator(1))
    labels = torch.full((len(images),), label)
    direction = OnePoint(SIGMA, reduction)(linear_softmax(slope), images, labels, noise)
    # The estimate is a direction that increases J = -log G, so it is minus the gradient of G.
    assert_mean(-direction.flatten(1), smoothed(slope, x, label=label)[1])


@pytest.mark.parametrize("reduction", ["antithetic", "leave_one_out"])
def test_variance_reduction_reduces_the_variance(reduction):
    images = repeated([0.2, 0.9, 0.5, 0.1, 0.3, 0.6], 5_000)
    labels = torch.zeros(len(images), dtype=torch.int64)
    noise = draw_noise(images, SIGMA, 4, generator(2))
    model = tanh_network()
    plain, reduced = (
        OnePoint(SIGMA, form)(model, images, labels, noise).flatten(1).var(0).sum().item()
        for form in ("none", reduction)
    )
    assert reduced < 0.7 * plain


def test_antithetic_at_equal_cost_still_beats_plain():
    images = repeated([0.4], 20_000)
    labels = torch.zeros(len(images), dtype=torch.int64)
    model = linear_softmax([2.0])
    plain = OnePoint(SIGMA)(model, images, labels, draw_noise(images, SIGMA, 4, generator(3)))
    noise = draw_noise(images, SIGMA, 2, generator(4))  # two pairs: four forward passes
    paired = OnePoint(SIGMA, "antithetic")(model, images, labels, noise)
    assert paired.var().item() < 0.7 * plain.var().item()


def test_one_point_is_the_sum_of_eq_4():
    x = torch.rand(3, 1, 2, 3, generator=generator(), dtype=torch.float64)
    labels = torch.tensor([0, 2, 1])
    noise = draw_noise(x, SIGMA, 4, generator(1))
    model = tanh_network()
    plain, paired, baseline = torch.zeros(3, *x.shape, dtype=torch.float64)
    with torch.no_grad():
        for b, label in enumerate(labels):

            def score(d, b=b, label=label):
                return model((x[b] + d).unsqueeze(0)).softmax(1)[0, label]

            scores = [score(noise[i, b]) for i in range(4)]
            for i in range(4):
                d = noise[i, b]
                others = sum(scores[j] for j in range(4) if j != i) / 3
                plain[b] -= d / SIGMA**2 * scores[i] / 4
                paired[b] -= d / SIGMA**2 * (scores[i] - score(-d)) / 2 / 4
                baseline[b] -= d / SIGMA**2 * (scores[i] - others) / 4
    for form, expected in (("none", plain), ("antithetic", paired), ("leave_one_out", baseline)):
        torch.testing.assert_close(OnePoint(SIGMA, form)(model, x, labels, noise), expected)


def test_one_point_builds_no_graph():
    model = tanh_network()
    recorded = []
    model.register_forward_hook(lambda module, inputs, output: recorded.append(output))
    x = torch.rand(2, 1, 2, 3, dtype=torch.float64, generator=generator())
    noise = draw_noise(x, SIGMA, 2, generator())
    direction = OnePoint(SIGMA)(model, x, torch.tensor([0, 1]), noise)
    assert len(recorded) == 1
    assert not recorded[0].requires_grad
    assert not direction.requires_grad


@pytest.mark.parametrize(("slope", "x"), CASES)
@pytest.mark.parametrize("label", [0, 1])
def test_stochastic_tends_to_the_gradient_of_minus_log_g(slope, x, label):
    num = 200_000
    images = repeated(x, 1)
    noise = draw_noise(images, SIGMA, num, generator(5))
    model = linear_softmax(slope)
    gradient = Stochastic()(model, images, torch.tensor([label]), noise).flatten()
    value, derivative = smoothed(slope, x, label=label)
    expected = torch.as_tensor(-derivative / value)
    # Delta method: -mean(p') / mean(p) varies as the mean of (p'_i - p_i G'/G) / G.
    p = model((images + noise).flatten(0, 1)).softmax(1)[:, label].detach()
    slopes = torch.tensor(slope) * (1 - 2 * label)
    influence = ((p * (1 - p)).unsqueeze(1) * slopes + p.unsqueeze(1) * expected) / value
    standard_error = influence.std(0) / math.sqrt(num)
    assert ((gradient - expected).abs() <= 4.5 * standard_error).all()


@pytest.mark.parametrize("num_noise_vectors", [1, 2, 7])
def test_stochastic_is_the_finite_difference_of_j(num_noise_vectors):
    model = tanh_network()
    x = torch.rand(3, 1, 2, 3, generator=generator(), dtype=torch.float64)
    labels = torch.tensor([2, 0, 1])
    noise = draw_noise(x, SIGMA, num_noise_vectors, generator(6))

    def loss(image, b):
        """J(x) as the paper writes it: the log of the mean probability."""
        probability = model(image + noise[:, b]).softmax(1)[:, labels[b]]
        return -math.log(probability.mean().item())

    gradient = Stochastic()(model, x, labels, noise)
    step = 1e-5
    for b in range(len(x)):
        for pixel in range(6):
            up, down = x[b].clone(), x[b].clone()
            up.view(-1)[pixel] += step
            down.view(-1)[pixel] -= step
            expected = (loss(up, b) - loss(down, b)) / (2 * step)
            assert gradient[b].view(-1)[pixel].item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_stochastic_leaves_no_trace():
    model = tanh_network()
    x = torch.rand(2, 1, 2, 3, dtype=torch.float64, generator=generator())
    noise = draw_noise(x, SIGMA, 2, generator())
    with torch.no_grad():  # the caller's mode is no concern of the estimator's
        gradient = Stochastic()(model, x, torch.tensor([0, 1]), noise)
    assert not gradient.requires_grad
    assert not x.requires_grad
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize(
    "estimator", [Stochastic(), OnePoint(SIGMA), OnePoint(SIGMA, "antithetic")], ids=repr
)
def test_an_images_direction_does_not_depend_on_the_rest_of_the_batch(estimator):
    model = tanh_network()
    x = torch.rand(4, 1, 2, 3, dtype=torch.float64, generator=generator())
    labels = torch.tensor([0, 1, 2, 0])
    noise = draw_noise(x, SIGMA, 3, generator())
    together = estimator(model, x, labels, noise)
    for b in range(4):
        part = slice(b, b + 1)
        alone = estimator(model, x[part], labels[part], noise[:, part])
        torch.testing.assert_close(together[part], alone)


def test_j_is_the_log_of_the_mean_not_the_mean_of_the_logs():
    probability = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64)
    logits = probability.log().unsqueeze(1)  # two copies of one image
    log_mean = log_smoothed_probability(logits, torch.tensor([0])).item()
    assert log_mean == pytest.approx(math.log(0.5))
    assert log_mean != pytest.approx((math.log(0.9) + math.log(0.1)) / 2)


def test_j_stays_finite_where_probabilities_round_to_0():
    logits = torch.tensor([[[1000.0, -1000.0]], [[900.0, -1000.0]]], requires_grad=True)
    value = log_smoothed_probability(logits, torch.tensor([1]))
    assert value.item() == pytest.approx(-1900 - math.log(2))
    value.sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().max() > 0


def test_log_probabilities_pair_labels_with_images_not_with_copies():
    logits = torch.randn(2, 5, 4, generator=generator(), dtype=torch.float64)
    labels = torch.tensor([3, 0, 1, 2, 3])
    mean = logits.softmax(-1).mean(0)
    expected = torch.stack([mean[b, label].log() for b, label in enumerate(labels)])
    torch.testing.assert_close(log_smoothed_probability(logits, labels), expected)


def test_noise_has_the_asked_deviation_and_its_own_generator():
    x = torch.zeros(50, 3, 8, 8)
    before = torch.get_rng_state()
    noise = draw_noise(x, SIGMA, 4, generator(7))
    assert torch.equal(torch.get_rng_state(), before)
    assert noise.shape == (4, 50, 3, 8, 8)
    num = noise.numel()
    assert noise.std().item() == pytest.approx(SIGMA, rel=4.5 / math.sqrt(2 * num))
    assert abs(noise.mean().item()) < 4.5 * SIGMA / math.sqrt(num)
    assert torch.equal(noise, draw_noise(x, SIGMA, 4, generator(7)))
    assert not torch.equal(noise[0], noise[1])


def test_without_noise_one_copy_is_enough():
    noise = draw_noise(torch.ones(2, 1, 3, 3), 0.0, 5, generator())
    assert noise.shape == (1, 2, 1, 3, 3)
    assert noise.count_nonzero() == 0


def test_noisy_copies_are_not_clipped_and_keep_their_order():
    seen = []
    model = nn.Flatten()
    model.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    x = torch.rand(5, 1, 2, 2, generator=generator())
    noise = draw_noise(x, 2.0, 3, generator())
    logits = noisy_logits(model, x, noise)
    assert logits.shape == (3, 5, 4)
    assert torch.equal(logits, (x + noise).flatten(2))
    assert len(seen) == 1
    assert seen[0].min() < 0
    assert seen[0].max() > 1


def test_the_configured_estimator_is_made():
    assert isinstance(make_estimator(AttackConfig(), 0.25), Stochastic)
    config = AttackConfig(estimator="one_point", variance_reduction="leave_one_out")
    made = make_estimator(config, 0.25)
    assert isinstance(made, OnePoint)
    assert (made.sigma, made.variance_reduction) == (0.25, "leave_one_out")
