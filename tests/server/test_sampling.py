"""Cohorts: distinct clients, the same ones for the same seed and round, every client in its turn."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from server.sampling import sample_cohort

client_sets = st.sets(st.integers(0, 10_000), min_size=1, max_size=60)
sizes = st.integers(1, 80)
seeds = st.integers(0, 2**62)
rounds = st.integers(1, 10_000)


@given(clients=client_sets, size=sizes, seed=seeds, server_round=rounds)
def test_a_cohort_is_distinct_clients_as_many_as_asked_for(clients, size, seed, server_round):
    cohort = sample_cohort(clients, size, seed, server_round)
    assert len(cohort) == len(set(cohort))
    assert set(cohort) <= clients
    assert len(cohort) == min(size, len(clients))


@given(clients=client_sets, size=sizes, seed=seeds, server_round=rounds, shuffle=st.randoms())
def test_a_cohort_depends_on_the_clients_not_on_their_order(
    clients, size, seed, server_round, shuffle
):
    shuffled = sorted(clients)
    shuffle.shuffle(shuffled)
    expected = sample_cohort(sorted(clients), size, seed, server_round)
    assert sample_cohort(shuffled, size, seed, server_round) == expected
    assert sample_cohort(dict.fromkeys(shuffled, "node"), size, seed, server_round) == expected


def test_global_random_state_plays_no_part():
    expected = sample_cohort(range(100), 10, 0, 1)
    for state in range(3):
        random.seed(state)
        np.random.seed(state)
        assert sample_cohort(range(100), 10, 0, 1) == expected


def test_cohorts_stay_what_they_are():
    """Part of every recorded run: a change makes none of them repeatable or resumable."""
    assert sorted(sample_cohort(range(10), 3, 0, 1)) == [1, 3, 7]
    assert sorted(sample_cohort(range(1000), 5, 7, 42)) == [99, 227, 546, 747, 840]


def test_another_attempt_at_a_round_draws_another_cohort():
    attempts = {tuple(sample_cohort(range(1000), 20, 3, 5, attempt)) for attempt in (1, 2, 3)}
    assert len(attempts) == 3
    assert tuple(sample_cohort(range(1000), 20, 3, 5)) in attempts


def test_rounds_and_seeds_draw_different_cohorts():
    cohorts = {
        tuple(sample_cohort(range(1000), 100, seed, server_round))
        for seed in range(5)
        for server_round in range(1, 21)
    }
    assert len(cohorts) == 100


@pytest.mark.parametrize(("num_clients", "size"), [(20, 5), (7, 1), (50, 25)])
def test_clients_are_sampled_alike(num_clients, size):
    """Each client's share of 3,000 rounds; a fair draw would fail here for 1 in 10,000 choices of seeds.

    A client is in a round with p = size / N; the N counts sum to a constant, so
    (N - 1) / N * sum (count - R p)^2 / (R p (1 - p)) is chi-squared with N - 1 degrees of freedom.
    """
    num_rounds = 3000
    counts = np.zeros(num_clients)
    for server_round in range(1, num_rounds + 1):
        counts[sample_cohort(range(num_clients), size, 1, server_round)] += 1
    p = size / num_clients
    statistic = ((counts - num_rounds * p) ** 2).sum() / (num_rounds * p * (1 - p))
    statistic *= (num_clients - 1) / num_clients
    assert counts.min() > 0
    assert chi2.sf(statistic, num_clients - 1) > 1e-4
