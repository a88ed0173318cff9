"""Who holds which samples: sizes, shares, and independence of everybody else."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedsmooth_core.config import PartitionConfig
from fedsmooth_core.data import client_indices, held_out_indices
from fedsmooth_core.errors import ConfigError, DataError

SCHEMES = ("major_class", "iid", "dirichlet")
LABELS = np.repeat(np.arange(10), 500)


@st.composite
def partitions(draw, schemes=SCHEMES):
    """Labels (some classes may be missing), a configuration, a seed and one of its clients."""
    counts = draw(st.lists(st.integers(0, 40), min_size=1, max_size=6))
    labels = np.repeat(np.arange(len(counts)), counts)
    assume(len(labels) > 0)
    labels = np.random.default_rng(draw(st.integers(0, 9))).permutation(labels)
    size = draw(st.none() | st.integers(1, len(labels)))
    config = PartitionConfig(
        scheme=draw(st.sampled_from(schemes)),
        num_clients=draw(st.integers(1, len(labels) if size is None else 50)),
        samples_per_client=size,
        gamma=draw(st.floats(0, 1)),
        concentration=draw(st.floats(1e-6, 1e6)),
    )
    return labels, config, draw(st.integers(0, 2**62)), draw(st.integers(0, config.num_clients - 1))


def indices_or_reject(labels, config, seed, client):
    """A drawn major class may be too small for its share; that is tested on its own."""
    try:
        return client_indices(labels, config, seed, client)
    except DataError:
        assume(False)


@given(partitions())
def test_indices_are_distinct_and_as_many_as_asked_for(case):
    labels, config, seed, client = case
    indices = indices_or_reject(labels, config, seed, client)
    fair = len(labels) // config.num_clients
    allowed = {fair, fair + 1} if config.scheme == "iid" else {fair}
    assert len(indices) in ({config.samples_per_client} if config.samples_per_client else allowed)
    assert indices.dtype == np.int64
    assert np.all(np.diff(indices) > 0)
    assert indices[0] >= 0
    assert indices[-1] < len(labels)


@given(partitions())
def test_a_client_depends_on_seed_and_number_alone(case):
    labels, config, seed, client = case
    indices = indices_or_reject(labels, config, seed, client)
    for other in range(min(3, config.num_clients)):
        indices_or_reject(labels, config, seed, other)
    np.testing.assert_array_equal(indices, client_indices(labels, config, seed, client))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_seeds_and_clients_differ(scheme):
    config = PartitionConfig(scheme=scheme, num_clients=4, samples_per_client=50)
    drawn = [client_indices(LABELS, config, seed, client) for seed in (0, 1) for client in range(4)]
    assert len({tuple(indices) for indices in drawn}) == 8


def test_more_clients_do_not_change_the_others():
    for scheme in ("major_class", "dirichlet"):
        few = PartitionConfig(scheme=scheme, num_clients=4, samples_per_client=50)
        many = PartitionConfig(scheme=scheme, num_clients=400, samples_per_client=50)
        np.testing.assert_array_equal(
            client_indices(LABELS, few, 7, 3), client_indices(LABELS, many, 7, 3)
        )


# --- major class


@given(st.floats(0, 1), st.integers(1, 500), st.integers(0, 1000))
def test_gamma_is_the_exact_share_of_one_class(gamma, size, seed):
    config = PartitionConfig(gamma=gamma, samples_per_client=size)
    counts = np.bincount(LABELS[client_indices(LABELS, config, seed, 0)], minlength=10)
    assert round(gamma * size) in counts
    assert counts.sum() == size


def test_every_class_is_somebodys_major_class_and_others_are_uniform():
    config = PartitionConfig(num_clients=300, samples_per_client=100, gamma=0.55)
    counts = np.stack(
        [
            np.bincount(LABELS[client_indices(LABELS, config, 0, k)], minlength=10)
            for k in range(300)
        ]
    )
    assert np.all(counts.max(axis=1) == 55)
    majors = np.bincount(counts.argmax(axis=1), minlength=10)
    assert majors.min() > 10  # 30 expected, standard deviation 5.2
    others = np.where(counts == 55, 0, counts).sum(axis=0) / (300 - majors)
    np.testing.assert_allclose(others, 5, atol=0.8)  # 45 samples over 9 classes; sd 0.13


def test_gamma_of_one_tenth_is_homogeneous_and_one_is_a_single_class():
    tenth = PartitionConfig(gamma=0.1, samples_per_client=1000)
    counts = np.bincount(LABELS[client_indices(LABELS, tenth, 0, 0)], minlength=10)
    assert 100 in counts
    assert counts.min() > 60
    one = PartitionConfig(gamma=1.0, samples_per_client=500)
    assert len(np.unique(LABELS[client_indices(LABELS, one, 0, 0)])) == 1


# --- iid


@given(st.integers(1, 200), st.integers(1, 40), st.integers(0, 2**62))
def test_fair_shares_use_every_sample_once(num_samples, num_clients, seed):
    assume(num_clients <= num_samples)
    config = PartitionConfig(scheme="iid", num_clients=num_clients)
    labels = np.zeros(num_samples, dtype=np.int64)
    parts = [client_indices(labels, config, seed, client) for client in range(num_clients)]
    assert sorted(np.concatenate(parts)) == list(range(num_samples))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 50))
def test_iid_clients_are_disjoint_as_long_as_there_are_enough(size, num_clients, surplus):
    labels = np.zeros(size * num_clients + surplus, dtype=np.int64)
    config = PartitionConfig(scheme="iid", num_clients=num_clients, samples_per_client=size)
    parts = [client_indices(labels, config, 3, client) for client in range(num_clients)]
    assert len(np.unique(np.concatenate(parts))) == size * num_clients


def test_iid_clients_wrap_around():
    config = PartitionConfig(scheme="iid", num_clients=5, samples_per_client=4)
    labels = np.zeros(10, dtype=np.int64)
    parts = [client_indices(labels, config, 0, client) for client in range(5)]
    assert np.bincount(np.concatenate(parts)).tolist() == [2] * 10


# --- Dirichlet


def shares_of_largest_class(concentration):
    config = PartitionConfig(
        scheme="dirichlet", num_clients=100, samples_per_client=100, concentration=concentration
    )
    counts = [np.bincount(LABELS[client_indices(LABELS, config, 0, k)]) for k in range(100)]
    return np.array([count.max() / count.sum() for count in counts])


def test_concentration_goes_from_one_class_to_iid():
    assert shares_of_largest_class(0.01).mean() > 0.95
    assert 0.3 < shares_of_largest_class(5).mean() < 0.6
    assert shares_of_largest_class(1e6).mean() < 0.2


def test_average_proportions_are_the_priors():
    labels = np.repeat([0, 1, 2], [2000, 1000, 1000])
    config = PartitionConfig(
        scheme="dirichlet", num_clients=400, samples_per_client=100, concentration=2
    )
    counts = sum(
        np.bincount(labels[client_indices(labels, config, 0, k)], minlength=3) for k in range(400)
    )
    np.testing.assert_allclose(counts / counts.sum(), [0.5, 0.25, 0.25], atol=0.06)


@settings(max_examples=30)
@given(st.integers(1, 60), st.integers(0, 100))
def test_a_class_that_runs_out_is_made_up_for(size, seed):
    labels = np.repeat([0, 1, 2], [50, 5, 5])
    config = PartitionConfig(
        scheme="dirichlet", num_clients=1, samples_per_client=size, concentration=0.01
    )
    indices = client_indices(labels, config, seed, 0)
    assert len(np.unique(indices)) == size


# --- what cannot be


def fails(error_type, *words, labels=LABELS, client=0, **settings):
    with pytest.raises(error_type) as error:
        client_indices(labels, PartitionConfig(**settings), 0, client)
    message = str(error.value)
    assert message.endswith(".")
    assert ". " not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("client", [-1, 10])
def test_no_such_client(client):
    fails(ConfigError, f"Client {client}", "0 to 9", client=client, num_clients=10)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_more_samples_than_there_are(scheme):
    fails(DataError, "5001", "5000", scheme=scheme, samples_per_client=5001)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_more_clients_than_samples(scheme):
    fails(DataError, "num_clients=5001", scheme=scheme, num_clients=5001)


def test_too_small_a_major_class():
    fails(DataError, "500", "501", "gamma", gamma=1.0, samples_per_client=501)


def test_too_few_others():
    labels = np.repeat([0, 1], [50, 50])
    fails(DataError, "50", "90", "gamma", labels=labels, gamma=0.1, samples_per_client=100)


# --- test samples of one client


@given(
    own=st.lists(st.integers(0, 5), min_size=1, max_size=60),
    test=st.lists(st.integers(0, 5), min_size=1, max_size=60),
    wanted=st.integers(1, 80),
    client=st.integers(0, 5),
)
def test_held_out_samples_are_distinct_and_of_the_clients_own_classes(own, test, wanted, client):
    own, test = np.array(own), np.array(test)
    usable = np.isin(test, own)
    if not usable.any():
        with pytest.raises(DataError, match="no image of the classes that this client trains on"):
            held_out_indices(own, test, wanted, 0, client)
        return
    indices = held_out_indices(own, test, wanted, 0, client)
    assert len(indices) == min(wanted, usable.sum())
    assert np.all(np.diff(indices) > 0)
    assert usable[indices].all()
    assert np.array_equal(indices, held_out_indices(own, test, wanted, 0, client))


def test_held_out_samples_follow_the_clients_own_classes_and_clients_differ():
    own = np.repeat([0, 1, 2], [60, 30, 10])
    drawn = [held_out_indices(own, LABELS, 100, 3, client) for client in range(30)]
    assert len({tuple(indices) for indices in drawn}) == 30
    shares = np.bincount(LABELS[np.concatenate(drawn)], minlength=10) / 3000
    # Of 3,000 draws a share of 0.6 has a standard deviation of 0.009.
    np.testing.assert_allclose(shares[:3], [0.6, 0.3, 0.1], atol=0.04)
    assert not shares[3:].any()
