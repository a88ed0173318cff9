"""Stacked and mapped networks against the models they stand for."""

import copy

import pytest
import torch
from networks import CLASSES, NETWORKS, SHAPE, generator, make_model
from torch import nn

from fedsmooth_core.cohort.agreement import require_agreement
from fedsmooth_core.cohort.convolution import for_one_client
from fedsmooth_core.cohort.copies import by_client, by_copy
from fedsmooth_core.cohort.generic import MappedNetwork
from fedsmooth_core.cohort.network import StackedNetwork, UnknownLayerError
from fedsmooth_core.config import AttackConfig
from fedsmooth_core.models import ModelSpec, build_model
from fedsmooth_core.smoothing import noisy_logits

NUM_CLIENTS, BATCH = 3, 4


def make_network(kind, name, num_clients=NUM_CLIENTS):
    model = make_model(name)
    if kind == "mapped":
        return MappedNetwork(model, num_clients)
    return StackedNetwork(model, SHAPE, num_clients, for_one_client(AttackConfig()))


def models_of(network, name):
    """Clients with weights of their own, in the network and as models."""
    models = [make_model(name, seed=1 + client) for client in range(network.num_clients)]
    alone = make_network("stacked", name, 1)
    if isinstance(network, MappedNetwork):
        alone = make_network("mapped", name, 1)
    for client, model in enumerate(models):
        alone.load(model.state_dict())
        parts = (network.weights, alone.weights), (network.buffers, alone.buffers)
        for ours, theirs in parts:
            for stack, tensor in zip(ours, theirs, strict=True):
                stack[client] = tensor[0]
    return models


def images(*shape, seed=0):
    return torch.rand(*shape, *SHAPE, generator=generator(seed), dtype=torch.float64)


kinds = pytest.mark.parametrize("kind", ["stacked", "mapped"])
names = pytest.mark.parametrize("name", NETWORKS)


@kinds
@names
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("num_active", [1, 2, NUM_CLIENTS])
def test_each_client_is_its_model_in_both_modes(kind, name, training, num_active):
    network = make_network(kind, name)
    models = models_of(network, name)
    x = images(num_active, BATCH)
    prepared = network.prepare([weight[:num_active] for weight in network.weights])
    logits = network.logits(prepared, x, training)
    expected = [model.train(training)(x[k]) for k, model in enumerate(models[:num_active])]
    torch.testing.assert_close(logits, torch.stack(expected), rtol=0, atol=1e-12)
    # Statistics, too; those of clients that took no part are as they were.
    for state, model in zip(network.states(NUM_CLIENTS), models, strict=True):
        assert list(state) == list(model.state_dict())
        torch.testing.assert_close(state, dict(model.state_dict()), rtol=0, atol=1e-12)


@kinds
@names
def test_all_clients_start_from_one_state_and_give_it_back(kind, name):
    network, state = make_network(kind, name), make_model(name, seed=7).state_dict()
    network.load(state)
    for client in network.states(NUM_CLIENTS):
        assert list(client) == list(state)
        for key, tensor in client.items():
            assert torch.equal(tensor, state[key])
            assert tensor.is_contiguous()
    # Later training does not change what was given back.
    given = network.states(NUM_CLIENTS)[0]
    for weight in network.weights:
        weight.zero_()
    assert all(torch.equal(given[key], state[key]) for key in state)


