"""The main job on a tiny scale: train a federation, resume it, certify it, and find it all on disk."""

import csv
import dataclasses
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from scipy.stats import norm
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedsmooth_core.certification.rows import read_rows
from fedsmooth_core.checkpoint import load_checkpoint, load_model, state_sha256
from fedsmooth_core.cohort import trainer
from fedsmooth_core.cohort.local_training import train_stacked
from fedsmooth_core.config import RunConfig, from_nested, to_nested
from fedsmooth_core.models import NORMALISATION
from fedsmooth_core.wire import TRAIN_METRICS
from server import simulation
from server.centralized import run_centralized
from server.configuration import compose
from server.federation import run_federation
from server.sampling import sample_cohort
from server.simulation import InProcessGrid
from server.tracking import TensorBoard


def simulate(config, console, observers=()):
    return simulation.simulate(config, console, [*observers, TensorBoard()])


def final_state(run, config):
    return load_checkpoint(run.checkpoint(config.federation.num_rounds)).state


def checkpoint(run_dir, server_round):
    return Path(run_dir) / "checkpoints" / f"round-{server_round:04d}.safetensors"


def rounds(run):
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def last_round(run):
    return f"round-{rounds(run)[-1]['round']:04d}"


def without_seconds(lines):
    """Metrics lines but for what a clock says."""
    kept = []
    for line in lines:
        metrics = {k: v for k, v in line["metrics"].items() if not k.endswith("seconds")}
        kept.append({k: v for k, v in line.items() if k != "seconds"} | {"metrics": metrics})
    return kept


def steps_drawn(run):
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    return [event.step for event in events.Scalars("train/loss")]


def certificates(run):
    """Rows but for their time."""
    with (run.path / "certification" / last_round(run) / "rows.tsv").open() as file:
        return [row[:-1] for row in csv.reader(file, delimiter="\t")]


def assert_bit_identical(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype
        assert torch.equal(first[name], second[name]), name


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_overrides):
    """One undisturbed run that several tests look at: settings, directory, and what it printed."""
    path = tmp_path_factory.mktemp("finished") / "run"
    config = compose([*tiny_overrides, f"run_dir={path}"])
    torch.set_num_threads(1)
    console = Console(file=io.StringIO(), width=200)
    run = simulate(config, console)
    return config, run, console.file.getvalue()


# --- what a run leaves behind


def test_the_settings_are_recorded_resolved(finished):
    config, run, _ = finished
    recorded = yaml.safe_load((run.path / "config.yaml").read_text())
    assert recorded == to_nested(dataclasses.replace(config, run_dir=None, resume=False))


