"""Rounds that survive: quorum, over-selection, deadline, second attempts, suspension, late answers."""

import pytest
import torch
from fixed_clients import (
    INITIAL,
    SlowGrid,
    Witness,
    assert_average_of,
    assert_same,
    federation,
    local_model,
    num_examples,
    run,
)
from flwr.app import ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsmooth_core.errors import ConfigError, TrainingError
from server.conduct import Conduct
from server.simulation import InProcessGrid


def raising(content):
    raise ValueError("out of order")


def refused(strategy):
    return sorted(refusal.client for refusal in strategy.trained.refused)


@pytest.fixture(autouse=True)
def fast_polls(monkeypatch):
    monkeypatch.setattr("server.exchange.POLL_SECONDS", 0.01)


@pytest.mark.parametrize(
    ("quorum", "num_bad", "is_met"), [(0.5, 3, True), (0.5, 4, False), (1.0, 1, False)]
)
def test_a_round_needs_its_quorum_of_good_replies(quorum, num_bad, is_met):
    bad = dict.fromkeys(range(num_bad), raising)
    strategy, grid = federation(6, bad, quorum=quorum, attempts=1)
    state = run(strategy, grid)
    assert refused(strategy) == list(range(num_bad))
    if is_met:
        assert_average_of(state, range(num_bad, 6))
        assert strategy.trained.aggregated == list(range(num_bad, 6))
    else:
        assert_same(state, INITIAL)
        assert strategy.trained.aggregated == []
        assert strategy.trained.num_examples == 0


def test_a_round_without_quorum_is_tried_again_with_a_new_cohort():
    bad = dict.fromkeys(range(4), raising)
    strategy, grid = federation(12, bad, cohort_fraction=0.34, quorum=1.0, attempts=6)
    witness = Witness()
    # Round 3 of this seed draws a bad client first.
    state = run(strategy, grid, first=3, witness=witness)
    *failed, last = [cohort for _, _, cohort in witness.cohorts]
    assert failed
    for cohort in failed:
        assert set(cohort) & set(bad)
    assert not set(last) & set(bad)
    assert strategy.trained.attempts == len(witness.cohorts)
    assert_average_of(state, last, server_round=3)
    # Who failed in this round is not asked again as long as there are others.
    known_bad = set()
    for cohort in [*failed, last]:
        assert not known_bad & set(cohort)
        known_bad |= set(cohort) & set(bad)
    assert set(refused(strategy)) == known_bad


def test_attempts_are_bounded_and_the_next_round_is_tried_anew():
    strategy, grid = federation(3, dict.fromkeys(range(3), raising), attempts=4)
    witness = Witness()
    assert_same(run(strategy, grid, num_rounds=2, witness=witness), INITIAL)
    assert [(r, a) for r, a, _ in witness.cohorts] == [(r, a) for r in (1, 2) for a in (1, 2, 3, 4)]


def test_over_selection_takes_the_first_good_replies_and_refuses_nobody_who_was_not_needed():
    strategy, grid = federation(8, cohort_fraction=0.5, over_selection=0.5)
    grid.__class__ = SlowGrid
    witness = Witness()

    cohort = []
    original = witness.cohort_asked

    def asked(server_round, trained):
        original(server_round, trained)
        cohort.extend(trained.cohort)
        grid.order = sorted(trained.cohort, reverse=True)

    witness.cohort_asked = asked
    state = run(strategy, grid, witness=witness)
    assert len(cohort) == 6
    assert strategy.trained.aggregated == sorted(cohort)[2:]
    assert strategy.trained.refused == []
    assert_average_of(state, sorted(cohort)[2:])


def test_over_selection_makes_up_for_clients_that_fail():
    strategy, grid = federation(
        8, {2: raising, 5: raising}, cohort_fraction=0.75, over_selection=0.34
    )
    state = run(strategy, grid)
    assert strategy.trained.aggregated == [0, 1, 3, 4, 6, 7]
    assert_average_of(state, [0, 1, 3, 4, 6, 7])


