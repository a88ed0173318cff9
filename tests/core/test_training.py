"""LocalTrain against references written apart from it."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from fedsmooth_core.attack import smoothadv_attack
from fedsmooth_core.config import (
    AttackConfig,
    DatasetConfig,
    SmoothingConfig,
    TrainingConfig,
    TrainingPlan,
)
from fedsmooth_core.data import ClientData
from fedsmooth_core.errors import ConfigError
from fedsmooth_core.estimators import Stochastic
from fedsmooth_core.limits import DeviceLimits
from fedsmooth_core.models import ModelSpec, build_model
from fedsmooth_core.training import (
    LOSSES,
    copies_cross_entropy,
    local_train,
    smoothed_loss,
)

PIXELS, CLASSES = 2 * 4 * 4, 3
ESTIMATORS = [
    ("stochastic", "none"),
    ("one_point", "none"),
    ("one_point", "antithetic"),
    ("one_point", "leave_one_out"),
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_data(size=12, label=None):
    images = torch.randint(256, (size, 2, 4, 4), generator=generator(), dtype=torch.uint8)
    labels = torch.randint(CLASSES, (size,), generator=generator(1))
    return ClientData(images, labels if label is None else torch.full_like(labels, label), 255)


def make_model(seed=0):
    model = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.5, generator=generator(seed))
    return model


def make_plan(sigma=0.25, num_noise_vectors=2, attack=None, seed=0, dataset=None, **training):
    training = {"local_steps": 4, "batch_size": 5, "learning_rate": 0.1} | training
    return TrainingPlan(
        seed=seed,
        dataset=DatasetConfig(**(dataset or {})),
        smoothing=SmoothingConfig(sigma=sigma, num_noise_vectors=num_noise_vectors),
        attack=AttackConfig(**(attack or {"step_size": 1.0})),
        training=TrainingConfig(**training),
    )


def state_after(plan, model=None, data=None, server_round=1, client=0):
    model = model or make_model()
    local_train(model, data or make_data(), plan, server_round, client)
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def sgd_by_hand(model, loss_function, steps, learning_rate, momentum, weight_decay):
    """v = mu v + (g + lambda theta), theta = theta - eta v."""
    weights = list(model.parameters())
    velocity = [torch.zeros_like(weight) for weight in weights]
    for step in range(steps):
        gradients = torch.autograd.grad(loss_function(step), weights)
        with torch.no_grad():
            for weight, gradient, v in zip(weights, gradients, velocity, strict=True):
                v.mul_(momentum).add_(gradient + weight_decay * weight)
                weight.sub_(learning_rate * v)


def record_inputs(model):
    """Every input that the model is called with, in order, with its mode."""
    calls = []
    model.register_forward_pre_hook(
        lambda module, inputs: calls.append((module.training, inputs[0].detach().clone()))
    )
    return calls


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.0), (0.9, 0.01)])
@pytest.mark.parametrize("loss", ["smoothed", "cross_entropy"])
def test_standard_training_is_sgd_as_written_by_hand(momentum, weight_decay, loss):
    """sigma = 0 and T = 0; full batches, so that the order of the samples does not matter."""
    data = make_data()
    plan = make_plan(
        sigma=0.0,
        attack={"attack_steps": 0},
        batch_size=len(data),
        momentum=momentum,
        weight_decay=weight_decay,
        loss=loss,
    )
    expected = make_model()
    x = data.images.float() / 255

    def cross_entropy(step):
        return nn.functional.cross_entropy(expected(x), data.labels)

    model = make_model()
    for _ in range(2):  # two rounds: momentum starts afresh in each
        sgd_by_hand(expected, cross_entropy, 4, 0.1, momentum, weight_decay)
        local_train(model, data, plan, 1, 0)
    torch.testing.assert_close(model.state_dict(), expected.state_dict())


@pytest.mark.parametrize("loss", ["smoothed", "cross_entropy"])
@pytest.mark.parametrize(("estimator", "reduction"), ESTIMATORS)
def test_a_step_minimises_the_loss_at_the_attacked_noisy_copies(loss, estimator, reduction):
    """All labels are equal, so the recorded inputs say all about a step."""
    plan = make_plan(
        attack={"estimator": estimator, "variance_reduction": reduction, "step_size": 1.0},
        num_noise_vectors=3,
        loss=loss,
    )
    model = make_model()
    calls = record_inputs(model)
    metrics = local_train(model, make_data(label=2), plan, 1, 0)
    copies = [inputs for training, inputs in calls if training]
    assert len(copies) == 4
    expected = make_model()
    losses, accuracies = [], []

    def loss_function(step):
        logits = expected(copies[step])
        accuracies.append((logits.argmax(1) == 2).float().mean().item())
        probability = logits.softmax(1)[:, 2].view(3, 5)  # 3 copies of 5 images
        if loss == "smoothed":
            losses.append(-probability.mean(0).log().mean())
        else:
            losses.append(-probability.log().mean())
        return losses[-1]

    sgd_by_hand(expected, loss_function, 4, 0.1, 0.9, 0.0)
    torch.testing.assert_close(model.state_dict(), expected.state_dict())
    assert metrics.loss == pytest.approx(sum(value.item() for value in losses) / 4, rel=1e-5)
    assert metrics.accuracy == pytest.approx(sum(accuracies) / 4)


def test_training_uses_the_noise_of_its_attack():
    model = make_model()
    calls = record_inputs(model)
    local_train(model, make_data(), make_plan(attack={"attack_steps": 2, "step_size": 5.0}), 1, 0)
    assert [training for training, _ in calls] == [False, False, True] * 4
    differences = []
    for step in range(4):
        copies = [inputs.unflatten(0, (2, 5)) for _, inputs in calls[3 * step : 3 * step + 3]]
        assert not torch.allclose(copies[0], copies[2], atol=1e-3)  # the attack moved the images
        for later in copies[1:]:  # x cancels between two copies, what is left is noise
            torch.testing.assert_close(
                later[0] - later[1], copies[0][0] - copies[0][1], rtol=0, atol=1e-5
            )
        differences.append(copies[0][0] - copies[0][1])
    noise = torch.stack(differences) / math.sqrt(2)
    assert noise.std().item() == pytest.approx(0.25, rel=4.5 / math.sqrt(2 * noise.numel()))
    assert not torch.allclose(differences[0], differences[1], atol=1e-2)  # fresh in every step


def test_the_attacked_images_are_those_of_the_attack():
    """From the recorded clean and attacked copies: the attack module, given that noise, agrees."""
    model = make_model()
    calls = record_inputs(model)
    data = make_data(size=5, label=1)
    plan = make_plan(local_steps=1, num_noise_vectors=2, attack={"step_size": 1.0})
    local_train(model, data, plan, 1, 0)
    clean, attacked = (inputs.unflatten(0, (2, 5)) for _, inputs in (calls[0], calls[-1]))
    # The batch is a permutation of the samples: the one for which what is left is the noise.
    x = data.images.float() / 255
    order = [
        min(range(5), key=lambda j, b=b: (clean[:, b] - x[j]).square().sum().item())
        for b in range(5)
    ]
    assert sorted(order) == list(range(5))
    batch = x[order]
    expected = smoothadv_attack(
        make_model(),
        batch,
        torch.ones(5, dtype=torch.int64),
        clean - batch,
        Stochastic(),
        plan.attack,
    )
    torch.testing.assert_close((attacked - clean)[0] + batch, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("estimator", "reduction"), ESTIMATORS)
def test_training_depends_on_seed_round_and_client_alone(estimator, reduction):
    attack = {"estimator": estimator, "variance_reduction": reduction}
    plan = make_plan(attack=attack, dataset={"flip": True, "crop_padding": 1})
    model = make_model()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = state_after(plan, model, server_round=3, client=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    state_after(plan, server_round=3, client=8)  # another client before it
    assert equal(state_after(plan, server_round=3, client=7), first)
    assert not equal(state_after(plan, server_round=4, client=7), first)
    assert not equal(state_after(plan, server_round=3, client=8), first)
    assert not equal(
        state_after(dataclasses.replace(plan, seed=9), server_round=3, client=7), first
    )


def first_noise(server_round=1, client=0, **settings):
    """The difference of the first step's two copies: x cancels, what is left is noise."""
    model = make_model()
    calls = record_inputs(model)
    local_train(model, make_data(), make_plan(**settings), server_round, client)
    copies = calls[0][1].unflatten(0, (2, 5))
    return copies[0] - copies[1]


