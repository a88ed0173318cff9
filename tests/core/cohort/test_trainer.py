"""Every engine against the plain loop, and against itself in other company."""

import dataclasses
import itertools
import threading

import numpy as np
import pytest
import torch
from networks import NETWORKS, SHAPE, make_data, make_model
from torch import nn

from fedsmooth_core.cohort import CohortTrainer, Member
from fedsmooth_core.cohort.convolution import for_one_client
from fedsmooth_core.cohort.local_training import LocalStep, train_stacked
from fedsmooth_core.cohort.network import StackedNetwork
from fedsmooth_core.config import (
    AttackConfig,
    DatasetConfig,
    SmoothingConfig,
    TrainingConfig,
    TrainingPlan,
)
from fedsmooth_core.data import ClientData
from fedsmooth_core.errors import ConfigError, DataError
from fedsmooth_core.limits import DeviceLimits
from fedsmooth_core.training import local_train

CPU = torch.device("cpu")
ENGINES = {
    "one by one": {},
    "stacked": {"engine": "stacked", "max_clients": 3},
    "mapped": {"engine": "vmap", "max_clients": 3},
}
ESTIMATORS = [
    ("stochastic", "none"),
    ("one_point", "none"),
    ("one_point", "antithetic"),
    ("one_point", "leave_one_out"),
]
RULES = {"gradient": 0.1, "normalized": None}
OPTIMISERS = [(0.0, 0.0), (0.9, 0.0), (0.9, 0.01)]


def make_plan(attack=None, sigma=0.25, seed=3, dataset=None, num_noise_vectors=2, **training):
    training = {"local_steps": 4, "batch_size": 5, "learning_rate": 0.05} | training
    return TrainingPlan(
        seed=seed,
        dataset=DatasetConfig(**(dataset or {})),
        smoothing=SmoothingConfig(sigma=sigma, num_noise_vectors=num_noise_vectors),
        attack=AttackConfig(**(attack or {"step_size": 1.0})),
        training=TrainingConfig(**training),
    )


def shared_members(num_clients, size=12):
    """Clients that hold parts of one data set."""
    whole = make_data(40)
    rows = [np.arange(size) + 3 * client for client in range(num_clients)]
    return [Member(client, whole.subset(own)) for client, own in enumerate(rows)]