def test_the_deadline_closes_the_round_and_a_late_answer_is_dropped_with_a_note():
    strategy, grid = federation(4, deadline_seconds=0.1)
    grid.__class__ = SlowGrid
    grid.order = [0, 1, 3]
    state = run(strategy, grid)
    assert_average_of(state, [0, 1, 3])
    (refusal,) = strategy.trained.refused
    assert (refusal.client, refusal.reason) == (2, "no reply came in time")

    # Client 2 is still at work, so the next round does not ask it.
    witness = Witness()
    grid.order = [0, 1, 3]
    state = run(strategy, grid, first=2, witness=witness)
    assert witness.cohorts == [(2, 1, [0, 1, 3])]
    assert strategy.trained.refused == []
    assert_average_of(state, [0, 1, 3], server_round=2)

    # Its answer to round 1 comes before round 3: it is dropped, and the client is asked again.
    grid.order = [2, 0, 1, 2, 3]
    state = run(strategy, grid, first=3)
    (late,) = strategy.trained.late
    assert late.client == 2
    assert "reply to round 1 came after that was over" in late.reason
    assert_average_of(state, [0, 1, 2, 3], server_round=3)


def test_a_message_outlives_the_deadline_by_what_clocks_may_differ_alone():
    strategy, grid = federation(2, deadline_seconds=100.0)
    run(strategy, grid)
    assert {message.metadata.ttl for message, _ in grid.seen} == {400.0}


def test_too_few_connected_clients_end_the_run_with_a_sentence():
    strategy, grid = federation(4, connect_timeout_seconds=0.01)
    grid.get_node_ids = lambda: [2]
    with pytest.raises(TrainingError, match="Only 1 of the 2 clients that a round needs"):
        run(strategy, grid)


def test_a_reply_that_cannot_be_taken_apart_is_refused_alone():
    class CorruptGrid(InProcessGrid):
        def pull_messages(self, message_ids):
            replies = super().pull_messages(message_ids)
            for reply in replies:
                if reply.metadata.message_type == "train" and reply.metadata.src_node_id == 3:
                    raise ValueError("object header is cut short\n")
            return replies

    strategy, grid = federation(4)
    grid.__class__ = CorruptGrid
    assert_average_of(run(strategy, grid), [0, 2, 3])
    (refusal,) = strategy.trained.refused
    assert refusal.client == 1
    assert refusal.reason == "its reply cannot be read (ValueError: object header is cut short )"


# --- repeated offences


def test_a_client_is_left_out_for_a_while_after_repeated_offences():
    strategy, grid = federation(4, {1: raising}, strikes=2, suspension_rounds=3)
    asked, suspended = [], []
    for server_round in range(1, 11):
        witness = Witness()
        run(strategy, grid, first=server_round, witness=witness)
        asked.append(any(1 in cohort for _, _, cohort in witness.cohorts))
        suspended.append(strategy.trained.suspended)
    assert asked == [True, True, False, False, False, True, True, False, False, False]
    assert suspended == [[], [], [1], [1], [1], [], [], [1], [1], [1]]


def test_suspended_clients_are_asked_where_a_quorum_needs_them():
    """Bad clients in the majority never stop a run; they only keep its model as it is."""
    bad = dict.fromkeys(range(3), raising)
    strategy, grid = federation(4, bad, strikes=1, suspension_rounds=100, attempts=2)
    for server_round in range(1, 4):
        assert_same(run(strategy, grid, first=server_round), INITIAL)
        assert strategy.trained.attempts == 2


def test_conduct_follows_from_the_recorded_rounds():
    live, replayed = Conduct(2, 5), Conduct(2, 5)
    lines = []
    for server_round in range(1, 8):
        nodes = [1000 + k for k in range(4) if server_round % (k + 1) == 0]
        for node in nodes:
            live.note(server_round, node)
        lines.append({"round": server_round, "offenders": nodes})
    replayed.replay(lines)
    suspended = [live.suspended(server_round) for server_round in range(1, 20)]
    assert [replayed.suspended(server_round) for server_round in range(1, 20)] == suspended
    assert any(suspended)


