"""What of the CUDA engine needs no CUDA: how a cohort is divided, and the whole path on a stand-in.

The stand-in computes on the CPU. Its graphs take a step again when they are replayed, on the tensors that
the step was captured with: what was not copied into these, or moved since, shows in the result.
"""

import contextlib
import time

import pytest
import torch
from networks import NETWORKS, make_data, make_model
from torch import nn

from fedsmooth_core.cohort import CohortTrainer, Member, cuda, trainer
from fedsmooth_core.cohort.cuda import clients_that_fit
from fedsmooth_core.cohort.local_training import LocalStep
from fedsmooth_core.config import AttackConfig, SmoothingConfig, TrainingConfig, TrainingPlan
from fedsmooth_core.training import local_train

GIB = 2**30


@pytest.mark.parametrize(
    ("free", "num_clients", "expected"),
    [
        (200, 100, 100),  # room for all
        (100, 100, 50),  # (.8 * 100 - .8) GiB have room for 79: two chunks, equal ones
        (27, 50, 17),  # for 20: three chunks
        (13, 100, 9),  # for 9
        (1, 100, 1),  # for none: one is tried, and says what it lacks
        (200, 1, 1),
    ],
)
def test_a_cohort_is_divided_into_equal_chunks_that_fit(monkeypatch, free, num_clients, expected):
    """Clients of 1 GiB; what PyTorch holds without using it is free, too."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: ((free - 1) * GIB, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2 * GIB)
    kept = int(0.8 * GIB)
    assert clients_that_fit(num_clients, GIB, kept, torch.device("cuda")) == expected


class Stream:
    def __init__(self, *_):
        pass

    def wait_stream(self, other):
        pass


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.at - self.at


class Graph:
    def __init__(self):
        self.steps = []

    def replay(self):
        for step, arguments in self.steps:
            STEP(step, *arguments)


STEP = LocalStep.__call__


class StandIn:
    """torch.cuda as far as the engine uses it, with memory for so many clients."""

    def __init__(self, monkeypatch, room=1000):
        self.captures, self.asked, self.capturing = [], [], None
        self.fails_to_capture, self.largest = False, 1000
        replaced = {
            "Stream": Stream,
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": self.graph,
            "current_stream": Stream,
            "stream": contextlib.nullcontext,
            "device": contextlib.nullcontext,
            "graph_pool_handle": lambda: None,
            "empty_cache": lambda: None,
            "reset_peak_memory_stats": lambda _: None,
            "memory_allocated": lambda _: 0,
            "max_memory_allocated": lambda _: 0,
        }
        for name, what in replaced.items():
            monkeypatch.setattr(torch.cuda, name, what)

        def fitting(num_clients, per_client, kept, device):
            self.asked.append((num_clients, per_client, kept))
            return min(num_clients, room)

        def step(step, num_active, *inputs):
            if num_active > self.largest:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            if self.capturing is None:
                STEP(step, num_active, *inputs)
            else:
                self.capturing.steps.append((step, (num_active, *inputs)))

        way = cuda.FastestWay
        monkeypatch.setattr(trainer, "clients_that_fit", fitting)
        monkeypatch.setattr(
            trainer, "FastestWay", lambda k, n, dtype, _: way(k, n, dtype, torch.device("cpu"))
        )
        monkeypatch.setattr(LocalStep, "__call__", step)

    @contextlib.contextmanager
    def graph(self, graph, pool, stream):
        if self.fails_to_capture:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.capturing = graph
        yield
        self.capturing = None
        self.captures.append(graph.steps[0][1][0])


def make_plan(**training):
    settings = {"local_steps": 4, "batch_size": 5, "learning_rate": 0.05, "momentum": 0.9}
    return TrainingPlan(
        seed=3,
        smoothing=SmoothingConfig(sigma=0.25),
        attack=AttackConfig(step_size=0.5),
        training=TrainingConfig(**(settings | training)),
    )


def make_members(steps):
    return [Member(k, make_data(12, seed=k), local_steps=own) for k, own in enumerate(steps)]


def train_and_compare(engine_trainer, model, name, members, plan, server_round=1):
    state = dict(make_model(name, seed=server_round).state_dict())
    results = dict(engine_trainer.train(model, state, members, plan, server_round))
    for place, member in enumerate(members):
        alone = make_model(name, seed=server_round)
        metrics = local_train(
            alone, member.data, member.own_plan(plan), server_round, member.client
        )
        assert not isinstance(results[place], Exception), results[place]
        torch.testing.assert_close(
            results[place].state, dict(alone.state_dict()), rtol=0, atol=1e-10
        )
        assert results[place].metrics.loss == pytest.approx(metrics.loss, rel=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("engine", ["auto", "vmap"])
def test_kept_graphs_train_round_after_round_as_the_plain_loop(monkeypatch, name, engine):
    stand_in = StandIn(monkeypatch)
    own = CohortTrainer(torch.device("cuda"), engine, is_kept=True)
    model, members = make_model(name), make_members([4, 1, 4, 2])
    for server_round in (1, 2, 3):
        train_and_compare(own, model, name, members, make_plan(), server_round)
    # Once for each number of clients that still train, the largest first.
    assert stand_in.captures == [4, 3, 2]
    assert len(stand_in.asked) == 1


def test_chunks_share_one_stack_and_its_graphs(monkeypatch):
    stand_in = StandIn(monkeypatch, room=3)
    own = CohortTrainer(torch.device("cuda"), is_kept=True)
    model, members = make_model("residual"), make_members([None] * 8)
    for server_round in (1, 2):
        train_and_compare(own, model, "residual", members, make_plan(), server_round)
    assert stand_in.captures == [3, 2]
    num_clients, per_client, kept = stand_in.asked[0]
    own_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert (num_clients, kept) == (8, 8 * own_bytes)
    assert per_client > 4 * 2 * 5 * model[0].mean.new_empty(2, 12, 12).nbytes  # the round's noise


def test_only_the_newest_graphs_are_kept(monkeypatch):
    StandIn(monkeypatch)
    monkeypatch.setattr(cuda, "_MOST_GRAPHS", 2)
    own = CohortTrainer(torch.device("cuda"), is_kept=True)
    model = make_model()
    for server_round, sizes in enumerate([[None] * 3, [None] * 2, [None], [None] * 3], start=1):
        train_and_compare(
            own, model, "alexnet-like", make_members(sizes), make_plan(), server_round
        )


def test_a_step_that_no_graph_takes_is_taken_one_by_one(monkeypatch):
    stand_in = StandIn(monkeypatch)
    stand_in.fails_to_capture = True
    own = CohortTrainer(torch.device("cuda"), is_kept=True)
    model, members = make_model(), make_members([None] * 3)
    with pytest.warns(RuntimeWarning, match="cannot be captured in a CUDA graph"):
        train_and_compare(own, model, "alexnet-like", members, make_plan())
    train_and_compare(own, model, "alexnet-like", members, make_plan(), 2)


def test_memory_that_is_gone_meanwhile_halves_the_chunks(monkeypatch):
    stand_in = StandIn(monkeypatch)
    own = CohortTrainer(torch.device("cuda"), is_kept=True)
    model, members = make_model(), make_members([None] * 5)
    stand_in.largest = 2
    train_and_compare(own, model, "alexnet-like", members, make_plan())
    train_and_compare(own, model, "alexnet-like", members, make_plan(), 2)


def test_a_device_of_one_message_captures_and_times_nothing(monkeypatch):
    stand_in = StandIn(monkeypatch)
    monkeypatch.setattr(trainer, "FastestWay", None)
    own = CohortTrainer(torch.device("cuda"))
    train_and_compare(own, make_model(), "alexnet-like", make_members([None]), make_plan())
    assert stand_in.captures == stand_in.asked == []


class Scaled(nn.Module):
    def forward(self, x):
        return 2 * x


def test_a_model_of_unknown_layers_is_mapped(monkeypatch):
    stand_in = StandIn(monkeypatch)
    model = nn.Sequential(nn.Flatten(), nn.Linear(288, 4), Scaled()).double()
    own = CohortTrainer(torch.device("cuda"), is_kept=True)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    members, plan = make_members([None] * 3), make_plan()
    results = dict(own.train(model, state, members, plan, 1))
    assert stand_in.captures == [3]
    for place, member in enumerate(members):
        alone = nn.Sequential(nn.Flatten(), nn.Linear(288, 4), Scaled()).double()
        alone.load_state_dict(state)
        local_train(alone, member.data, plan, 1, member.client)
        torch.testing.assert_close(
            results[place].state, dict(alone.state_dict()), rtol=0, atol=1e-10
        )


def test_what_neither_way_computes_trains_by_the_plain_loop(monkeypatch):
    StandIn(monkeypatch)
    model = nn.Sequential(
        nn.BatchNorm2d(2, momentum=None), nn.Flatten(), nn.Linear(288, 4)
    ).double()
    own = CohortTrainer(torch.device("cuda"), is_kept=True)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (result,) = dict(own.train(model, state, make_members([None]), make_plan(), 1)).values()
    model.load_state_dict(state)
    local_train(model, make_members([None])[0].data, make_plan(), 1, 0)
    assert all(torch.equal(result.state[name], v) for name, v in model.state_dict().items())


def test_the_fastest_way_is_the_one_that_the_clock_says(monkeypatch):
    StandIn(monkeypatch)
    shape = cuda.ConvShape(2, 3, 3, 1, 1, 2, 2)
    way = cuda.FastestWay(2, 3, torch.float32, torch.device("cpu"))
    for wanted in cuda.candidates(shape):

        def seconds(self, each, _, wanted=wanted):
            return 0.0 if type(each) is type(wanted) else 1.0

        monkeypatch.setattr(cuda.FastestWay, "_seconds", seconds)
        way._chosen.clear()
        assert type(way(shape)) is type(wanted)