@pytest.fixture
def one_thread():
    """As many as a worker has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(engine, model, members, plan, server_round=2, device=CPU):
    trainer = CohortTrainer(device, **engine)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outcomes = dict(trainer.train(model, state, members, plan, server_round))
    trainer.close()
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    return [outcomes[place] for place in range(len(members))]


def assert_as_the_plain_loop(engine, name, members, plan, atol=1e-10):
    trained = train(engine, make_model(name), members, plan)
    for member, result in zip(members, trained, strict=True):
        model = make_model(name)
        metrics = local_train(model, member.data, member.own_plan(plan), 2, member.client)
        assert list(result.state) == list(model.state_dict())
        torch.testing.assert_close(result.state, dict(model.state_dict()), rtol=0, atol=atol)
        assert result.metrics.loss == pytest.approx(metrics.loss, rel=1e-5)
        assert result.metrics.accuracy == pytest.approx(metrics.accuracy, rel=1e-5)
        assert result.seconds > 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("momentum", "weight_decay"), OPTIMISERS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("estimator", "reduction"), ESTIMATORS)
def test_20_steps_in_float64_are_those_of_the_plain_loop(
    engine, estimator, reduction, rule, momentum, weight_decay
):
    plan = make_plan(
        {
            "estimator": estimator,
            "variance_reduction": reduction,
            "step_rule": rule,
            "step_size": RULES[rule],
        },
        local_steps=20,
        learning_rate=0.02,
        momentum=momentum,
        weight_decay=weight_decay,
    )
    assert_as_the_plain_loop(ENGINES[engine], "alexnet-like", shared_members(3), plan)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("loss", ["smoothed", "cross_entropy"])
def test_every_layer_and_loss_trains_as_in_the_plain_loop(engine, name, loss):
    assert_as_the_plain_loop(ENGINES[engine], name, shared_members(4), make_plan(loss=loss))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "settings",
    [
        {"sigma": 0.0},
        {"attack": {"attack_steps": 0}},
        {"sigma": 0.0, "attack": {"attack_steps": 0}},
        {"num_noise_vectors": 3},
        {"dataset": {"flip": True, "crop_padding": 2}},
        {"attack": {"attack_steps": 4, "step_rule": "normalized", "step_size": None}},
    ],
    ids=["no noise", "no attack", "neither", "m = 3", "augmented", "T = 4"],
)
def test_ablations_and_augmentation_are_those_of_the_plain_loop(engine, settings):
    plan = make_plan(**settings)
    assert_as_the_plain_loop(ENGINES[engine], "residual", shared_members(3), plan)


@pytest.mark.parametrize("engine", ENGINES)
def test_clients_may_take_different_numbers_of_steps(engine):
    steps = [3, None, 1, 6, 3]
    members = [
        dataclasses.replace(member, local_steps=own)
        for member, own in zip(shared_members(5), steps, strict=True)
    ]
    plan = make_plan(momentum=0.9)
    assert_as_the_plain_loop(ENGINES[engine], "residual", members, plan)


@pytest.mark.parametrize("engine", ENGINES)
def test_clients_may_hold_different_numbers_of_samples_of_their_own(engine):
    """Fewer than a mini-batch, exactly one, more; each in tensors of its own."""
    sizes = [12, 2, 5, 1, 7, 2]
    members = [Member(10 + k, make_data(size, seed=k)) for k, size in enumerate(sizes)]
    assert_as_the_plain_loop(ENGINES[engine], "alexnet-like", members, make_plan())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("workers", [None, 1, 2, 3])
def test_a_clients_result_does_not_depend_on_its_cohort_nor_on_the_worker(
    one_thread, engine, workers
):
    """To the bit on a CPU one by one; the chunks of stacked engines add in other orders."""
    settings, plan = ENGINES[engine], make_plan(momentum=0.9)
    members = shared_members(5)
    together = train(settings | {"workers": workers}, make_model("residual"), members, plan)
    for chosen in ([0], [3, 1], [4, 2, 1, 0]):
        part = [members[place] for place in chosen]
        results = train(settings, make_model("residual"), part, plan)
        for place, result in zip(chosen, results, strict=True):
            if engine == "one by one":
                assert result.metrics == together[place].metrics
                for name, tensor in result.state.items():
                    assert torch.equal(tensor, together[place].state[name])
            torch.testing.assert_close(result.state, together[place].state, rtol=0, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_kept_between_rounds_changes_nothing(engine):
    members, model = shared_members(3), make_model("residual")
    trainer = CohortTrainer(CPU, **ENGINES[engine])
    plans = [make_plan(momentum=0.9), make_plan(momentum=0.9), make_plan(seed=4)]
    for server_round, plan in enumerate(plans, start=1):
        state = dict(make_model("residual", seed=server_round).state_dict())
        kept = dict(trainer.train(model, state, members, plan, server_round))
        for place, member in enumerate(members):
            alone = make_model("residual", seed=server_round)
            local_train(alone, member.data, plan, server_round, member.client)
            torch.testing.assert_close(
                kept[place].state, dict(alone.state_dict()), rtol=0, atol=1e-10
            )


@pytest.mark.parametrize("engine", ENGINES)
def test_a_budget_that_grows_over_the_rounds_does_in_every_engine(engine):
    members, model = shared_members(2), make_model()
    attack = {"step_rule": "normalized", "step_size": None, "epsilon_255": 255}
    growing = make_plan(attack | {"warmup_rounds": 4})
    trainer = CohortTrainer(CPU, **ENGINES[engine])
    state = dict(make_model().state_dict())
    for server_round, budget in enumerate([63.75, 127.5, 191.25, 255, 255], start=1):
        kept = dict(trainer.train(model, state, members, growing, server_round))
        whole = make_plan(attack | {"epsilon_255": budget})
        for place, member in enumerate(members):
            alone = make_model()
            local_train(alone, member.data, whole, server_round, member.client)
            torch.testing.assert_close(
                kept[place].state, dict(alone.state_dict()), rtol=0, atol=1e-10
            )


def test_replies_of_one_round_outlive_the_next():
    members, model = shared_members(2), make_model()
    for settings in ENGINES.values():
        trainer, state = CohortTrainer(CPU, **settings), dict(make_model().state_dict())
        first = dict(trainer.train(model, state, members, make_plan(), 1))
        copies = [{k: v.clone() for k, v in first[k].state.items()} for k in first]
        dict(trainer.train(model, state, members, make_plan(), 2))
        for place, copied in zip(first, copies, strict=True):
            torch.testing.assert_close(first[place].state, copied, rtol=0, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("workers", [None, 2])
def test_a_client_without_samples_fails_alone(engine, workers):
    members = [*shared_members(2), Member(7, make_data(0)), *shared_members(1)]
    results = train(ENGINES[engine] | {"workers": workers}, make_model(), members, make_plan())
    assert isinstance(results[2], DataError)
    assert "no sample" in str(results[2])
    assert_close = torch.testing.assert_close
    assert_close(results[0].state, results[3].state, rtol=0, atol=1e-12)


def test_a_chunk_that_does_not_fit_is_halved(monkeypatch):
    """Simulated: a device on which two clients fit at once."""
    sizes = []

    def limited(step, take_step, state, members, *args):
        sizes.append(len(members))
        if len(members) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return train_stacked(step, take_step, state, members, *args)

    monkeypatch.setattr("fedsmooth_core.cohort.trainer.train_stacked", limited)
    engine = {"engine": "stacked", "max_clients": 5}
    results = train(engine, make_model(), shared_members(5), make_plan())
    assert sizes == [5, 3, 2, 1, 2]
    for result, member in zip(results, shared_members(5), strict=True):
        alone = make_model()
        local_train(alone, member.data, make_plan(), 2, member.client)
        torch.testing.assert_close(result.state, dict(alone.state_dict()), rtol=0, atol=1e-10)


def test_a_single_client_that_does_not_fit_is_told():
    class Large(nn.Module):
        def forward(self, x):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model = nn.Sequential(nn.Flatten(), nn.Linear(288, 4), Large()).double()
    (result,) = train({}, model, shared_members(1), make_plan())
    assert isinstance(result, torch.OutOfMemoryError)


class Odd(nn.Module):
    """Something that no stacked layer computes."""

    def forward(self, x):
        return x * 2 + 1


def test_a_model_of_unknown_layers_trains_all_the_same():
    model = nn.Sequential(nn.Flatten(), nn.Linear(288, 4), Odd()).double()
    plan, members = make_plan(), shared_members(3)
    for engine in ({}, {"workers": 2}, ENGINES["mapped"]):
        for member, result in zip(members, train(engine, model, members, plan), strict=True):
            alone = nn.Sequential(nn.Flatten(), nn.Linear(288, 4), Odd()).double()
            alone.load_state_dict(model.state_dict())
            local_train(alone, member.data, plan, 2, member.client)
            torch.testing.assert_close(result.state, dict(alone.state_dict()), rtol=0, atol=1e-10)
    for result in train({"engine": "stacked"}, model, members, plan):
        assert isinstance(result, ConfigError)
        assert "engine=stacked cannot train" in str(result)


def test_a_device_with_a_largest_batch_takes_the_plain_loop():
    plan, limits = make_plan(), DeviceLimits(max_batch=4)
    (result,) = train({"limits": limits}, make_model(), shared_members(1), plan)
    alone = make_model()
    local_train(alone, shared_members(1)[0].data, plan, 2, 0, limits)
    assert all(torch.equal(result.state[k], v) for k, v in alone.state_dict().items())
    for engine in ("stacked", "vmap"):
        with pytest.raises(ConfigError, match="cannot divide a mini-batch"):
            CohortTrainer(CPU, engine, limits)


def test_an_unknown_engine_is_named():
    with pytest.raises(ConfigError, match="engine='fast' is unknown"):
        CohortTrainer(CPU, "fast")


def test_it_neither_reads_nor_changes_global_random_state():
    model = make_model()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = train({"workers": 2}, model, shared_members(2), make_plan())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    second = train({"workers": 2}, model, shared_members(2), make_plan())
    assert all(torch.equal(first[0].state[k], v) for k, v in second[0].state.items())


def relative_error(state, exact, start):
    """||state - exact|| in shares of the update ||exact - start||."""
    error, update = (
        sum((one[k].double() - other[k].double()).square().sum().item() for k in exact) ** 0.5
        for one, other in ((state, exact), (exact, start))
    )
    return error / update


@pytest.mark.parametrize(
    ("limits", "tolerance"), [(DeviceLimits(), 5e-3), (DeviceLimits(bf16=True), 2.5e-2)]
)
@pytest.mark.parametrize("engine", ENGINES)
def test_float32_and_bfloat16_are_as_exact_as_the_plain_loop_in_them(engine, limits, tolerance):
    """In shares of the update, against the loop in float32 (float64 would draw other noise)."""
    plan = make_plan(local_steps=5, attack={"step_size": 0.01}, learning_rate=0.01, momentum=0.0)
    members, model = shared_members(8), make_model("alexnet-like", dtype=torch.float32)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    results = train(ENGINES[engine] | {"limits": limits}, model, members, plan)
    errors, errors_of_loop = [], []
    for member, result in zip(members, results, strict=True):
        exact, plain = (make_model("alexnet-like", dtype=torch.float32) for _ in range(2))
        local_train(exact, member.data, plan, 2, member.client)
        local_train(plain, member.data, plan, 2, member.client, limits)
        errors.append(relative_error(result.state, exact.state_dict(), start))
        errors_of_loop.append(relative_error(plain.state_dict(), exact.state_dict(), start))
        assert all(tensor.dtype == torch.float32 for tensor in result.state.values())
    # The first layer's shares of image and noise are rounded each: sqrt(3) times the loop's error there.
    assert np.mean(errors) <= max(tolerance, 3**0.5 * np.mean(errors_of_loop))
    assert not limits.bf16 or min(errors) > 1e-4


def test_a_step_leaves_clients_that_take_no_part_as_they_are():
    network = StackedNetwork(make_model(), SHAPE, 3, for_one_client(AttackConfig()))
    step = LocalStep(network, make_plan())
    step.start(make_model().state_dict())
    before = [weight.clone() for weight in network.weights]
    x = torch.rand(4, *SHAPE, dtype=torch.float64)
    step(2, x, torch.zeros(4, dtype=torch.int64), torch.rand(2, *x.shape, dtype=torch.float64))
    for weight, old in zip(network.weights, before, strict=True):
        assert torch.equal(weight[2], old[2])
        assert not torch.equal(weight[:2], old[:2])
    assert step.loss[2] == step.accuracy[2] == 0


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_on_cuda_every_engine_is_the_plain_loop(name, is_kept):
    device = torch.device("cuda")
    data = ClientData(
        *(tensor.to(device) for tensor in dataclasses.astuple(make_data(40))[:2]), 255
    )
    members = [Member(k, data.subset(np.arange(12) + 3 * k)) for k in range(5)]
    model, plan = make_model(name).to(device), make_plan(momentum=0.9, local_steps=20)
    steps = [20, 20, 7, 20, 1]
    members = [
        dataclasses.replace(member, local_steps=own)
        for member, own in zip(members, steps, strict=True)
    ]
    alone = []
    for member in members:
        own = make_model(name).to(device)
        local_train(own, member.data, member.own_plan(plan), 2, member.client)
        alone.append(dict(own.state_dict()))
    for engine, most in itertools.product(("auto", "vmap"), (None, 2)):
        settings = {"engine": engine, "is_kept": is_kept, "max_clients": most}
        results = train(settings, model, members, plan, device=device)
        for result, state in zip(results, alone, strict=True):
            assert all(tensor.is_cuda for tensor in result.state.values())
            torch.testing.assert_close(result.state, state, rtol=0, atol=1e-10)


@pytest.mark.gpu
@needs_cuda
def test_on_cuda_kept_graphs_follow_new_rounds_and_states():
    device = torch.device("cuda")
    data = ClientData(
        *(tensor.to(device) for tensor in dataclasses.astuple(make_data(40))[:2]), 255
    )
    members = [Member(k, data.subset(np.arange(12) + 3 * k)) for k in range(3)]
    model, plan = make_model("residual").to(device), make_plan(momentum=0.9)
    trainer = CohortTrainer(device, is_kept=True)
    for server_round in (1, 2, 3):
        start = make_model("residual", seed=server_round).to(device)
        results = dict(trainer.train(model, dict(start.state_dict()), members, plan, server_round))
        for place, member in enumerate(members):
            own = make_model("residual", seed=server_round).to(device)
            local_train(own, member.data, plan, server_round, member.client)
            torch.testing.assert_close(
                results[place].state, dict(own.state_dict()), rtol=0, atol=1e-10
            )


def test_members_with_other_images_are_told_apart():
    """One says 255 is white, the other 16; some share a data set, some do not."""
    own = make_data(12, seed=5)
    members = [
        *shared_members(2),
        Member(7, ClientData(own.images, own.labels, 16)),
        Member(8, own),
    ]
    assert_as_the_plain_loop(ENGINES["stacked"], "alexnet-like", members, make_plan())


class Counting(nn.Module):
    """Remembers, in no state, how often it was called."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.calls += 1
        return x * (1 + 0.1 * self.calls)


def test_no_client_leaves_anything_to_the_next():
    model = nn.Sequential(nn.Flatten(), nn.Linear(288, 4), Counting()).double()
    members, plan = shared_members(3), make_plan()
    together = train({}, model, members, plan)
    for member, result in zip(members, together, strict=True):
        (alone,) = train({}, model, [member], plan)
        assert all(torch.equal(result.state[k], v) for k, v in alone.state.items())


def test_closing_ends_the_workers_and_what_they_said_of_threads():
    before = torch.get_num_threads()
    trainer = CohortTrainer(CPU, workers=2)
    dict(
        trainer.train(
            make_model(), dict(make_model().state_dict()), shared_members(2), make_plan(), 1
        )
    )
    trainer.close()
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert found == [before]