def test_the_noise_does_not_depend_on_what_augmentation_draws():
    augmented = first_noise(dataset={"flip": True, "crop_padding": 1})
    torch.testing.assert_close(first_noise(), augmented)


def test_every_seed_round_and_client_has_noise_of_its_own():
    streams = [first_noise(), first_noise(seed=1), first_noise(2), first_noise(client=1)]
    correlations = torch.corrcoef(torch.stack(streams).flatten(1)).fill_diagonal_(0)
    assert correlations.abs().max() < 4.5 / math.sqrt(streams[0].numel())


@pytest.mark.parametrize(("server_round", "budget"), [(1, 85), (2, 170), (3, 255), (7, 255)])
def test_the_budget_grows_over_the_first_rounds(server_round, budget):
    attack = {"step_rule": "normalized", "step_size": None}
    growing = make_plan(attack=attack | {"epsilon_255": 255, "warmup_rounds": 3})
    whole = make_plan(attack=attack | {"epsilon_255": budget})
    trained = state_after(growing, server_round=server_round)
    expected = state_after(whole, server_round=server_round)
    for name, value in trained.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)


def test_the_training_data_is_left_alone():
    data = make_data()
    images, labels = data.images.clone(), data.labels.clone()
    local_train(make_model(), data, make_plan(), 1, 0)
    assert torch.equal(data.images, images)
    assert torch.equal(data.labels, labels)


