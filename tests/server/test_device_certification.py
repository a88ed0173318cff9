"""Counts of the clients' own images: asked for when due, judged, pooled, never in the way of training."""

import io
import json

import numpy as np
import pytest
import torch
from fixed_clients import (
    INITIAL,
    assert_average_of,
    assert_same,
    federation,
    good_counts,
    run,
)
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from rich.console import Console
from scipy.stats import binomtest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import server.device_certification
from fedsmooth_core.certification.certify import certify
from fedsmooth_core.checkpoint import load_checkpoint, load_model
from fedsmooth_core.data import client_indices, held_out_indices, load_dataset
from fedsmooth_core.errors import ConfigError
from fedsmooth_core.seeding import Purpose, derive_seed
from server.federation import run_federation
from server.progress import TrainingProgress
from server.prometheus import Prometheus
from server.replies import Refusal
from server.sampling import sample_cohort
from server.simulation import InProcessGrid
from server.status import read_status, show_status
from server.tracking import TensorBoard

KEY = "federated_certified_accuracy"


@pytest.fixture(autouse=True)
def fast_polls(monkeypatch):
    monkeypatch.setattr("server.exchange.POLL_SECONDS", 0.01)


def certify_after(strategy, grid, server_round=1):
    return strategy.on_devices.certify_round(
        server_round, ArrayRecord(INITIAL), grid, strategy.trained
    )


def counts_of(numbers):
    return [good_counts(number)["metrics"] for number in numbers]


def assert_pooled(result, numbers):
    """The figures are those of these clients' images together."""
    counts = counts_of(numbers)
    total = sum(c["num-examples"] for c in counts)
    assert result.problem is None
    assert (result.num_clients, result.num_examples) == (len(counts), total)
    assert result.num_held_out == sum(c["held-out"] for c in counts)
    assert result.num_abstained == sum(c["abstained"] for c in counts)
    assert result.radii == [0.0, 0.25, 0.5]
    for place, (share, interval) in enumerate(
        zip(result.accuracy, result.confidence_interval_95, strict=True)
    ):
        correct = sum(c["correct"][place] for c in counts)
        assert share == pytest.approx(correct / total)
        exact = binomtest(correct, total).proportion_ci(0.95, method="exact")
        assert interval == pytest.approx([exact.low, exact.high], abs=1e-9)


# --- asking


def test_all_images_weigh_alike_whoever_holds_them():
    strategy, grid = federation(5, certify_every=1)
    result = certify_after(strategy, grid)
    assert result.cohort == [0, 1, 2, 3, 4]
    assert result.refused == []
    assert_pooled(result, range(5))
    assert strategy.trained.seconds["certify"] > 0


def test_a_client_is_sent_the_model_the_order_and_its_number():
    strategy, grid = federation(3, certify_every=1)
    certify_after(strategy, grid)
    for message, number in grid.seen:
        assert message.metadata.message_type == "evaluate"
        assert message.metadata.ttl == strategy.config.federation.deadline_seconds + 300
        assert_same(message.content["arrays"].to_torch_state_dict(), INITIAL)
        config = message.content["config"]
        assert (config["partition-id"], config["server-round"]) == (number, 1)
        assert config["radii"] == [0.0, 0.25, 0.5]
        assert config["num-images"] == 10
        order = {k: v for k, v in config.items() if k.startswith("certify.")}
        assert (order["certify.sigma"], order["certify.n"]) == (0.25, 1000)


