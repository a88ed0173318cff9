import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedsmooth_core.attack import (
    STEP_RULES,
    gradient_step,
    normalized_step,
    project_l2,
    smoothadv_attack,
)
from fedsmooth_core.config import AttackConfig
from fedsmooth_core.estimators import Stochastic, make_estimator
from fedsmooth_core.smoothing import draw_noise, log_smoothed_probability, noisy_logits

SHAPE = (2, 4, 4)
ESTIMATORS = [
    ("stochastic", "none"),
    ("one_point", "none"),
    ("one_point", "antithetic"),
    ("one_point", "leave_one_out"),
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_model(seed=0):
    """A small convolutional network with batch normalisation and dropout."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.5, generator=generator(seed))
    return model


def make_batch(size=6, seed=0):
    x = torch.rand(size, *SHAPE, generator=generator(seed))
    return x, torch.randint(3, (size,), generator=generator(seed + 1))


def run_attack(model, x, labels, noise, sigma=0.5, **settings):
    settings = {"attack_steps": 3, "step_size": 0.5} | settings
    config = AttackConfig(epsilon_255=None, **({"epsilon": 0.4} | settings))
    return smoothadv_attack(model, x, labels, noise, make_estimator(config, sigma), config)


def norms(delta):
    return delta.flatten(1).norm(dim=1)


images = st.integers(0, 2**32).map(
    lambda seed: torch.rand(3, 1, 2, 3, generator=generator(seed), dtype=torch.float64)
)
budgets = st.floats(0, 3)


@settings(deadline=None)
@given(images, images, st.floats(0, 10), budgets)
def test_projection_ends_inside_the_ball_and_is_idempotent(center, direction, length, epsilon):
    x = center + length * (direction - 0.5)
    projected = project_l2(x, center, epsilon)
    assert (norms(projected - center) <= epsilon * (1 + 1e-12) + 1e-15).all()
    torch.testing.assert_close(
        project_l2(projected, center, epsilon), projected, rtol=1e-12, atol=1e-15
    )


@settings(deadline=None)
@given(images, images, st.floats(0, 10), budgets, st.integers(0, 2**32))
def test_projection_is_the_nearest_point_of_the_ball(center, direction, length, epsilon, seed):
    x = center + length * (direction - 0.5)
    distance = norms(x - project_l2(x, center, epsilon))
    torch.testing.assert_close(
        distance, (norms(x - center) - epsilon).clamp_min(0), rtol=1e-9, atol=1e-12
    )
    others = torch.randn(20, *x.shape, generator=generator(seed), dtype=torch.float64)
    for other in others:
        point = center + epsilon * other / norms(other).view(-1, 1, 1, 1)
        assert (distance <= norms(x - point) + 1e-12).all()


@settings(deadline=None)
@given(images, images, st.floats(0, 1))
def test_projection_changes_nothing_inside_the_ball(center, direction, length):
    for dtype in (torch.float32, torch.float64):
        inside = (center + length * (direction - 0.5)).to(dtype)
        assert torch.equal(project_l2(inside, center.to(dtype), 10.0), inside)


def test_projection_onto_an_empty_budget_is_the_center():
    center = torch.rand(2, *SHAPE, generator=generator())
    assert torch.equal(project_l2(center + 0.3, center, 0.0), center)
    assert torch.equal(project_l2(center, center, 0.0), center)


def test_each_image_is_projected_by_its_own_norm():
    center = torch.zeros(2, 1, 1, 2)
    x = torch.tensor([[3.0, 4.0], [0.3, 0.4]]).view(2, 1, 1, 2)
    expected = torch.tensor([[0.6, 0.8], [0.3, 0.4]]).view(2, 1, 1, 2)
    torch.testing.assert_close(project_l2(x, center, 1.0), expected)


def test_the_step_rules_are_what_they_are_called():
    gradient = torch.randn(4, *SHAPE, generator=generator())
    torch.testing.assert_close(gradient_step(gradient, 0.01), 0.01 * gradient)
    step = normalized_step(gradient, 0.25)
    torch.testing.assert_close(norms(step), torch.full((4,), 0.25))
    torch.testing.assert_close(
        step / norms(step).view(-1, 1, 1, 1), gradient / norms(gradient).view(-1, 1, 1, 1)
    )
    assert {"gradient": gradient_step, "normalized": normalized_step} == STEP_RULES


def test_a_zero_gradient_makes_no_step():
    zero = torch.zeros(2, *SHAPE)
    for rule in STEP_RULES.values():
        assert torch.equal(rule(zero, 0.5), zero)


@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e-20, 1e20, 1e30])
def test_a_normalized_step_has_its_length_even_where_squares_leave_float32(scale):
    gradient = scale * torch.randn(4, *SHAPE, generator=generator())
    torch.testing.assert_close(norms(normalized_step(gradient, 0.25)), torch.full((4,), 0.25))


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(ESTIMATORS),
    st.sampled_from(["gradient", "normalized"]),
    st.floats(0, 3),
    st.floats(1e-3, 1e3),
    st.integers(0, 4),
    st.integers(0, 2**32),
)
def test_the_attack_stays_in_the_ball_and_in_0_1(kind, rule, epsilon, step_size, steps, seed):
    x, labels = make_batch(seed=seed)
    x[0] = (x[0] > 0.5).float()  # an image on the edges of [0, 1]
    x_adv = run_attack(
        make_model(seed),
        x,
        labels,
        draw_noise(x, 0.5, 2, generator(seed)),
        estimator=kind[0],
        variance_reduction=kind[1],
        step_rule=rule,
        epsilon=epsilon,
        step_size=step_size,
        attack_steps=steps,
    )
    assert x_adv.shape == x.shape
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert (norms(x_adv - x) <= epsilon + 1e-5).all()
    assert not x_adv.requires_grad


def test_without_steps_the_images_are_clean():
    x, labels = make_batch()
    noise = draw_noise(x, 0.5, 2, generator())
    assert torch.equal(run_attack(make_model(), x, labels, noise, attack_steps=0), x)


def test_without_a_budget_the_images_are_clean():
    x, labels = make_batch()
    noise = draw_noise(x, 0.5, 2, generator())
    assert torch.equal(run_attack(make_model(), x, labels, noise, epsilon=0.0), x)


def test_the_attack_leaves_the_clean_images_alone():
    x, labels = make_batch()
    copy = x.clone()
    run_attack(make_model(), x, labels, draw_noise(x, 0.5, 2, generator()))
    assert torch.equal(x, copy)


@pytest.mark.parametrize("rule", ["gradient", "normalized"])
def test_without_noise_it_is_the_classic_l2_pgd(rule):
    model = make_model().eval()
    x, labels = make_batch()
    noise = draw_noise(x, 0.0, 1, generator())
    epsilon, step_size = 0.4, 0.15
    found = run_attack(
        model, x, labels, noise, step_rule=rule, epsilon=epsilon, step_size=step_size
    )
    expected = x.clone()
    for _ in range(3):
        expected.requires_grad_()
        loss = nn.functional.cross_entropy(model(expected), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, expected)
        if rule == "normalized":
            gradient = nn.functional.normalize(gradient.flatten(1)).view_as(x)
        delta = expected.detach() + step_size * gradient - x
        delta = delta.flatten(1).renorm(2, 0, epsilon).view_as(x)
        expected = (x + delta).clamp(0, 1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("estimator", "reduction"), ESTIMATORS)
def test_the_attack_raises_the_smoothed_loss(estimator, reduction):
    model = make_model().eval()
    x, labels = make_batch()
    noise = draw_noise(x, 0.5, 400, generator())
    x_adv = run_attack(
        model,
        x,
        labels,
        noise,
        estimator=estimator,
        variance_reduction=reduction,
        step_rule="normalized",
        step_size=0.2,
    )
    before, after = (
        log_smoothed_probability(noisy_logits(model, p, noise), labels) for p in (x, x_adv)
    )
    assert (after < before).all()


@pytest.mark.parametrize(("estimator", "reduction"), ESTIMATORS)
@pytest.mark.parametrize("training", [True, False])
def test_the_attack_leaves_the_model_as_it_was(estimator, reduction, training):
    model = make_model().train(training)
    model[0].bias.requires_grad_(False)  # a weight that was frozen stays frozen
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    x, labels = make_batch()
    noise = draw_noise(x, 0.5, 2, generator())
    run_attack(model, x, labels, noise, estimator=estimator, variance_reduction=reduction)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(weight.grad is None for weight in model.parameters())
    trainable = {name: weight.requires_grad for name, weight in model.named_parameters()}
    assert trainable == {name: name != "0.bias" for name in trainable}
    assert all(module.training == training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)  # dropout drew nothing


def test_the_model_is_left_as_it_was_even_if_the_estimator_fails():
    model = make_model().train()
    x, labels = make_batch()

    def failing(*arguments):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        smoothadv_attack(model, x, labels, x.unsqueeze(0), failing, AttackConfig())
    assert model.training
    assert all(weight.requires_grad for weight in model.parameters())


def test_the_attack_sees_the_model_in_eval_mode_and_the_same_noise_in_every_step():
    model = make_model().train()
    x, labels = make_batch()
    noise = draw_noise(x, 0.5, 2, generator())
    calls = []

    def spying(model, point, labels, noise):
        calls.append((model.training, point, noise))
        return Stochastic()(model, point, labels, noise)

    config = AttackConfig(attack_steps=3, step_size=1.0)
    smoothadv_attack(model, x, labels, noise, spying, config)
    assert [training for training, _, _ in calls] == [False] * 3
    assert all(seen is noise for _, _, seen in calls)
    assert torch.equal(calls[0][1], x)
    assert not torch.equal(calls[1][1], x)


def test_the_attack_of_an_image_does_not_depend_on_the_rest_of_the_batch():
    model = make_model().train()
    x, labels = make_batch()
    noise = draw_noise(x, 0.5, 2, generator())
    together = run_attack(model, x, labels, noise)
    for b in range(len(x)):
        part = slice(b, b + 1)
        alone = run_attack(model, x[part], labels[part], noise[:, part])
        torch.testing.assert_close(together[part], alone)


def test_the_attack_works_where_the_caller_has_switched_gradients_off():
    model = make_model()
    x, labels = make_batch()
    noise = draw_noise(x, 0.5, 2, generator())
    with torch.no_grad():
        quiet = run_attack(model, x, labels, noise)
    assert torch.equal(quiet, run_attack(model, x, labels, noise))
    assert not torch.equal(quiet, x)


def test_epsilon_255_is_in_grey_levels():
    model = make_model()
    x = torch.full((2, *SHAPE), 0.5)
    noise = draw_noise(x, 0.5, 2, generator())
    config = AttackConfig(epsilon_255=64, step_rule="normalized", step_size=10.0)
    x_adv = smoothadv_attack(model, x, torch.tensor([0, 1]), noise, Stochastic(), config)
    assert norms(x_adv - x).tolist() == pytest.approx([64 / 255] * 2, rel=1e-5)
    assert not math.isclose(64 / 255, 64 / 256, rel_tol=1e-5)
