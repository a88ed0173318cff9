"""Random streams: named by what they are for, stable, and apart from all global state."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsmooth_core.seeding import Purpose, derive_seed, numpy_generator, torch_generator

SEEDS = st.integers(0, 2**62)
INDICES = st.lists(st.integers(0, 2**31), max_size=4)

# What a seed is derived to is part of every recorded run: a change makes none of them repeatable.
GOLDEN = [
    ((0, Purpose.MODEL_INIT), 230306506113898807),
    ((0, Purpose.COHORT, 1), 8782569325640343474),
    ((7, Purpose.LOCAL_TRAINING, 3, 12, 1), 3570252546458526958),
    ((2**62, Purpose.ESTIMATION, 9999), 6466481742213550102),
]


def draws(generator, count=4):
    return torch.randn(count, generator=generator).tolist()


def test_no_two_purposes_share_a_stream():
    seeds = [derive_seed(0, purpose, 1, 2) for purpose in Purpose]
    assert len(set(seeds)) == len(seeds) == len({purpose.value for purpose in Purpose})


@given(first=st.tuples(SEEDS, INDICES), second=st.tuples(SEEDS, INDICES))
def test_streams_differ_wherever_run_seed_or_indices_do(first, second):
    one, two = (derive_seed(seed, Purpose.COHORT, *indices) for seed, indices in (first, second))
    assert (one == two) == (first == second)


def test_indices_are_told_apart_from_each_other():
    """Round 1 of client 23 is neither round 12 of client 3 nor round 23 of client 1."""
    pairs = itertools.product([1, 3, 12, 23, 123], repeat=2)
    names = [(pair, derive_seed(5, Purpose.LOCAL_TRAINING, *pair)) for pair in pairs]
    assert len({seed for _, seed in names}) == len(names)
    assert derive_seed(5, Purpose.LOCAL_TRAINING, 1) != derive_seed(51, Purpose.LOCAL_TRAINING)


@given(seed=SEEDS, indices=INDICES)
def test_a_seed_fits_every_generator(seed, indices):
    derived = derive_seed(seed, Purpose.PARTITION, *indices)
    assert 0 <= derived < 2**63
    numpy_generator(seed, Purpose.PARTITION, *indices)
    torch_generator(seed, Purpose.PARTITION, *indices)


@pytest.mark.parametrize(("name", "expected"), GOLDEN)
def test_derived_seeds_stay_what_they_are(name, expected):
    assert derive_seed(*name) == expected


def test_streams_neither_read_nor_advance_global_state():
    def both():
        return (
            draws(torch_generator(3, Purpose.EVALUATION, 1)),
            numpy_generator(3, Purpose.EVALUATION, 1).random(4).tolist(),
        )

    expected = both()
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    assert both() == expected
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_a_stream_starts_afresh_each_time_it_is_named():
    used = torch_generator(0, Purpose.SELECTION, 7)
    first = draws(used)
    assert draws(used) != first
    assert draws(torch_generator(0, Purpose.SELECTION, 7)) == first
    assert draws(torch_generator(0, Purpose.ESTIMATION, 7)) != first