@pytest.mark.parametrize(
    ("every", "due"), [(0, []), (1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (9, [5])]
)
def test_it_is_due_every_few_rounds_and_after_the_last(every, due):
    strategy, grid = federation(3, certify_every=every, num_rounds=5)
    results = {r: certify_after(strategy, grid, r) for r in range(1, 6)}
    assert [r for r, result in results.items() if result is not None] == due
    assert len(grid.seen) == 3 * len(due)


def test_the_cohort_is_the_rounds_own_draw_and_another_one_than_that_which_trained():
    strategy, grid = federation(20, certify_every=1, cohort_fraction=0.3, num_rounds=9)
    drawn = []
    for server_round in (1, 2):
        cohort = certify_after(strategy, grid, server_round).cohort
        purpose = Purpose.CERTIFIED_COHORT
        assert cohort == sorted(sample_cohort(range(20), 6, 0, server_round, purpose=purpose))
        assert cohort != sorted(sample_cohort(range(20), 6, 0, server_round))
        drawn.append(cohort)
    assert drawn[0] != drawn[1]


def test_training_is_the_same_with_and_without():
    plain, grid = federation(6, cohort_fraction=0.5)
    expected = run(plain, grid, num_rounds=3)
    strategy, grid = federation(6, cohort_fraction=0.5, certify_every=1)
    arrays = ArrayRecord(INITIAL)
    for server_round in (1, 2, 3):
        arrays = strategy.train_round(server_round, arrays, grid, Witness())
        certify_after(strategy, grid, server_round)
    assert_same(arrays.to_torch_state_dict(), expected)


class Witness:
    def cohort_asked(self, server_round, trained):
        pass


# --- judging


def raising(content):
    raise ValueError("no camera")


def changed(**changes):
    def change(content):
        values = dict(content["metrics"]) | {k.replace("_", "-"): v for k, v in changes.items()}
        return RecordDict(
            {"metrics": MetricRecord({k: v for k, v in values.items() if v is not None})}
        )

    return change


def with_more(content):
    return RecordDict({"metrics": content["metrics"], "images": ConfigRecord({"first": b"\0"})})


def with_text(content):
    return RecordDict({"metrics": ConfigRecord({"num-examples": "10"})})


BAD = {
    "an exception": (raising, "ValueError: no camera"),
    "nothing": (lambda content: RecordDict(), "its records are [] instead of"),
    "text": (with_text, "its records are ['metrics'] instead of the metrics"),
    "more than counts": (with_more, "its records are ['images', 'metrics'] instead of"),
    "a key more": (changed(best=1), "its metrics are ["),
    "a key less": (changed(abstained=None), "its metrics are ["),
    "no image": (changed(num_examples=0), "num-examples=0 is not an integer in [1, 10]"),
    "more images": (changed(num_examples=11), "num-examples=11 is not an integer in [1, 10]"),
    "negative": (changed(num_examples=-5), "num-examples=-5 is not an integer"),
    "a fraction": (changed(num_examples=9.5), "num-examples=9.5 is not an integer"),
    "no number": (changed(num_examples=float("nan")), "num-examples=nan is not an integer"),
    "a list": (changed(num_examples=[9]), "num-examples=[9] is not an integer"),
    "held out too many": (changed(held_out=10), "held-out=10 is not an integer in [0, 9]"),
    "abstained too often": (changed(abstained=10), "abstained=10 is not an integer in [0, 9]"),
    "one count": (changed(correct=5), "correct is no list of 3 counts"),
    "a radius less": (changed(correct=[5, 4]), "correct is no list of 3 counts"),
    "a radius more": (changed(correct=[5, 4, 1, 0]), "correct is no list of 3 counts"),
    "rising": (changed(correct=[5, 4, 5]), "correct=5 is not an integer in [0, 4]"),
    "more than its images": (changed(correct=[9, 4, 1]), "correct=9 is not an integer in [0, 8]"),
    "negative count": (changed(correct=[5, 4, -1]), "correct=-1 is not an integer in [0, 4]"),
    "shares": (changed(correct=[0.5, 0.4, 0.1]), "correct=0.5 is not an integer"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_reply_is_refused_with_a_reason_and_counted_against_its_client(kind):
    miscount, reason = BAD[kind]
    strategy, grid = federation(4, certify_every=1, miscount={1: miscount})
    result = certify_after(strategy, grid)
    (refusal,) = result.refused
    assert refusal.client == 1
    assert reason in refusal.reason
    assert_pooled(result, [0, 2, 3])
    assert strategy.trained.offenders == [2 + 1]


def test_a_client_that_fails_twice_in_a_round_has_offended_once():
    strategy, grid = federation(4, {1: raising}, miscount={1: raising}, certify_every=1, strikes=2)
    run(strategy, grid)
    certify_after(strategy, grid)
    assert strategy.trained.offenders == [2 + 1]
    assert strategy._conduct.suspended(2) == set()


def test_repeated_offences_leave_a_client_out_of_training_and_of_certifying():
    strategy, grid = federation(
        4, miscount={1: raising}, certify_every=1, strikes=2, suspension_rounds=3, num_rounds=9
    )
    trained, certified = [], []
    for server_round in range(1, 7):
        run(strategy, grid, first=server_round)
        trained.append(1 in strategy.trained.cohort)
        certified.append(1 in certify_after(strategy, grid, server_round).cohort)
    assert trained == [True, True, False, False, False, True]
    assert certified == [True, True, False, False, False, True]


def test_where_every_reply_is_bad_there_is_no_figure_and_nobody_is_blamed():
    strategy, grid = federation(4, miscount=dict.fromkeys(range(4), raising), certify_every=1)
    result = certify_after(strategy, grid)
    assert result.problem == "0 clients answered well, but a quorum is 2"
    assert result.accuracy is result.confidence_interval_95 is None
    assert len(result.refused) == 4
    assert strategy.trained.offenders == []


def test_without_a_quorum_there_is_no_figure_but_a_record_of_why():
    strategy, grid = federation(4, miscount={0: raising}, certify_every=1, quorum=1.0)
    result = certify_after(strategy, grid)
    assert result.problem == "3 clients answered well, but a quorum is 4"
    assert result.accuracy is None
    assert (result.num_clients, result.num_examples) == (3, 9 + 8 + 10)


# --- silence


class SomeAreSilent(InProcessGrid):
    """Clients in ``silent`` do not answer what they are asked to certify."""

    silent = ()

    def pull_messages(self, message_ids):
        (message_id,) = message_ids
        reply = self._replies.get(message_id)
        is_count = reply is not None and reply.metadata.message_type == "evaluate"
        if is_count and reply.metadata.src_node_id - 2 in self.silent:
            return []
        return super().pull_messages(message_ids)


def silent_federation(*silent, **settings):
    strategy, grid = federation(4, certify_every=1, deadline_seconds=0.1, **settings)
    grid.__class__ = SomeAreSilent
    grid.silent = silent
    return strategy, grid


def test_who_is_silent_is_waited_for_until_the_deadline_and_not_asked_while_it_is_busy():
    strategy, grid = silent_federation(2)
    run(strategy, grid)
    result = certify_after(strategy, grid)
    assert result.refused == [Refusal(2, "no reply came in time")]
    assert_pooled(result, [0, 1, 3])
    assert strategy.trained.offenders == [2 + 2]

    assert_average_of(run(strategy, grid, first=2), [0, 1, 3], server_round=2)
    assert strategy.trained.refused == []
    assert certify_after(strategy, grid, 2).cohort == [0, 1, 3]

    grid.silent = ()  # it answers at last
    assert_average_of(run(strategy, grid, first=3), [0, 1, 2, 3], server_round=3)
    (late,) = strategy.trained.late
    assert late.client == 2
    what = "its reply to the certification of round 1 came after that was over, and is dropped"
    assert late.reason == what


def test_when_all_are_silent_training_goes_on():
    strategy, grid = silent_federation(0, 1, 2, 3)
    run(strategy, grid)
    result = certify_after(strategy, grid)
    assert result.problem == "0 clients answered well, but a quorum is 2"
    state = run(strategy, grid, first=2)  # they are busy, and are asked all the same for a quorum
    assert len(strategy.trained.aggregated) >= 2
    assert not all(torch.equal(state[name], INITIAL[name]) for name in INITIAL)
    assert certify_after(strategy, grid, 2).problem == "0 clients are free, but a quorum is 2"


def test_it_waits_for_nobody_to_connect():
    strategy, grid = federation(4, certify_every=1)
    grid.get_node_ids = lambda: [2]
    result = certify_after(strategy, grid)
    assert result.problem == "1 clients are free, but a quorum is 2"
    assert grid.seen == []


# --- a whole run

ON_DEVICES = [
    "device_certification.every=1",
    "device_certification.num_images=4",
    "device_certification.n0=20",
    "device_certification.n=100",
    "certification.at_end=false",
]


def simulate(config, observers=()):
    grid = InProcessGrid(config.partition.num_clients, "cpu")
    return run_federation(config, grid, Console(file=io.StringIO()), observers)


def lines_of(run_directory):
    return [json.loads(line) for line in run_directory.metrics.read_text().splitlines()]


def test_the_figures_are_those_of_certifying_the_same_images_at_one_place(tiny):
    config = tiny(*ON_DEVICES, "federation.num_rounds=2")
    directory = simulate(config)
    train, test = (load_dataset(config.dataset, split) for split in ("train", "test"))
    for line in lines_of(directory):
        found = line[KEY]
        rows = []
        model = load_model(load_checkpoint(directory.checkpoint(line["round"])))
        for client in found["cohort"]:
            own = train.labels[client_indices(train.labels, config.partition, 0, client)]
            indices = held_out_indices(own, test.labels, 4, 0, client)
            rows += certify(
                model,
                torch.from_numpy(np.array(test.images[indices])),
                torch.from_numpy(np.array(test.labels[indices])),
                indices.tolist(),
                max_value=test.info.max_value,
                sigma=0.25,
                n0=20,
                n=100,
                alpha=0.001,
                seed=derive_seed(0, Purpose.ON_DEVICE, client) >> 1,
                batch_size=512,
                device="cpu",
            )
        radii = np.array([row.radius if row.correct else -1.0 for row in rows])
        assert found["radii"] == [0.0, 0.25]
        assert found["accuracy"] == [np.mean(radii >= radius) for radius in (0.0, 0.25)]
        assert found["num_abstained"] == sum(row.predict == -1 for row in rows)
        assert (found["num_clients"], found["num_examples"], found["num_held_out"]) == (2, 8, 8)
        assert found["refused"] == []
        assert found["problem"] is None
    assert len(lines_of(directory)) == 2


@pytest.mark.parametrize("checkpoint_every", [1, 2])
def test_a_run_killed_while_devices_certify_repeats_and_loses_nothing(
    tiny, monkeypatch, checkpoint_every
):
    settings = [*ON_DEVICES, f"federation.checkpoint_every={checkpoint_every}"]
    undisturbed = simulate(tiny(*settings, folder="undisturbed"))
    original = server.device_certification.DeviceCertification.certify_round

    def killed_in_round_3(self, server_round, arrays, grid, trained):
        result = original(self, server_round, arrays, grid, trained)
        if server_round == 3:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        owner = server.device_certification.DeviceCertification
        patch.setattr(owner, "certify_round", killed_in_round_3)
        with pytest.raises(KeyboardInterrupt):
            simulate(tiny(*settings))
    resumed = simulate(tiny(*settings, "resume=true"))
    lines, expected = lines_of(resumed), lines_of(undisturbed)
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert [line[KEY] for line in lines] == [line[KEY] for line in expected]
    last = load_checkpoint(resumed.checkpoint(3)).state
    for name, value in load_checkpoint(undisturbed.checkpoint(3)).state.items():
        assert torch.equal(last[name], value)


def test_an_offence_of_certifying_is_remembered_by_a_resumed_run(tiny, monkeypatch):
    settings = [*ON_DEVICES, "federation.cohort_fraction=1.0", "federation.strikes=2"]
    monkeypatch.setattr("client.certification.certified_counts", counts_but_of_one())
    simulate(tiny(*settings, "federation.num_rounds=2"))
    directory = simulate(tiny(*settings, "federation.num_rounds=3", "resume=true"))
    *_, last = lines_of(directory)
    assert last["suspended"] == [1]
    assert last[KEY]["cohort"] == [0, 2, 3]
    (record,) = read_status(directory.path).clients
    assert (record.client, record.refused, record.suspended) == (1, 2, True)
    assert "too many pixels" in record.last_reason


def counts_but_of_one():
    def counts(model, own, order, client, max_batch, device):
        if client == 1:
            raise ConfigError("too many pixels.")
        values = {"num-examples": 4, "held-out": 4, "abstained": 0, "correct": [3, 1]}
        return MetricRecord(values)

    return counts


def test_everybody_who_watches_sees_the_figures(tiny, monkeypatch):
    monkeypatch.setattr("client.certification.certified_counts", counts_but_of_one())
    console = Console(file=io.StringIO(), width=200)
    prometheus = Prometheus()
    observers = [TrainingProgress(console), TensorBoard(), prometheus]
    config = tiny(*ON_DEVICES, "device_certification.every=2", "federation.cohort_fraction=1.0")
    directory = simulate(config, observers)
    said = console.file.getvalue()
    assert "on devices 25.0% certified at radius 0.25" in said
    assert "Round 2: client 1 certifies nothing: too many pixels." in said

    gauge = "fedsmooth_device_certified_accuracy"
    assert prometheus._registry.get_sample_value(gauge, {"radius": "0.25"}) == 0.25
    assert prometheus._registry.get_sample_value("fedsmooth_device_certified_images") == 12
    assert prometheus._registry.get_sample_value("fedsmooth_refused_replies_total") == 2

    events = EventAccumulator(str(directory.tensorboard))
    events.Reload()
    drawn = events.Scalars("devices/certified-accuracy-at-0.25")
    assert [(event.step, event.value) for event in drawn] == [(2, 0.25), (3, 0.25)]
    assert [event.value for event in events.Scalars("devices/refused-clients")] == [1.0, 1.0]

    shown = Console(file=io.StringIO(), width=300)
    show_status(directory.path, shown, as_json=False)
    expected = (
        "75.0% [42.8%, 94.5%] at 0, 25.0% [5.5%, 57.2%] at 0.25 (12 images of 3 clients, 12 of"
    )
    assert expected in shown.file.getvalue()


def test_a_round_without_a_figure_says_why(tiny, monkeypatch):
    def broken(*args):
        raise ConfigError("too many pixels.")

    monkeypatch.setattr("client.certification.certified_counts", broken)
    console = Console(file=io.StringIO(), width=200)
    directory = simulate(tiny(*ON_DEVICES), [TrainingProgress(console), TensorBoard()])
    problem = "0 clients answered well, but a quorum is 1"
    assert f"on devices nothing certified ({problem})" in console.file.getvalue()
    assert [line[KEY]["problem"] for line in lines_of(directory)] == [problem] * 3
    assert [line["aggregated"] for line in lines_of(directory)] != [[]] * 3
    shown = Console(file=io.StringIO(), width=300)
    show_status(directory.path, shown, as_json=False)
    assert f"after round 3: none, for {problem}." in shown.file.getvalue()


# --- settings


def test_the_radii_reach_as_far_as_the_draws_can_certify(tiny):
    assert tiny(*ON_DEVICES).device_radii == [0.0, 0.25]
    assert tiny("certification.radius_step=0.1").device_radii == pytest.approx(np.arange(7) / 10)
    few = tiny("device_certification.n=5")  # five draws never certify at this alpha
    assert few.device_radii == [0.0]


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("smoothing.sigma=0", "set certification.sigma > 0 or device_certification.every=0"),
        ("certification.radius_step=1e-5", "makes more than 1000 radii"),
    ],
)
def test_what_cannot_be_certified_is_refused_before_the_run(tiny, setting, sentence):
    with pytest.raises(ConfigError) as error:
        tiny(*ON_DEVICES, setting)
    assert sentence in str(error.value)


def test_a_run_may_begin_to_ask_when_it_is_resumed(tiny):
    simulate(tiny("federation.num_rounds=2", "certification.at_end=false"))
    directory = simulate(tiny(*ON_DEVICES, "resume=true"))
    assert [KEY in line for line in lines_of(directory)] == [False, False, True]
