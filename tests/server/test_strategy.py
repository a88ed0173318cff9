"""Weighted FedAvg over cohorts with clients that misbehave in every way."""

import io
import pickle

import numpy as np
import pytest
import torch
from fixed_clients import (
    INITIAL,
    SPEC,
    SlowGrid,
    assert_average_of,
    assert_same,
    federation,
    local_model,
    num_examples,
    oracle,
    run,
)
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from client.tensor_array import TensorArray, tensor_record
from fedsmooth_core.config import (
    TrainingPlan,
    from_flat,
)
from fedsmooth_core.models import ModelSpec
from server.progress import TrainingProgress
from server.recorder import RoundRecord, TrainedRound
from server.replies import Refusal
from server.sampling import sample_cohort
from server.simulation import InProcessGrid, quiet_flower


@settings(max_examples=20, deadline=None)
@given(num_clients=st.integers(1, 12))
def test_the_aggregate_is_the_sample_weighted_mean(num_clients):
    strategy, grid = federation(num_clients)
    assert_average_of(run(strategy, grid), range(num_clients))
    assert strategy.trained.refused == []
    assert strategy.trained.num_examples == sum(map(num_examples, range(num_clients)))


def test_what_a_round_did_is_recorded():
    strategy, grid = federation(3)
    state = run(strategy, grid)
    weights = [num_examples(k) for k in range(3)]
    assert strategy.trained.cohort == [0, 1, 2]
    expected_loss = sum(k * n for k, n in enumerate(weights)) / sum(weights)
    assert strategy.trained.metrics["train-loss"] == pytest.approx(expected_loss)
    moved = [(state[name] - INITIAL[name]).double().norm() ** 2 for name in ("weight", "scale")]
    assert strategy.trained.update_norm == pytest.approx(float(sum(moved)) ** 0.5, rel=1e-6)
    assert strategy.trained.aggregated == [0, 1, 2]
    assert (strategy.trained.attempts, strategy.trained.num_connected) == (1, 3)
    seconds = strategy.trained.seconds
    assert set(seconds) == {"connect", "send", "receive", "train", "slowest_client", "aggregate"}
    assert seconds["slowest_client"] == pytest.approx(3e-9)
    assert 0 < seconds["send"] + seconds["receive"] <= seconds["train"]


def test_no_client_worked_longer_than_it_was_waited_for():
    strategy, grid = federation(3, {1: changed_metric(train_seconds=1e300)})
    run(strategy, grid)
    assert strategy.trained.refused == []
    assert strategy.trained.seconds["slowest_client"] == strategy.trained.seconds["train"]


def test_a_client_is_sent_the_model_the_plan_and_its_number():
    strategy, grid = federation(4)
    run(strategy, grid)
    assert len(grid.seen) == 4
    for message, number in grid.seen:
        assert_same(message.content["arrays"].to_torch_state_dict(), INITIAL)
        config = message.content["config"]
        assert (config["partition-id"], config["server-round"]) == (number, 1)
        assert config["class-names"] == ["a", "b", "c"]
        plan = {k.removeprefix("plan."): v for k, v in config.items() if k.startswith("plan.")}
        assert from_flat(TrainingPlan, plan) == strategy.config.plan
        spec = {k.removeprefix("spec."): v for k, v in config.items() if k.startswith("spec.")}
        assert from_flat(ModelSpec, spec) == SPEC


def test_only_the_rounds_cohort_is_asked():
    strategy, grid = federation(10, cohort_fraction=0.3)
    run(strategy, grid, num_rounds=3)
    asked = [number for _, number in grid.seen]
    cohorts = [sample_cohort(range(10), 3, 0, server_round) for server_round in (1, 2, 3)]
    assert asked == [number for cohort in cohorts for number in cohort]


def test_a_resumed_run_goes_on_with_the_cohorts_of_its_own_rounds():
    strategy, grid = federation(10, cohort_fraction=0.3)
    run(strategy, grid, first=3)
    assert [number for _, number in grid.seen] == sample_cohort(range(10), 3, 0, 3)
    assert grid.seen[0][0].content["config"]["server-round"] == 3


def test_the_order_in_which_replies_arrive_changes_no_bit():
    strategy, grid = federation(7)
    expected = run(strategy, grid)
    strategy, grid = federation(7)
    grid.__class__ = SlowGrid
    grid.order = list(range(7))[::-1]
    assert_same(run(strategy, grid), expected)
    assert strategy.trained.refused == []


# --- clients that misbehave