@kinds
@names
@pytest.mark.parametrize("sign", [1, -1])
def test_noisy_logits_are_those_of_each_noisy_copy(kind, name, sign):
    """Also of other noise than it was made for: antithetic estimates ask for -d."""
    network = make_network(kind, name)
    models = models_of(network, name)
    noise = images(2, NUM_CLIENTS * BATCH, seed=1) - 0.5
    x = images(NUM_CLIENTS * BATCH).requires_grad_()
    classifier = network.at_noise(network.prepare(network.weights), noise)
    logits = noisy_logits(classifier, x, noise if sign == 1 else -noise)
    expected = torch.cat(
        [
            noisy_logits(model.eval(), x[part], sign * noise[:, part])
            for model, part in zip(models, torch.arange(len(x)).split(BATCH), strict=True)
        ],
        dim=1,
    )
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    weights = torch.randn(logits.shape, generator=generator(2), dtype=torch.float64)
    gradients = [torch.autograd.grad((each * weights).sum(), x)[0] for each in (logits, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-11)


def test_copies_change_places_and_back():
    copies = torch.arange(2 * 6 * 5).view(2, 6, 5)  # m = 2, K = 3, B = 2
    stacked = by_client(copies, 3)
    assert stacked.shape == (3, 4, 5)
    assert torch.equal(stacked[1, :2], copies[0, 2:4])  # the second client's first copies
    assert torch.equal(by_copy(stacked, 2), copies)


def stacked(shape=SHAPE):
    """How a network is made of a model."""
    return lambda model: StackedNetwork(model, shape, 1, for_one_client(AttackConfig()))


@pytest.mark.parametrize("name", ["alexnet", "resnet20", "resnet110", "small_cnn"])
def test_every_architecture_of_the_registry_is_stacked(name):
    spec = ModelSpec(name, "he", 10, 3, 32, 32)
    model = build_model(spec, [0.5] * 3, [0.25] * 3, torch.Generator())
    require_agreement(stacked((3, 32, 32)), model, (3, 32, 32))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.scale


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.classifier = nn.Linear(288, CLASSES)

    def forward(self, x):
        return self.classifier(self.conv(self.conv(x)).flatten(1))


class AcrossImages(nn.Module):
    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(288, CLASSES)

    def forward(self, x):
        return self.classifier((x + x.mean(dim=0)).flatten(1))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(288, CLASSES)

    def forward(self, x):
        return self.classifier(x.flatten(1)) if x.sum() > 0 else x


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(Scaled(), nn.Flatten(), nn.Linear(288, CLASSES)),
        Reused(),
        AcrossImages(),
        Branching(),
        nn.Sequential(nn.Conv2d(2, 2, 3, groups=2), nn.Flatten(), nn.Linear(200, CLASSES)),
        nn.Sequential(nn.Flatten(), nn.Linear(288, CLASSES), nn.Dropout(0.5)),
        nn.Sequential(nn.BatchNorm2d(2, momentum=None), nn.Flatten(), nn.Linear(288, CLASSES)),
        nn.Sequential(nn.Flatten(2), nn.Flatten(), nn.Linear(288, CLASSES), nn.PReLU()),
    ],
    ids=[
        "weight outside a layer",
        "layer used twice",
        "statistics over images",
        "branch on data",
        "groups",
        "dropout",
        "cumulative average",
        "unknown layer",
    ],
)
def test_what_would_be_computed_wrongly_is_not_stacked(model):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnknownLayerError):
        require_agreement(stacked(), model, SHAPE)
    torch.testing.assert_close(model.state_dict(), before)


class KeepsStatistics(nn.Module):
    """Batch normalisation that is never trained, as somebody who fine-tunes has it."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(2)
        self.classifier = nn.Linear(288, CLASSES)

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x):
        return self.classifier(self.norm(x).flatten(1))


class OtherwiseInTraining(KeepsStatistics):
    def forward(self, x):
        return super().forward(x.relu() if self.training else x)


class ByBatchSize(KeepsStatistics):
    def forward(self, x):
        return super().forward(x if x.shape[0] <= 2 else x.tanh())


class InPlaceOnAView(KeepsStatistics):
    def forward(self, x):
        features = self.norm(x)
        nn.functional.relu(features.flatten(1), inplace=True)
        return self.classifier(features.flatten(1))


class ByKeyword(KeepsStatistics):
    def forward(self, x):
        return self.classifier(self.norm(input=x).flatten(1))


def frozen():
    model = NETWORKS["alexnet-like"]()
    model[0].weight.requires_grad_(False)
    return model


def watched():
    model = NETWORKS["alexnet-like"]()
    model[0].register_full_backward_hook(lambda module, inputs, outputs: None)
    return model


def watched_weight():
    model = NETWORKS["alexnet-like"]()
    model[0].weight.register_hook(lambda gradient: 2 * gradient)
    return model


@pytest.mark.parametrize(
    "make",
    [
        KeepsStatistics,
        OtherwiseInTraining,
        ByBatchSize,
        InPlaceOnAView,
        ByKeyword,
        frozen,
        watched,
        watched_weight,
    ],
)
def test_what_a_model_does_beside_its_layers_is_found_out(make):
    with pytest.raises(UnknownLayerError):
        require_agreement(stacked(), make(), SHAPE)


class SharesWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(288, 288)
        self.second = self.first
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def forward(self, x):
        return self.second(self.first(x.flatten(1)))[:, :CLASSES] * self.scale


@pytest.mark.parametrize(
    "model",
    [
        SharesWeights(),
        nn.Sequential(nn.Flatten(), nn.Linear(288, CLASSES), nn.Dropout(0.5)),
        nn.Sequential(nn.BatchNorm2d(2, momentum=None), nn.Flatten(), nn.Linear(288, CLASSES)),
    ],
    ids=["shared", "dropout", "cumulative average"],
)
def test_what_vmap_cannot_map_is_found_out(model):
    with pytest.raises(UnknownLayerError):
        require_agreement(lambda each: MappedNetwork(each, 2), model, SHAPE)


@names
def test_what_vmap_can_map_is_found_to_agree(name):
    require_agreement(lambda each: MappedNetwork(each, 2), make_model(name), SHAPE)