def test_every_round_has_one_line_that_says_what_happened(finished):
    _, run, _ = finished
    lines = rounds(run)
    assert [line["round"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["cohort"] == sorted(sample_cohort(range(4), 2, 0, line["round"]))
        assert line["aggregated"] == line["cohort"]
        assert (line["attempts"], line["num_connected"]) == (1, 4)
        assert line["refused"] == []
        assert line["num_examples"] == 2 * 40
        assert set(line["metrics"]) == TRAIN_METRICS - {"num-examples"}
        assert 0 < line["metrics"]["train-loss"] < 10
        assert line["update_norm"] > 0
        phases = {"connect", "send", "receive", "train", "slowest_client", "aggregate", "evaluate"}
        assert set(line["seconds"]) == phases
        assert 0 <= line["clean-accuracy"] <= 1
        assert 0 <= line["noisy-accuracy"] <= 1


def test_every_checkpoint_is_there_and_is_the_model_of_its_round(finished):
    config, run, _ = finished
    names = sorted(path.name for path in run.checkpoints.glob("*.safetensors"))
    assert names == [f"round-{k:04d}.safetensors" for k in range(4)]
    states = [load_checkpoint(run.checkpoint(k)) for k in range(4)]
    assert len({state_sha256(checkpoint.state) for checkpoint in states}) == 4
    for number, checkpoint in enumerate(states):
        assert checkpoint.metadata["round"] == number
        assert from_nested(RunConfig, checkpoint.metadata["config"]) == config
        assert checkpoint.metadata["dataset"]["class_names"] == [str(k) for k in range(10)]
        assert load_model(checkpoint)(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_the_update_norm_is_the_distance_of_two_checkpoints(finished):
    _, run, _ = finished
    for line in rounds(run):
        new, old = (
            load_checkpoint(run.checkpoint(k)).state for k in (line["round"], line["round"] - 1)
        )
        squares = sum((new[name].double() - old[name].double()).square().sum() for name in new)
        assert line["update_norm"] == pytest.approx(float(squares) ** 0.5, rel=1e-9)


def test_tensorboard_has_every_scalar_of_every_round(finished):
    _, run, _ = finished
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    lines = rounds(run)
    expected = {
        "train/loss": [line["metrics"]["train-loss"] for line in lines],
        "train/accuracy": [line["metrics"]["train-accuracy"] for line in lines],
        "test/clean-accuracy": [line["clean-accuracy"] for line in lines],
        "test/noisy-accuracy": [line["noisy-accuracy"] for line in lines],
        "server/update-norm": [line["update_norm"] for line in lines],
        "server/refused-clients": [0.0, 0.0, 0.0],
        "seconds/train": [line["seconds"]["train"] for line in lines],
        "seconds/aggregate": [line["seconds"]["aggregate"] for line in lines],
        "seconds/evaluate": [line["seconds"]["evaluate"] for line in lines],
    }
    assert set(expected) <= set(events.Tags()["scalars"])
    for name, values in expected.items():
        scalars = events.Scalars(name)
        assert [scalar.step for scalar in scalars] == [1, 2, 3]
        assert [scalar.value for scalar in scalars] == pytest.approx(values, rel=1e-6)


def test_the_final_model_is_certified_on_evenly_spaced_images(finished):
    config, run, _ = finished
    rows = read_rows(run.path / "certification" / last_round(run) / "rows.tsv")
    assert rows.idx.tolist() == [71 * k for k in range(5)]  # every (359 // 5)-th of 359
    cap = 0.25 * norm.ppf(0.001 ** (1 / 100))
    assert (rows.radius >= 0).all()
    assert (rows.radius <= cap + 1e-12).all()
    summary = json.loads(
        (run.path / "certification" / last_round(run) / "summary.json").read_text()
    )
    assert summary["num_images"] == 5
    assert summary["num_test_images"] == 359
    assert summary["parameters"]["weights"] == state_sha256(final_state(run, config))
    at_zero = summary["certified_accuracy"][0]
    assert at_zero["accuracy"] == pytest.approx(float((rows.correct * (rows.predict >= 0)).mean()))


def test_the_curve_is_drawn_and_the_table_and_the_places_are_printed(finished):
    _, run, printed = finished
    with Image.open(run.path / "curve.png") as picture:
        assert min(picture.size) > 300
        assert picture.convert("L").getextrema()[0] < 100
    assert "</svg>" in (run.path / "curve.svg").read_text()
    for place in (run.path, run.path / "curve.png", run.path / "curve.svg"):
        assert str(place) in printed


# --- what determines a run


def test_the_same_seed_gives_the_same_run_to_the_bit(finished, tiny, console):
    config, run, _ = finished
    again = simulate(tiny(), console)
    assert_bit_identical(final_state(again, config), final_state(run, config))
    assert without_seconds(rounds(again)) == without_seconds(rounds(run))
    assert certificates(again) == certificates(run)


def test_another_seed_gives_another_run(finished, tiny, console):
    config, run, _ = finished
    other = simulate(tiny("seed=1", "certification.at_end=false"), console)
    assert state_sha256(final_state(other, config)) != state_sha256(final_state(run, config))
    initial = [state_sha256(load_checkpoint(one.checkpoint(0)).state) for one in (run, other)]
    assert initial[0] != initial[1]


def test_global_random_state_plays_no_part(finished, tiny, console):
    config, run, _ = finished
    torch.manual_seed(12345)
    random.seed(12345)
    again = simulate(tiny("certification.at_end=false"), console)
    assert_bit_identical(final_state(again, config), final_state(run, config))


def test_evaluations_and_checkpoints_change_no_weight(finished, tiny, console):
    config, run, _ = finished
    rare = ["evaluation.every=0", "federation.checkpoint_every=99", "certification.at_end=false"]
    again = simulate(tiny(*rare), console)
    assert_bit_identical(final_state(again, config), final_state(run, config))
    lines = rounds(again)
    assert ["clean-accuracy" in line for line in lines] == [False, False, True]
    names = sorted(path.name for path in again.checkpoints.glob("*.safetensors"))
    assert names == ["round-0000.safetensors", "round-0003.safetensors"]


class Collecting(InProcessGrid):
    """Keeps every client's model of every round."""

    def push_messages(self, messages):
        questions = list(messages)
        message_ids = super().push_messages(questions)
        for question, message_id in zip(questions, message_ids, strict=True):
            if question.metadata.message_type == "train":
                facts = question.content["config"]
                key = facts["server-round"], facts["partition-id"]
                reply = self._replies[message_id]
                self.models[key] = reply.content["arrays"].to_torch_state_dict()
        return message_ids


def client_models(config, console):
    grid = Collecting(config.partition.num_clients, config.runtime.device)
    grid.models = {}
    run_federation(config, grid, console, [])
    return grid.models


def test_a_clients_result_does_not_depend_on_its_cohort(tiny, console):
    one_round = ["federation.num_rounds=1", "certification.at_end=false"]
    alone = client_models(tiny(*one_round, "federation.cohort_fraction=0.25", folder="1"), console)
    every = client_models(tiny(*one_round, "federation.cohort_fraction=1", folder="4"), console)
    assert len(every) == 4
    ((key, state),) = alone.items()
    assert_bit_identical(every[key], state)
    hashes = {state_sha256(model) for model in every.values()}
    assert len(hashes) == 4  # or the comparison above would mean nothing


def test_the_aggregate_of_a_round_is_the_weighted_mean_of_its_clients(tiny, console):
    config = tiny(
        "federation.num_rounds=1",
        "federation.cohort_fraction=1",
        "certification.at_end=false",
        "model=resnet20",
    )
    models = client_models(config, console)
    state = load_checkpoint(checkpoint(config.run_dir, 1)).state
    for name, tensor in state.items():
        stack = torch.stack([models[1, k][name] for k in range(4)])
        if tensor.is_floating_point():  # every client holds 40 samples
            torch.testing.assert_close(
                tensor.double(), stack.double().mean(0), rtol=1e-6, atol=1e-7
            )
        else:
            assert tensor.dtype == torch.int64
            assert tensor == stack.max() == 2  # batches that batch normalisation has seen


def test_one_client_with_all_data_for_one_round_is_centralised_training(tiny, console):
    alone = [
        "partition=iid",
        "partition.num_clients=1",
        "partition.samples_per_client=null",
        "federation.num_rounds=1",
        "federation.cohort_fraction=1",
        "training.local_steps=10",
        "certification.at_end=false",
    ]
    config = tiny(*alone, folder="federated")
    federated = simulate(config, console)
    pooled = run_centralized(tiny(*alone, folder="pooled"), console, [])
    assert [rounds(run)[0]["num_examples"] for run in (federated, pooled)] == [1438, 1438]
    assert_bit_identical(final_state(federated, config), final_state(pooled, config))
    assert rounds(pooled)[0]["update_norm"] > 0.01


@pytest.mark.parametrize(
    "ablation",
    [
        ["smoothing.sigma=0", "attack.attack_steps=0", "certification.sigma=0.25"],
        ["smoothing.sigma=0", "certification.sigma=0.25"],
        ["attack.attack_steps=0"],
        ["attack.estimator=one_point", "attack.variance_reduction=leave_one_out"],
    ],
    ids=["standard", "adversarial only", "noise only", "one point"],
)
def test_every_ablation_trains_and_certifies_by_configuration_alone(
    finished, tiny, console, ablation
):
    config, usual, _ = finished
    run = simulate(tiny(*ablation, "attack.step_size=5"), console)
    assert state_sha256(final_state(run, config)) != state_sha256(final_state(usual, config))
    assert len(certificates(run)) == 1 + 5


@pytest.mark.parametrize("engine", ["plain", "vmap", "stacked"])
def test_every_engine_trains_the_same_federation(finished, tiny, console, engine):
    config, usual, _ = finished
    run = simulate(tiny(f"runtime.engine={engine}", "certification.at_end=false"), console)
    torch.testing.assert_close(
        final_state(run, config), final_state(usual, config), rtol=1e-3, atol=1e-4
    )
    for line, expected in zip(rounds(run), rounds(usual), strict=True):
        assert line["cohort"] == expected["cohort"]
        assert line["metrics"]["train-loss"] == pytest.approx(
            expected["metrics"]["train-loss"], rel=1e-3
        )


def test_bfloat16_trains_another_model_near_the_usual_one(finished, tiny, console):
    config, usual, _ = finished
    run = simulate(tiny("runtime.precision=bfloat16", "certification.at_end=false"), console)
    state, expected = final_state(run, config), final_state(usual, config)
    assert all(tensor.dtype == expected[name].dtype for name, tensor in state.items())
    assert state_sha256(state) != state_sha256(expected)
    torch.testing.assert_close(state, expected, rtol=0.2, atol=0.05)
    on_a_cpu = simulate(
        tiny("runtime.precision=tf32", "certification.at_end=false", folder="tf32"), console
    )
    assert state_sha256(final_state(on_a_cpu, config)) == state_sha256(expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_run_on_more_threads_is_the_same_but_for_rounding(finished, tiny, console, threads):
    config, usual, _ = finished
    before = torch.get_num_threads()
    try:
        overrides = [f"runtime.threads={threads}", "certification.at_end=false"]
        run = simulate(tiny(*overrides), console)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(
        final_state(run, config), final_state(usual, config), rtol=1e-3, atol=1e-4
    )


def test_a_client_that_fails_is_in_the_metrics_and_the_round_goes_on(tiny, console, monkeypatch):
    def failing(step, take_step, state, members, *args):
        if members[0].client == 2:
            raise RuntimeError("[/no] memory")
        return train_stacked(step, take_step, state, members, *args)

    monkeypatch.setattr(trainer, "train_stacked", failing)
    config = tiny("federation.cohort_fraction=1", "certification.at_end=false")
    run = simulate(config, console)
    for line in rounds(run):
        assert line["refused"] == [{"client": 2, "reason": "RuntimeError: [/no] memory"}]
        assert line["num_examples"] == 3 * 40
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    assert [event.value for event in events.Scalars("server/refused-clients")] == [1.0] * 3


# --- resume


class StopAfter:
    """An observer that stops a run as an interruption would."""

    def __init__(self, server_round):
        self.server_round = server_round

    def run_started(self, config, run, completed_rounds):
        pass

    def cohort_asked(self, server_round, trained):
        pass

    def round_finished(self, record):
        if record.server_round == self.server_round:
            raise KeyboardInterrupt

    def run_finished(self):
        pass


@pytest.mark.parametrize("stop", [1, 2])
@pytest.mark.parametrize("checkpoint_every", [1, 2, 99])
def test_a_stopped_run_continues_to_the_same_bits(finished, tiny, console, stop, checkpoint_every):
    config, undisturbed, _ = finished
    every = f"federation.checkpoint_every={checkpoint_every}"
    with pytest.raises(KeyboardInterrupt):
        simulate(tiny(every), console, [StopAfter(stop)])
    run = simulate(tiny(every, "resume=true"), console)
    assert_bit_identical(final_state(run, config), final_state(undisturbed, config))
    assert without_seconds(rounds(run)) == without_seconds(rounds(undisturbed))
    assert certificates(run) == certificates(undisturbed)


def test_a_run_that_died_before_its_first_checkpoint_continues_from_the_start(
    finished, tiny, console
):
    config, undisturbed, _ = finished
    rare = "federation.checkpoint_every=99"
    with pytest.raises(KeyboardInterrupt):
        simulate(tiny(rare), console, [StopAfter(1)])
    for path in checkpoint(tiny().run_dir, 0).parent.iterdir():
        path.unlink()
    run = simulate(tiny(rare, "resume=true"), console)
    assert_bit_identical(final_state(run, config), final_state(undisturbed, config))
    assert [line["round"] for line in rounds(run)] == [1, 2, 3]


def test_a_finished_run_may_be_given_more_rounds(finished, tiny, console):
    config, _, _ = finished
    simulate(tiny("federation.num_rounds=2"), console)
    run = simulate(tiny("resume=true"), console)
    assert_bit_identical(final_state(run, config), final_state(finished[1], config))
    assert [line["round"] for line in rounds(run)] == [1, 2, 3]
    assert certificates(run) == certificates(finished[1])


def test_a_finished_run_has_nothing_to_resume_and_stays_as_it_is(finished, tiny, console):
    simulate(tiny(), console)
    before = certificates(simulate(tiny("resume=true"), console))
    run = simulate(tiny("resume=true"), console)
    assert [line["round"] for line in rounds(run)] == [1, 2, 3]
    assert certificates(run) == before == certificates(finished[1])


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_tensorboard_shows_every_round_once(tiny, console, stop):
    """Round ``stop`` was drawn, but is beyond the last checkpoint: it comes again."""
    settings = ["federation.num_rounds=4", "federation.checkpoint_every=2"]
    config = tiny(*settings, "certification.at_end=false")
    grid = InProcessGrid(4, "cpu")
    with pytest.raises(KeyboardInterrupt):
        run_federation(config, grid, console, [TensorBoard(), StopAfter(stop)])
    run = simulate(tiny("resume=true", *settings, "certification.at_end=false"), console)
    assert steps_drawn(run) == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_killed_simulation_continues_to_the_same_bits(tmp_path, tiny_overrides):
    """`fedsmooth simulate` under SIGKILL at random moments, until it finishes."""
    overrides = [
        *tiny_overrides,
        "runtime.threads=1",
        "federation.num_rounds=12",
        "federation.checkpoint_every=3",
        "training.local_steps=10",
        "certification.n=2000",
        "certification.num_images=60",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from server.cli import main; main()", "simulate"]

    def start(*arguments):
        return subprocess.Popen(
            [*command, *arguments],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    undisturbed = start(*overrides, f"run_dir={tmp_path / 'undisturbed'}")
    assert undisturbed.wait() == 0
    path = tmp_path / "killed"
    moments = random.Random()
    kills = 0
    while True:
        begun = (path / "config.yaml").is_file()
        settings = ["resume=true"] if begun else overrides
        process = start(*settings, f"run_dir={path}")
        try:
            # At first soon after the run has begun, later and later from then on.
            while not (path / "config.yaml").is_file() and process.poll() is None:
                time.sleep(0.01)
            errors = process.communicate(timeout=moments.uniform(0.0, 1.0) + 1.5 * kills)[1]
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, errors
        break
    assert kills > 0
    first, second = (_Run(tmp_path / name) for name in ("undisturbed", "killed"))
    assert_bit_identical(*(load_checkpoint(checkpoint(r.path, 12)).state for r in (first, second)))
    assert [line["round"] for line in rounds(second)] == list(range(1, 13))
    assert without_seconds(rounds(second)) == without_seconds(rounds(first))
    assert certificates(second) == certificates(first)
    # A round between whose checkpoint and whose drawing the process died may be missing, none is double.
    drawn = steps_drawn(second)
    assert drawn == sorted(set(drawn))
    assert drawn[-1] == 12
    sessions = (second.path / "sessions.jsonl").read_text().splitlines()
    assert len(sessions) >= 2


class _Run:
    def __init__(self, path):
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"


def test_one_client_with_huge_weights_does_not_stop_the_others(tiny, console, monkeypatch):
    """Finite values pass every check of a tensor; what they make is no classifier."""

    def poisoned(step, take_step, state, members, *args):
        ((trained, metrics),) = train_stacked(step, take_step, state, members, *args)
        if members[0].client == 2:
            for name, tensor in trained.items():
                if not name.startswith(NORMALISATION):
                    tensor.fill_(3e38)
        return [(trained, metrics)]

    monkeypatch.setattr(trainer, "train_stacked", poisoned)
    run = simulate(tiny("federation.cohort_fraction=1"), console)
    for line in rounds(run):
        assert line["aggregated"] == [0, 1, 3]
        (refused,) = line["refused"]
        assert refused["client"] == 2
        assert "which no classifier's do" in refused["reason"]
    assert len(certificates(run)) == 1 + 5