def changed_metric(**changes):
    def change(content):
        values = dict(content["metrics"]) | {k.replace("_", "-"): v for k, v in changes.items()}
        content["metrics"] = MetricRecord({k: v for k, v in values.items() if v is not None})
        return content

    return change


def changed_tensor(name, change):
    def apply(content):
        state = content["arrays"].to_torch_state_dict()
        content["arrays"] = ArrayRecord(
            {k: change(v) if k == name else v for k, v in state.items()}
        )
        return content

    return apply


def without_tensor(content):
    del content["arrays"]["weight"]
    return content


def more_tensors(content):
    content["arrays"]["backdoor"] = Array(np.zeros(2))
    return content


def bytes_instead(data, stype="numpy.ndarray"):
    def change(content):
        content["arrays"]["weight"] = Array("float32", (3, 4), stype, data)
        return content

    return change


def without_record(name):
    def change(content):
        del content[name]
        return content

    return change


def pickled():
    file = io.BytesIO()
    np.save(file, np.array([print], dtype=object), allow_pickle=True)
    return file.getvalue()


def raising(content):
    raise ValueError("the disk\nis on fire.")


NAN, INF = float("nan"), float("inf")
MISBEHAVIOUR = {
    "raises": (raising, "ValueError: the disk is on fire"),
    "sends no metrics": (without_record("metrics"), "'metrics'"),
    "sends no arrays": (without_record("arrays"), "'arrays'"),
    "sends nothing": (lambda content: RecordDict(), "'arrays'"),
    "sends other records": (lambda content: RecordDict({"x": ConfigRecord()}), "'arrays'"),
    "lacks a metric": (changed_metric(train_loss=None), "its metrics are"),
    "adds a metric": (changed_metric(test_loss=1.0), "test-loss"),
    "reports a NaN loss": (changed_metric(train_loss=NAN), "train-loss=nan"),
    "reports a list": (changed_metric(train_loss=[1.0]), "train-loss=[1.0]"),
    "has no samples": (changed_metric(num_examples=0), "num-examples=0"),
    "has less than none": (changed_metric(num_examples=-50), "num-examples=-50"),
    "claims the world": (changed_metric(num_examples=2**62), f"num-examples={2**62}"),
    "has half a sample": (changed_metric(num_examples=0.5), "num-examples=0.5"),
    "lacks a tensor": (without_tensor, "missing ['weight']"),
    "adds a tensor": (more_tensors, "extra ['backdoor']"),
    "broadcasts": (changed_tensor("weight", lambda t: t[:1]), "has shape (1, 4)"),
    "flattens": (changed_tensor("weight", torch.flatten), "has shape (12,)"),
    "doubles precision": (changed_tensor("weight", torch.Tensor.double), "is torch.float64"),
    "counts in floats": (changed_tensor("batches", torch.Tensor.float), "is torch.float32"),
    "sends NaN": (changed_tensor("weight", lambda t: t * NAN), "not finite"),
    "sends infinity": (changed_tensor("scale", lambda t: t * INF), "not finite"),
    "sends garbage": (bytes_instead(b"\x00\x01garbage"), "cannot be decoded"),
    "sends a pickle": (bytes_instead(pickle.dumps([1, 2])), "cannot be decoded"),
    "sends objects": (bytes_instead(pickled()), "cannot be decoded"),
    "sends another format": (bytes_instead(b"", "torch.tensor"), "serialised as 'torch.tensor'"),
}


@pytest.mark.parametrize(("misbehave", "said"), MISBEHAVIOUR.values(), ids=MISBEHAVIOUR.keys())
def test_one_bad_client_is_named_and_the_good_ones_are_averaged_alone(misbehave, said):
    strategy, grid = federation(4, {2: misbehave})
    state = run(strategy, grid)
    assert_average_of(state, [0, 1, 3])
    assert [refusal.client for refusal in strategy.trained.refused] == [2]
    assert said in strategy.trained.refused[0].reason
    assert "\n" not in strategy.trained.refused[0].reason
    assert strategy.trained.num_examples == sum(map(num_examples, [0, 1, 3]))


@pytest.mark.parametrize("bad", range(4))
def test_it_does_not_matter_which_client_is_bad(bad):
    strategy, grid = federation(4, {bad: without_tensor})
    assert_average_of(run(strategy, grid), [k for k in range(4) if k != bad])
    assert [refusal.client for refusal in strategy.trained.refused] == [bad]


