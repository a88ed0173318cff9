import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from fedsmooth_core.config import from_flat, to_flat
from fedsmooth_core.errors import ConfigError
from fedsmooth_core.models import ModelSpec, Normalise, build_model, register, registry

CIFAR = (3, 32, 32)
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


def make_spec(name, shape=CIFAR, init="he", num_classes=10):
    return ModelSpec(name, init, num_classes, *shape)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_model(name, shape=CIFAR, init="he", seed=0, num_classes=10):
    spec = make_spec(name, shape, init, num_classes)
    return build_model(spec, MEAN[: shape[0]], STD[: shape[0]], generator(seed))


def num_parameters(model):
    return sum(weight.numel() for weight in model.parameters())


def conv_parameters(in_channels, out_channels, kernel, bias=True):
    return out_channels * (in_channels * kernel**2 + bias)


def resnet_parameters(n):
    total, width = conv_parameters(3, 16, 3, bias=False) + 2 * 16, 16
    for out in (16, 32, 64):
        for _ in range(n):
            total += conv_parameters(width, out, 3, bias=False) + 2 * out
            total += conv_parameters(out, out, 3, bias=False) + 2 * out
            if width != out:
                total += conv_parameters(width, out, 1, bias=False) + 2 * out
            width = out
    return total + 64 * 10 + 10


def test_alexnet_has_the_2_47_million_parameters_of_its_formula():
    convolutions = ((3, 64, 11), (64, 192, 5), (192, 384, 3), (384, 256, 3), (256, 256, 3))
    expected = sum(conv_parameters(*shape) for shape in convolutions) + 256 * 10 + 10
    assert num_parameters(make_model("alexnet")) == expected == 2_472_266


@pytest.mark.parametrize(
    ("name", "n", "total"), [("resnet20", 3, 272_474), ("resnet110", 18, 1_730_714)]
)
def test_resnets_have_the_parameters_of_their_formula(name, n, total):
    assert num_parameters(make_model(name)) == resnet_parameters(n) == total


def test_resnet_depth_counts_6n_plus_2_weighted_layers():
    for name, depth in (("resnet20", 20), ("resnet110", 110)):
        layers = [
            module
            for module in make_model(name).modules()
            if isinstance(module, nn.Linear)
            or (isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3))
        ]
        assert len(layers) == depth


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("alexnet", CIFAR),
        ("alexnet", (1, 32, 32)),
        ("resnet20", CIFAR),
        ("resnet20", (3, 8, 8)),
        ("resnet20", (1, 28, 28)),
        ("resnet20", (3, 40, 24)),
        ("resnet110", CIFAR),
        ("small_cnn", (1, 8, 8)),
        ("small_cnn", (1, 28, 28)),
        ("small_cnn", (3, 9, 17)),
        ("small_cnn", CIFAR),
    ],
)
def test_logits_have_one_row_per_image_and_one_column_per_class(name, shape):
    model = make_model(name, shape, num_classes=7).eval()
    logits = model(torch.rand(2, *shape, generator=generator()))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


def test_small_cnn_stays_small():
    assert 30_000 <= num_parameters(make_model("small_cnn", (1, 8, 8))) <= 100_000
    assert 30_000 <= num_parameters(make_model("small_cnn")) <= 100_000
    assert not any(isinstance(m, nn.BatchNorm2d) for m in make_model("small_cnn").modules())


@pytest.mark.parametrize(
    ("name", "shape", "allowed"),
    [
        ("alexnet", (3, 28, 28), "32x32"),
        ("resnet20", (3, 7, 32), "8x8"),
        ("small_cnn", (1, 8, 7), "8x8"),
        ("small_cnn", (3, 64, 64), "32x32"),
        ("vgg", CIFAR, "alexnet, resnet110, resnet20, small_cnn"),
    ],
)
def test_what_cannot_be_built_says_what_can(name, shape, allowed):
    with pytest.raises(ConfigError, match=f"model.name='{name}'.*allowed.*{allowed}"):
        make_model(name, shape)


def test_an_unknown_initialisation_says_which_there_are():
    with pytest.raises(ConfigError, match=r"model.init='xavier'.*default, he"):
        make_model("small_cnn", init="xavier")


@pytest.mark.parametrize("init", ["he", "default"])
@pytest.mark.parametrize(("name", "shape"), [("alexnet", CIFAR), ("resnet20", (3, 8, 8))])
def test_weights_depend_on_the_generator_alone(name, shape, init):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = make_model(name, shape, init, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = make_model(name, shape, init, seed=5).state_dict()
    other = make_model(name, shape, init, seed=6).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("init", ["he", "default"])
def test_building_advances_the_generator(init):
    shared = generator()
    spec = make_spec("small_cnn", (1, 8, 8), init)
    first, second = (build_model(spec, MEAN[:1], STD[:1], shared).state_dict() for _ in range(2))
    key = "network.0.weight"
    assert not torch.equal(first[key], second[key])


def test_a_failed_build_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    with pytest.raises(ConfigError):
        make_model("alexnet", (3, 8, 8))
    assert torch.equal(torch.get_rng_state(), before)


def test_he_draws_kaiming_normal_by_fan_out_with_zero_biases():
    model = make_model("alexnet")
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            expected = math.sqrt(2 / (module.out_channels * module.kernel_size[0] ** 2))
        elif isinstance(module, nn.Linear):
            expected = math.sqrt(1 / module.in_features)
        else:
            continue
        num = module.weight.numel()
        # The relative standard error of a normal sample's deviation is 1 / sqrt(2 num).
        assert module.weight.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * num))
        assert abs(module.weight.mean().item()) < 5 * expected / math.sqrt(num)
        kurtosis = (module.weight / expected).pow(4).mean().item()
        assert kurtosis == pytest.approx(3, abs=5 * math.sqrt(96 / num))
        assert module.bias.count_nonzero() == 0


