"""What a recorded pass says about a model."""

import threading

import pytest
import torch
from torch import Tensor, nn

from fedsmooth_core.models.recording import UnreadableModelError, record


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.shortcut = nn.Sequential()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        out = nn.functional.relu(self.conv(x), inplace=False)
        out += self.shortcut(x)
        assert out.shape[0] == 2  # sizes are no steps
        return self.linear(out.mean(dim=(2, 3)))


def test_layers_and_functions_are_noted_with_what_they_take():
    model = Block()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls = record(model, (3, 4, 5))
    assert [call.target for call in calls] == [
        "conv",
        nn.functional.relu,
        Tensor.add_,
        Tensor.mean,
        "linear",
    ]
    # The addition in place takes relu's value and the image; what follows takes its result.
    assert [call.inputs for call in calls] == [(0,), (1,), (2, 0), (3,), (4,)]
    assert calls[0].args[0].shape == (2, 3, 4, 5)
    assert calls[-1].output.shape == (2, 2)
    assert model.training
    torch.testing.assert_close(model.state_dict(), before)
    assert "forward" not in vars(model.conv)


class Parameterised(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.scale


class Two(nn.Module):
    def forward(self, x):
        return x.relu(), x


class Constant(nn.Module):
    def forward(self, x):
        x.relu()
        return x


@pytest.mark.parametrize(
    "model", [Parameterised(), Two(), Constant(), nn.Linear(7, 2), nn.Sequential()]
)
def test_a_model_that_is_no_chain_of_values_is_refused(model):
    with pytest.raises(UnreadableModelError):
        record(model, (3, 4, 4))


def test_other_threads_are_not_recorded():
    go_on, stop = threading.Event(), threading.Event()
    other = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    failures = []

    def busy():
        try:
            while not stop.is_set():
                other(torch.rand(1, 3, 4, 4))
                go_on.set()
        except Exception as error:
            failures.append(error)
            go_on.set()

    thread = threading.Thread(target=busy)
    thread.start()
    go_on.wait(10)
    lengths = {len(record(Block(), (3, 4, 4))) for _ in range(20)}
    stop.set()
    thread.join()
    assert lengths == {5}
    assert failures == []