def test_batch_statistics_move_once_a_training_step_and_never_in_the_attack():
    spec = ModelSpec("resnet20", "he", CLASSES, 2, 8, 8)
    data = ClientData(
        torch.randint(256, (6, 2, 8, 8), generator=generator(), dtype=torch.uint8),
        torch.randint(CLASSES, (6,), generator=generator(1)),
        255,
    )
    model = build_model(spec, [0.5] * 2, [0.25] * 2, generator())
    local_train(model, data, make_plan(local_steps=3, batch_size=4), 1, 0)
    counters = [v.item() for k, v in model.state_dict().items() if k.endswith("batches_tracked")]
    assert counters
    assert set(counters) == {3}


def test_the_model_is_left_in_train_mode_ready_for_the_next_round():
    model = make_model().eval()
    local_train(model, make_data(), make_plan(), 1, 0)
    assert model.training
    assert all(weight.requires_grad for weight in model.parameters())


def test_a_client_with_fewer_samples_than_a_batch_trains():
    metrics = local_train(make_model(), make_data(size=2), make_plan(batch_size=30), 1, 0)
    assert math.isfinite(metrics.loss)
    assert 0 <= metrics.accuracy <= 1


def test_the_smoothed_loss_is_j_and_cross_entropy_is_the_mean_of_the_copies():
    probability = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64)
    logits = probability.log().unsqueeze(1)
    labels = torch.tensor([0])
    assert smoothed_loss(logits, labels).item() == pytest.approx(-math.log(0.5))
    expected = -(math.log(0.9) + math.log(0.1)) / 2
    assert copies_cross_entropy(logits, labels).item() == pytest.approx(expected)
    assert {"smoothed": smoothed_loss, "cross_entropy": copies_cross_entropy} == LOSSES


def test_both_losses_pair_labels_with_images_in_a_batch_of_copies():
    logits = torch.randn(3, 4, CLASSES, generator=generator(), dtype=torch.float64)
    labels = torch.tensor([2, 0, 1, 1])
    p = torch.stack([logits.softmax(-1)[:, b, label] for b, label in enumerate(labels)], dim=1)
    torch.testing.assert_close(smoothed_loss(logits, labels), -p.mean(0).log())
    torch.testing.assert_close(copies_cross_entropy(logits, labels), -p.log().mean(0))