def test_default_draws_pytorchs_uniform_in_one_over_root_fan_in():
    for module in make_model("alexnet", init="default").modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            bound = 1 / math.sqrt(module.weight[0].numel())
            num = module.weight.numel()
            assert module.weight.abs().max().item() <= bound
            assert module.weight.std().item() == pytest.approx(
                bound / math.sqrt(3), rel=5 / math.sqrt(num)
            )
            assert module.bias.abs().max().item() <= bound
            assert module.bias.count_nonzero() > 0


def test_default_equals_what_pytorch_itself_would_draw():
    ours = make_model("small_cnn", (1, 8, 8), "default", seed=3)[1]
    torch.manual_seed(3)
    theirs = nn.Conv2d(1, 32, kernel_size=3, padding=1)
    assert torch.equal(ours[0].weight, theirs.weight)


@pytest.mark.parametrize("init", ["he", "default"])
def test_batch_normalisation_starts_as_the_identity(init):
    norms = [
        m for m in make_model("resnet20", init=init).modules() if isinstance(m, nn.BatchNorm2d)
    ]
    assert norms
    for norm in norms:
        assert (norm.weight == 1).all()
        assert (norm.bias == 0).all()
        assert (norm.running_mean == 0).all()
        assert (norm.running_var == 1).all()


def test_the_first_layer_normalises_images_in_0_1():
    model = make_model("alexnet")
    assert isinstance(model[0], Normalise)
    images = torch.rand(2, *CIFAR, generator=generator())
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    assert torch.equal(model[0](images), (images - mean) / std)
    assert torch.equal(model(images), model[1]((images - mean) / std))


def test_weights_that_travel_carry_their_normalisation():
    source = make_model("small_cnn")
    target = build_model(make_spec("small_cnn"), (0, 0, 0), (1, 1, 1), generator(9))
    state = source.state_dict()
    assert state["normalise.mean"].dtype == state["normalise.std"].dtype == torch.float32
    target.load_state_dict(state)
    images = torch.rand(3, *CIFAR, generator=generator())
    assert torch.equal(source(images), target(images))


@pytest.mark.parametrize(
    ("mean", "std", "reason"),
    [
        ((0.5,), (0.5,), "1 values.*3 channels"),
        (MEAN, (0.5,), "std has 1 values"),
        ((0.5, 0.5, math.nan), STD, "mean.*finite"),
        (MEAN, (0.5, 0.5, 0.0), "std.*> 0"),
        (MEAN, (0.5, 0.5, math.inf), "std.*finite"),
    ],
)
def test_a_normalisation_that_does_not_fit_is_refused(mean, std, reason):
    with pytest.raises(ConfigError, match=reason):
        build_model(make_spec("small_cnn"), mean, std, generator())


def test_alexnet_pools_after_convolutions_1_2_and_5():
    x = torch.rand(2, *CIFAR, generator=generator())
    network = make_model("alexnet")[1]
    convolutions = [module for module in network if isinstance(module, nn.Conv2d)]
    expected = x
    for index, convolution in enumerate(convolutions, start=1):
        expected = convolution(expected).relu()
        if index in (1, 2, 5):
            expected = nn.functional.max_pool2d(expected, 2)
    assert torch.equal(network(x), network[-1](expected.flatten(1)))


def test_resnet_at_32x32_has_cohens_8x8_average_pool():
    network = make_model("resnet20")[1].eval()
    x = torch.rand(2, *CIFAR, generator=generator())
    features = network.blocks(network.norm(network.conv(x)).relu())
    assert features.shape == (2, 64, 8, 8)
    expected = network.classifier(nn.functional.avg_pool2d(features, 8).flatten(1))
    torch.testing.assert_close(network(x), expected)


def test_a_user_adds_an_architecture_in_a_few_lines(monkeypatch):
    monkeypatch.setattr(registry, "_ARCHITECTURES", dict(registry._ARCHITECTURES))

    @register("linear")
    def linear(spec):
        pixels = spec.channels * spec.height * spec.width
        return nn.Sequential(nn.Flatten(), nn.Linear(pixels, spec.num_classes))

    assert make_model("linear", (1, 5, 5))(torch.rand(2, 1, 5, 5)).shape == (2, 10)
    with pytest.raises(ConfigError, match="already registered"):
        register("alexnet")(linear)


def test_a_spec_travels_flat():
    spec = make_spec("resnet110")
    assert from_flat(ModelSpec, to_flat(spec)) == spec
    with pytest.raises(ConfigError, match=r"model.num_classes=1 .*>= 2"):
        make_spec("resnet110", num_classes=1)


def test_small_cnn_learns_the_digits_quickly():
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=generator())
    train, test = order[:1400], order[1400:]
    model = build_model(make_spec("small_cnn", (1, 8, 8)), (0.31,), (0.38,), generator())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(120):
        batch = train[torch.randint(len(train), (64,), generator=generator(step))]
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean().item()
    assert accuracy > 0.95
