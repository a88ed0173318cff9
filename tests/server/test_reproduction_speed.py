"""The speed of the two estimators: who is measured when, on what, and which ratio comes of it."""

from dataclasses import replace

import pytest
import torch

from fedsmooth_core.certification.comparison import Ratio
from fedsmooth_core.config import to_flat
from fedsmooth_core.errors import ConfigError, DataError
from fedsmooth_core.estimators import OnePoint
from fedsmooth_core.training import InBfloat16
from server.reproduction import speed, timing
from server.reproduction.speed import SpeedMeasurement, SpeedUp, measure_speed, plan_with

ESTIMATORS = ["stochastic", "one_point"]
TURNS = ESTIMATORS + ESTIMATORS + ESTIMATORS[::-1] + ESTIMATORS  # a warm-up, then three pairs

SPEED_UP = SpeedUp(
    training=Ratio(1.4, 1.3, 1.5, 7, 0.95),
    attack=Ratio(2.5, 2.25, 2.75, 7, 0.95),
    stochastic_step_seconds=0.1,
    one_point_step_seconds=0.07,
    attack_steps=2,
    num_noise_vectors=2,
    batch_size=30,
    model="alexnet",
    precision="bfloat16",
    device="cpu",
    threads=2,
    clients=2,
)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Three pairs."""
    monkeypatch.setattr(speed, "_PAIRS", 3)


class Machine:
    """A trainer and an attack that do nothing but take their time, on a clock of their own."""

    def __init__(self):
        self.time = 0.0
        self.trained, self.attacked, self.trainers = [], [], []
        self.round_seconds = {"stochastic": 6.0, "one_point": 4.0}
        self.attack_seconds = {"stochastic": 0.09, "one_point": 0.03}
        self.failure = None

    def now(self, device):
        return self.time

    def attack(self, model, x, labels, noise, gradient, config):
        estimator = "one_point" if isinstance(gradient, OnePoint) else "stochastic"
        assert estimator == config.estimator
        assert torch.get_num_threads() == 1
        self.attacked.append((estimator, model, x, labels, noise))
        self.time += self.attack_seconds[estimator]
        return x

    def trainer(self, *arguments, **settings):
        machine = self

        class Trainer:
            def __init__(self):
                self.plans, self.is_closed = [], False
                machine.trainers.append(self)

            def train(self, model, state, members, plan, server_round):
                self.plans.append(plan)
                machine.trained.append((plan.attack.estimator, model, members, server_round))
                for place in range(len(members)):
                    machine.time += machine.round_seconds[plan.attack.estimator] / len(members)
                    yield place, machine.failure

            def close(self):
                self.is_closed = True

        return Trainer()


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    for module in (speed, timing):
        monkeypatch.setattr(module, "now", machine.now)
    monkeypatch.setattr(timing, "CohortTrainer", machine.trainer)
    monkeypatch.setattr(speed, "smoothadv_attack", machine.attack)
    return machine


@pytest.fixture
def config(tiny):
    return tiny("runtime.threads=2")


def test_estimators_take_turns_and_another_one_is_first_in_each_pair(machine, config, console):
    measure_speed(config, console)
    assert [estimator for estimator, *_ in machine.trained] == TURNS
    # One call each that prepares, then as many as make a sample of 0.2 s of the faster one.
    calls = [estimator for estimator, *_ in machine.attacked]
    assert calls[:2] == ESTIMATORS
    assert calls[-8 * len(TURNS) :] == [estimator for estimator in TURNS for _ in range(8)]


def test_a_ratio_is_stochastic_over_one_point(machine, config, console):
    found = measure_speed(config, console)
    assert found.training.estimate == pytest.approx(1.5)
    assert found.attack.estimate == pytest.approx(3)
    assert found.training.num_pairs == found.attack.num_pairs == 3
    # Two clients, two local steps each.
    assert found.stochastic_step_seconds == pytest.approx(6 / 4)
    assert found.one_point_step_seconds == pytest.approx(4 / 4)


def test_what_it_was_measured_on_is_said(machine, config, console):
    found = measure_speed(config, console)
    assert (found.attack_steps, found.num_noise_vectors, found.batch_size) == (2, 2, 8)
    assert (found.model, found.precision, found.device) == ("small_cnn", "float32", "cpu")
    assert (found.threads, found.clients) == (2, 2)
    assert torch.get_num_threads() == 2


def test_both_train_the_same_clients_in_the_same_round_each_by_a_trainer_of_its_own(
    machine, config, console
):
    measure_speed(config, console)
    _, first_model, first_members, first_round = machine.trained[0]
    for _, model, members, server_round in machine.trained:
        assert model is first_model
        assert members is first_members
        assert server_round == first_round
    assert len(machine.trainers) == 2
    for trainer in machine.trainers:
        assert len(set(trainer.plans)) == 1  # so nothing that it keeps is made anew in a round
        assert trainer.is_closed


def test_both_attack_the_same_images_with_the_same_noise(machine, config, console):
    measure_speed(config, console)
    _, model, x, labels, noise = machine.attacked[0]
    for _, *others in machine.attacked:
        assert all(a is b for a, b in zip((model, x, labels, noise), others, strict=True))
    assert x.shape == (8, 1, 8, 8)
    assert noise.shape == (2, 8, 1, 8, 8)
    assert not isinstance(model, InBfloat16)


def test_the_attack_alone_is_in_the_runs_precision(machine, tiny, console):
    found = measure_speed(tiny("runtime.precision=bfloat16"), console)
    assert all(isinstance(model, InBfloat16) for _, model, *_ in machine.attacked)
    assert found.precision == "bfloat16"


@pytest.mark.parametrize(
    "settings",
    [
        ["attack.warmup_rounds=2"],
        ["attack.estimator=one_point", "attack.variance_reduction=leave_one_out"],
    ],
)
def test_the_plans_differ_in_the_estimator_alone(tiny, settings):
    config = tiny(*settings)
    stochastic, one_point = (to_flat(plan_with(config, name)) for name in ESTIMATORS)
    differing = {key for key in stochastic if stochastic[key] != one_point[key]}
    assert differing == {"attack.estimator"}
    assert stochastic.keys() == one_point.keys()
    expected = replace(config.plan.attack, variance_reduction="none", warmup_rounds=0)
    assert plan_with(config, config.attack.estimator) == replace(config.plan, attack=expected)


def test_a_growing_budget_is_measured_where_it_has_grown(tiny):
    config = tiny("attack.warmup_rounds=100")
    assert plan_with(config, "one_point").attack.l2_budget == pytest.approx(128 / 255 * 3 / 100)


@pytest.mark.parametrize("setting", ["attack.attack_steps=0", "smoothing.sigma=0"])
def test_a_run_without_something_to_compare_is_refused(tiny, setting, console):
    with pytest.raises(ConfigError, match=setting):
        measure_speed(tiny(setting, "certification.sigma=0.25"), console)


def test_a_failing_client_fails_the_measurement(machine, config, console, tmp_path):
    machine.failure = DataError("There is no sample to train on.")
    task = SpeedMeasurement(config, tmp_path)
    with pytest.raises(DataError, match="no sample"):
        task.run(console)
    assert all(trainer.is_closed for trainer in machine.trainers)
    assert task.work_left()


def test_a_measurement_is_read_as_it_was_written(tmp_path):
    SPEED_UP.save(tmp_path / "speed.json")
    assert SpeedUp.load(tmp_path / "speed.json") == SPEED_UP
    assert SpeedUp.from_json(SPEED_UP.to_json()) == SPEED_UP


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"training": 1.4, "attack": 2.5}'])
def test_another_file_is_no_measurement(tmp_path, text):
    (tmp_path / "speed.json").write_text(text)
    with pytest.raises(ConfigError, match=r"speed\.json is no measurement"):
        SpeedUp.load(tmp_path / "speed.json")


def test_the_task_is_done_once_its_file_is_there(machine, config, console, tmp_path):
    task = SpeedMeasurement(config, tmp_path)
    # 4 rounds each of 2 clients with 2 steps of 8 images, 2 copies: 2 * 2 + 3 passes, and 2 * 1 + 3.
    assert task.work_left() == 4 * 2 * 2 * 8 * 2 * (7 + 5)
    task.run(console)
    assert task.work_left() == 0
    assert SpeedUp.load(task.path).training.estimate == pytest.approx(1.5)


def test_the_projects_own_trainer_and_attack_are_measured(tiny, console, monkeypatch):
    monkeypatch.setattr(speed, "_PAIRS", 2)
    monkeypatch.setattr(speed, "_SAMPLE_SECONDS", 0.001)
    found = measure_speed(tiny("runtime.threads=1"), console)
    for ratio in (found.training, found.attack):
        assert 0 < ratio.low <= ratio.estimate <= ratio.high
    assert "Speed: 12 of 12" in console.file.getvalue()


def test_a_rate_is_measured_on_a_few_steps(config):
    assert timing.measured_rate(config) > 0