def test_a_round_counts_one_offence_of_a_node_at_most():
    strategy, grid = federation(4, {0: raising, 1: raising}, quorum=0.75, attempts=4, strikes=3)
    run(strategy, grid)
    assert strategy.trained.attempts == 4
    assert sorted(strategy.trained.offenders) == [2, 3]
    assert len(strategy.trained.refused) > 2
    run(strategy, grid, first=2)
    assert strategy.trained.suspended == []
    run(strategy, grid, first=3)
    assert strategy.trained.suspended == [0, 1]


def test_where_every_reply_is_refused_nobody_is_blamed():
    """The fault may well be the model's or the server's own."""
    strategy, grid = federation(3, dict.fromkeys(range(3), raising), strikes=1)
    run(strategy, grid, num_rounds=3)
    assert strategy.trained.suspended == strategy.trained.offenders == []
    assert {refusal.client for refusal in strategy.trained.refused} == {0, 1, 2}


# --- what one client may do to the model


def far_away(content):
    state = content["arrays"].to_torch_state_dict()
    content["arrays"] = ArrayRecord(
        {k: v * 1e6 if v.is_floating_point() else v for k, v in state.items()}
    )
    return content


def distance(state):
    moved = [(state[k] - INITIAL[k]).double().norm() ** 2 for k in ("weight", "scale")]
    return float(sum(moved)) ** 0.5


def test_clipping_bounds_what_one_client_does():
    strategy, grid = federation(4, {2: far_away}, {"max_update_norm": 0.5})
    state = run(strategy, grid)
    assert strategy.trained.num_clipped == 4
    assert distance(state) <= 0.5 * (1 + 1e-6)
    # Each update keeps its direction: the average is that of the clipped updates.
    weights = torch.tensor([num_examples(k) for k in range(4)], dtype=torch.float64)
    expected = INITIAL["weight"].double().clone()
    for number, share in enumerate(weights / weights.sum()):
        local = local_model(number)
        if number == 2:
            local = {k: v * 1e6 for k, v in local.items()}
        norm = distance(local)
        expected += share * (local["weight"].double() - INITIAL["weight"]) * min(1, 0.5 / norm)
    torch.testing.assert_close(state["weight"].double(), expected, rtol=1e-5, atol=1e-6)


def too_large(state):
    largest = float(state["weight"].abs().max())
    return None if largest < 1e3 else f"outputs reach {largest:g}"


def test_finite_weights_that_make_no_classifier_are_refused_alone():
    strategy, grid = federation(4, {2: far_away}, judge=too_large)
    assert_average_of(run(strategy, grid), [0, 1, 3])
    (refusal,) = strategy.trained.refused
    assert refusal.client == 2
    assert "outputs reach" in refusal.reason
    assert strategy.trained.offenders == [2 + 2]


def test_an_average_that_makes_no_classifier_is_not_taken():
    looked = []

    def judge(state):  # each reply passes, their average does not
        looked.append(state)
        return "no classifier" if len(looked) in (1, 6) else None

    strategy, grid = federation(4, judge=judge, attempts=1)
    assert_same(run(strategy, grid), INITIAL)
    assert len(looked) == 6
    assert strategy.trained.aggregated == strategy.trained.offenders == []


@pytest.mark.parametrize(
    ("rule", "cohort", "quorum"),
    [("median", 2, None), ("median", 3, 3), ("trimmed_mean", 4, None), ("trimmed_mean", 6, 5)],
)
def test_a_robust_rule_asks_for_as_many_replies_as_it_needs(rule, cohort, quorum):
    settings = {"rule": rule, "trimmed_fraction": 0.2}
    if quorum is None:
        with pytest.raises(ConfigError, match="withstands nobody with fewer than"):
            federation(cohort, None, settings)
    else:
        strategy, _ = federation(cohort, None, settings, quorum=0.01)
        assert strategy.config.quorum_size == quorum