def test_every_kind_of_misbehaviour_at_once_leaves_the_one_good_client():
    kinds = list(MISBEHAVIOUR.values())
    misbehave = {k: how for k, (how, _) in enumerate(kinds)}
    strategy, grid = federation(len(kinds) + 1, misbehave, quorum=0.01)
    state = run(strategy, grid)
    assert_same(state, local_model(len(kinds)))
    refused = {refusal.client for refusal in strategy.trained.refused}
    assert refused == set(range(len(kinds)))


def test_the_rounds_after_a_bad_reply_are_as_they_would_be():
    strategy, grid = federation(3, {0: raising})
    assert_average_of(run(strategy, grid, num_rounds=3), [1, 2], server_round=3)


def test_without_a_good_reply_the_model_is_kept():
    strategy, grid = federation(3, dict.fromkeys(range(3), raising))
    assert_same(run(strategy, grid, num_rounds=2), INITIAL)
    assert {refusal.client for refusal in strategy.trained.refused} == {0, 1, 2}
    assert strategy.trained.aggregated == []
    assert strategy.trained.metrics == {}
    assert (strategy.trained.num_examples, strategy.trained.update_norm) == (0, 0.0)


def test_a_silent_client_and_an_error_in_its_name_are_refused():
    """Flower's own error for a lost node comes from node 1 and knows its question alone."""

    class LossyGrid(InProcessGrid):
        def pull_messages(self, message_ids):
            for reply in super().pull_messages(message_ids):
                train = reply.metadata.message_type == "train"
                if train and reply.metadata.src_node_id == 2 + 0:
                    continue
                if train and reply.metadata.src_node_id == 2 + 3:
                    question = reply.metadata.reply_to_message_id
                    reply = Message(Error(5, "node unavailable."), reply_to=reply)
                    reply.metadata.__dict__["_reply_to_message_id"] = question
                    assert reply.metadata.src_node_id == 1
                yield reply

    strategy, grid = federation(5, deadline_seconds=0.3)
    grid.__class__ = LossyGrid
    assert_average_of(run(strategy, grid), [1, 2, 4])
    assert sorted(strategy.trained.refused, key=lambda refusal: refusal.client) == [
        Refusal(0, "no reply came in time"),
        Refusal(3, "node unavailable"),
    ]


def test_integer_buffers_stay_integers_over_many_rounds():
    strategy, grid = federation(5)
    state = run(strategy, grid, num_rounds=3)
    assert state["batches"].dtype == torch.int64
    assert int(state["batches"]) == oracle(range(5))["batches"]


def test_what_a_client_writes_is_shown_as_it_is_and_cannot_stop_the_run():
    """Square brackets are mark-up to the console; a client may name a tensor or an error ``[/x]``."""
    console = Console(file=io.StringIO(), width=200)
    progress = TrainingProgress(console)
    reason = "[/red] extra ['[/x]'] [bold]hot[/bold]"
    trained = TrainedRound(cohort=[0], refused=[Refusal(0, reason)])
    progress._total = 1
    progress.round_finished(RoundRecord(1, trained, {}))
    assert f"Round 1: client 0 is refused: {reason}." in console.file.getvalue()


def test_flowers_own_loop_drives_it_too():
    strategy, grid = federation(4, {1: without_tensor})
    quiet_flower()
    result = strategy.start(grid=grid, initial_arrays=ArrayRecord(INITIAL), num_rounds=2)
    assert_average_of(result.arrays.to_torch_state_dict(), [0, 2, 3], server_round=2)
    assert list(result.train_metrics_clientapp) == [1, 2]
    assert [refusal.client for refusal in strategy.trained.refused] == [1]


def held(content):
    content["arrays"] = tensor_record(content["arrays"].to_torch_state_dict())
    return content


@pytest.mark.parametrize("aggregation", [{}, {"max_update_norm": 0.5}, {"rule": "median"}])
def test_tensors_that_never_were_bytes_make_the_same_model(aggregation):
    expected = run(*federation(5, {}, aggregation), num_rounds=2)
    strategy, grid = federation(5, dict.fromkeys(range(5), held), aggregation)
    strategy._record_of = tensor_record
    assert_same(run(strategy, grid, num_rounds=2), expected)
    assert strategy.trained.refused == []
    # Nobody has asked for the bytes of the model that the second round was sent.
    for array in grid.seen[-1][0].content["arrays"].values():
        assert isinstance(array, TensorArray)
        assert "_bytes" not in vars(array)


def test_clients_whose_tensors_are_held_and_clients_whose_are_sent_are_averaged_together():
    strategy, grid = federation(4, {0: held, 2: held})
    assert_average_of(run(strategy, grid), range(4))
