import copy
import threading

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from known_classifiers import with_statistics
from torch import nn

from fedsmooth_core.certification.fold import folded
from fedsmooth_core.models import ModelSpec, build_model


def norms_in(model):
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def differ(model, x):
    """How far the scores of a float64 model and of its folded form are apart, relative above 1."""
    with torch.no_grad():
        scores, others = model.eval()(x), folded(model)(x)
    return float((scores - others).abs().max() / scores.abs().max().clamp(min=1))


@pytest.mark.parametrize("name", ["resnet20", "resnet110"])
def test_a_resnet_is_the_same_function_without_batch_normalisation(name):
    spec = ModelSpec(name, "he", 10, 3, 16, 16)
    model = build_model(spec, (0.5,) * 3, (0.2,) * 3, torch.Generator().manual_seed(1))
    model = with_statistics(model).double()
    x = torch.rand((4, 3, 16, 16), dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    assert differ(model, x) < 1e-12
    assert norms_in(folded(model)) == 0
    assert norms_in(model) > 0
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


class Drawn(nn.Module):
    """Convolutions with batch normalisation, ReLU and a shortcut, as hypothesis wants them."""

    def __init__(self, widths, stride, groups, bias, affine, padding_mode, branch):
        super().__init__()
        self.first = nn.Conv2d(3, widths[0] * groups, 3, padding=1, bias=bias)
        self.norm = nn.BatchNorm2d(widths[0] * groups, affine=affine, eps=0.01)
        self.second = nn.Conv2d(
            widths[0] * groups,
            widths[1] * groups,
            3,
            stride=stride,
            padding=1,
            groups=groups,
            bias=bias,
            padding_mode=padding_mode,
        )
        self.norms = nn.ModuleList([nn.BatchNorm2d(widths[1] * groups, affine=affine)])
        self.relu = nn.ReLU()
        self.branch = branch

    def forward(self, x):
        first = self.first(x)
        out = self.relu(self.norm(first))
        out = self.norms[0](self.second(out))
        # Where the convolution's own output is wanted too, batch normalisation stays.
        return torch.relu(out).flatten(1).sum(1) + (first.sum((1, 2, 3)) if self.branch else 0)


@settings(max_examples=40, deadline=None)
@given(
    widths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.integers(1, 2),
    groups=st.integers(1, 3),
    bias=st.booleans(),
    affine=st.booleans(),
    padding_mode=st.sampled_from(["zeros", "reflect", "circular"]),
    branch=st.booleans(),
    size=st.tuples(st.integers(3, 9), st.integers(3, 9)),
)
def test_any_small_net_is_the_same_function(size, branch, **options):
    torch.manual_seed(4)
    model = with_statistics(Drawn(branch=branch, **options)).double()
    assert differ(model, torch.randn((3, 3, *size), dtype=torch.float64)) < 1e-12
    assert norms_in(folded(model)) == (1 if branch else 0)


def test_a_relu_overwrites_nothing_that_is_read_again():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            out = self.norm(self.conv(x))
            return nn.functional.relu(out).flatten(1) + 2 * out.flatten(1) + torch.relu(x).sum()

    x = torch.randn((2, 3, 6, 6), dtype=torch.float64)
    given = x.clone()
    assert differ(with_statistics(Twice()).double(), x) < 1e-12
    torch.testing.assert_close(x, given, rtol=0, atol=0)


def test_a_convolution_of_two_users_has_a_fold_for_each():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.one, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.other(self.conv(self.one(self.conv(x)))).flatten(1)

    model = with_statistics(Shared()).double()
    assert differ(model, torch.randn((2, 3, 5, 5), dtype=torch.float64)) < 1e-12
    assert norms_in(folded(model)) == 0


def test_statistics_of_the_batch_are_left_to_the_batch():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    model = model.double()
    assert differ(model, torch.randn((5, 3, 6, 6), dtype=torch.float64)) == 0
    assert norms_in(folded(model)) == 1


def test_what_cannot_be_traced_is_copied():
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

        def forward(self, x):
            return self.layers(x if x.mean() > 0 else -x).flatten(1)

    model = with_statistics(Untraceable()).double()
    copied = folded(model)
    assert type(copied) is Untraceable
    assert copied is not model
    assert differ(model, torch.randn((5, 3, 6, 6), dtype=torch.float64)) == 0


def test_models_of_other_threads_compute_on_and_fold_meanwhile():
    """torch.fx takes over the calls of every module in the process while it traces."""
    stop, failures, num_norms = threading.Event(), [], []
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def guarded(work):
        try:
            while not stop.is_set():
                work()
        except Exception as error:
            failures.append(error)

    def fold():
        num_norms.append(sum(isinstance(m, nn.BatchNorm2d) for m in folded(net).modules()))

    def compute():
        other(torch.rand(2, 3, 8, 8))

    threads = [
        threading.Thread(target=guarded, args=(work,)) for work in (compute, fold, compute, fold)
    ]
    for thread in threads:
        thread.start()
    stop.wait(1.0)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(num_norms) >= 10
    assert set(num_norms) == {0}


class KeepsTraining(nn.Module):
    """Batch normalisation that stays in training mode, whatever it is told."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def train(self, mode=True):
        super().train(mode)
        self.norm.training = True
        return self

    def forward(self, x):
        return self.norm(self.conv(x))


class ByKeyword(KeepsTraining):
    def train(self, mode=True):
        return nn.Module.train(self, mode)

    def forward(self, x):
        return self.norm(input=self.conv(x))


class NamesThatMeet(nn.Module):
    """conv a with norm b_c, and conv a_b with norm c; and a layer with a name that looks made up."""

    def __init__(self):
        super().__init__()
        self.a, self.b_c = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
        self.a_b, self.c = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
        self.a_b_c = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.a_b_c(self.c(self.a_b(self.b_c(self.a(x)))))


def with_hook(place):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    module = model if place is None else model[place]
    module.register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


def with_spectral_norm():
    return nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))


@pytest.mark.parametrize(
    "make",
    [
        KeepsTraining,
        ByKeyword,
        NamesThatMeet,
        lambda: with_hook(None),
        lambda: with_hook(0),
        lambda: with_hook(1),
        with_spectral_norm,
    ],
    ids=["training", "keyword", "names", "hook", "hook of conv", "hook of norm", "spectral norm"],
)
def test_what_is_more_than_a_convolution_and_its_norm_stays_what_it_is(make):
    torch.manual_seed(0)
    with torch.no_grad():  # spectral norm leaves a weight with a graph, which nobody can copy
        model = with_statistics(make().double())
    x = torch.rand(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.eval()(x)
        torch.testing.assert_close(folded(model)(x), expected, rtol=0, atol=1e-12)