def test_nobodys_seconds_in_the_metrics_exceed_what_it_was_waited_for():
    def slow(content):
        content["metrics"]["train-seconds"] = 1e300
        return content

    strategy, grid = federation(3, {1: slow})
    run(strategy, grid)
    assert strategy.trained.metrics["train-seconds"] <= strategy.trained.seconds["train"]


def test_a_message_that_flower_does_not_take_is_said_to_be_that():
    class Refusing(InProcessGrid):
        def push_messages(self, messages):
            messages = list(messages)
            taken = [
                m
                for m in messages
                if m.metadata.dst_node_id != 3 or m.metadata.message_type == "query"
            ]
            return super().push_messages(taken)

    strategy, grid = federation(3)
    grid.__class__ = Refusing
    assert_average_of(run(strategy, grid), [0, 2])
    (refusal,) = strategy.trained.refused
    assert (refusal.client, refusal.reason) == (1, "Flower did not take the message to it")


def test_a_generous_limit_clips_nothing():
    strategy, grid = federation(4, None, {"max_update_norm": 1e6})
    assert_average_of(run(strategy, grid), range(4))
    assert strategy.trained.num_clipped == 0


@pytest.mark.parametrize("rule", ["median", "trimmed_mean"])
@settings(max_examples=15, deadline=None)
@given(num_clients=st.integers(5, 11))
def test_the_coordinate_wise_rules_are_what_they_say(rule, num_clients):
    strategy, grid = federation(num_clients, None, {"rule": rule, "trimmed_fraction": 0.2})
    state = run(strategy, grid)
    stacked = torch.stack([local_model(k)["weight"].double() for k in range(num_clients)])
    ordered = stacked.sort(dim=0).values
    if rule == "median":
        middle = (num_clients - 1) // 2, num_clients // 2
        expected = ordered[list(middle)].mean(dim=0)
    else:
        cut = int(0.2 * num_clients)
        expected = ordered[cut : num_clients - cut].mean(dim=0)
    torch.testing.assert_close(state["weight"].double(), expected, rtol=1e-5, atol=1e-6)
    assert state["batches"].dtype == torch.int64


def near(content):
    """Close to the old model and to each other, as honest clients are."""
    state = content["arrays"].to_torch_state_dict()
    content["arrays"] = ArrayRecord(
        {k: INITIAL[k] + 0.01 * v if v.is_floating_point() else v for k, v in state.items()}
    )
    return content


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "krum"])
def test_a_robust_rule_withstands_a_client_that_lies(rule):
    clients = dict.fromkeys(range(7), near) | {3: far_away}
    plain, plain_grid = federation(7, clients)
    assert distance(run(plain, plain_grid)) > 1e4
    robust, grid = federation(7, clients, {"rule": rule}, quorum=1.0)
    state = run(robust, grid)
    assert distance(state) < 0.1
    if rule == "krum":  # it is one honest client's model
        honest = [INITIAL["weight"] + 0.01 * local_model(k)["weight"] for k in range(7) if k != 3]
        closest = min(float((state["weight"] - model).abs().max()) for model in honest)
        assert closest < 1e-6


def test_krum_is_refused_where_a_cohort_is_too_small_and_raises_the_quorum_elsewhere():
    with pytest.raises(
        ConfigError, match=r"aggregation\.rule=krum withstands nobody with fewer than 5"
    ):
        federation(6, None, {"rule": "krum"}, cohort_fraction=0.5)
    bad = dict.fromkeys(range(3), raising)
    strategy, grid = federation(7, bad, {"rule": "krum"}, quorum=0.5, attempts=1)
    assert_same(run(strategy, grid), INITIAL)