@pytest.mark.parametrize("loss", ["smoothed", "cross_entropy"])
@pytest.mark.parametrize(("estimator", "reduction"), ESTIMATORS)
def test_it_learns_what_can_be_told_apart(loss, estimator, reduction):
    """Dark against bright images, far apart for sigma and epsilon: noisy accuracy becomes high."""
    labels = torch.arange(60) % 2
    images = torch.randint(0, 60, (60, 2, 4, 4), generator=generator(), dtype=torch.uint8)
    images += (labels * 180).view(-1, 1, 1, 1).to(torch.uint8)
    data = ClientData(images, labels, 255)
    plan = make_plan(
        attack={"estimator": estimator, "variance_reduction": reduction},
        local_steps=30,
        batch_size=20,
        loss=loss,
    )
    model = make_model()
    first = local_train(model, data, plan, 1, 0)
    second = local_train(model, data, plan, 2, 0)
    assert second.loss < first.loss
    assert second.accuracy > 0.95


# --- what a device can do


def in_double(plan, limits):
    data = make_data()
    model = make_model().double()
    metrics = local_train(model, data, plan, 1, 0, limits)
    return model.state_dict(), metrics


@pytest.mark.parametrize("loss", ["smoothed", "cross_entropy"])
@pytest.mark.parametrize(("estimator", "reduction"), ESTIMATORS)
@pytest.mark.parametrize("max_batch", [2, 3, 4, 8, 9])
def test_divided_mini_batches_train_the_same_model(max_batch, estimator, reduction, loss):
    """5 images of 2 copies: parts of 1, 2 or 4 images, the last one smaller."""
    attack = {"step_size": 1.0, "estimator": estimator, "variance_reduction": reduction}
    plan = make_plan(attack=attack, loss=loss, weight_decay=0.01)
    whole, expected = in_double(plan, DeviceLimits())
    parts, metrics = in_double(plan, DeviceLimits(max_batch=max_batch))
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-10)
    assert metrics.loss == pytest.approx(expected.loss, rel=1e-5)
    assert metrics.accuracy == pytest.approx(expected.accuracy, rel=1e-5)


@pytest.mark.parametrize(("sigma", "copies"), [(0.25, 3), (0.0, 1)])
def test_no_pass_is_larger_than_what_fits(sigma, copies):
    model = make_model()
    calls = record_inputs(model)
    plan = make_plan(sigma=sigma, num_noise_vectors=3)
    local_train(model, make_data(), plan, 1, 0, DeviceLimits(max_batch=2 * copies))
    assert {len(x) for _, x in calls} == {2 * copies, copies}


def test_what_fits_whole_is_not_divided():
    plan = make_plan()
    model = make_model()
    local_train(model, make_data(), plan, 1, 0, DeviceLimits(max_batch=10))
    assert equal(model.state_dict(), state_after(plan))


def test_a_device_with_few_samples_need_not_divide_its_smaller_mini_batch():
    model = nn.Sequential(nn.BatchNorm2d(2), make_model())
    plan = make_plan(batch_size=100, local_steps=1)
    local_train(model, make_data(3), plan, 1, 0, DeviceLimits(max_batch=6))


def test_batch_normalisation_cannot_be_divided():
    model = nn.Sequential(nn.BatchNorm2d(2), make_model())
    with pytest.raises(ConfigError, match=r"batch normalisation.*max-batch=10 or more"):
        local_train(model, make_data(), make_plan(), 1, 0, DeviceLimits(max_batch=9))


def test_one_image_and_its_copies_must_fit():
    plan = make_plan(num_noise_vectors=4)
    with pytest.raises(ConfigError, match="max-batch=3 has no room for the 4 noisy copies"):
        local_train(make_model(), make_data(), plan, 1, 0, DeviceLimits(max_batch=3))


@pytest.mark.parametrize("estimator", ["stochastic", "one_point"])
def test_bfloat16_is_near_and_leaves_float32_weights(estimator):
    attack = {"step_size": 1.0, "estimator": estimator}
    plan = make_plan(attack=attack)
    model = make_model()
    metrics = local_train(model, make_data(), plan, 1, 0, DeviceLimits(bf16=True))
    expected = state_after(plan)
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())
    assert not equal(model.state_dict(), expected)
    torch.testing.assert_close(model.state_dict(), expected, rtol=0.1, atol=0.02)
    assert math.isfinite(metrics.loss)
