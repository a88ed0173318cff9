"""Who holds which training samples: the paper's major class, iid, and Dirichlet.

A client's samples depend on (run seed, client) alone. Clients of ``major_class`` and ``dirichlet``
draw independently of each other, so two of them may hold the same sample.
"""

import numpy as np
import numpy.typing as npt

from fedsmooth_core.config import PartitionConfig
from fedsmooth_core.errors import ConfigError, DataError
from fedsmooth_core.seeding import Purpose, numpy_generator

Indices = npt.NDArray[np.int64]
Counts = npt.NDArray[np.int64]


def client_indices(
    labels: npt.NDArray[np.int64], config: PartitionConfig, run_seed: int, client: int
) -> Indices:
    """Return the training samples of one client: distinct indices into ``labels``, ascending.

    With N training samples, a client holds S = ``samples_per_client`` of them, or N // num_clients.

    - ``major_class`` (Chen et al. 2021): round(gamma * S) samples come from one random class, the
      rest uniformly from the samples of all other classes; gamma = 1 / num_classes is homogeneous.
    - ``iid``: client k takes entries k*S to (k+1)*S, modulo N, of one permutation, so clients are
      disjoint as long as num_clients * S <= N; without ``samples_per_client`` every sample is held
      by exactly one client, and sizes differ by at most one.
    - ``dirichlet`` (Hsu, Qi, Brown 2019): class proportions q ~ Dirichlet(concentration * prior),
      where prior is the training set's, and S samples by q; what a class lacks comes from the
      others, by q again.

    Args:
        labels: (N,) class of each training sample, 0 or above.
        config: the scheme and its parameters.
        run_seed: the run's seed.
        client: 0 to ``config.num_clients`` - 1.

    Raises:
        ConfigError: when there is no such client, or nothing to hold for it.
        DataError: when the training set, or a class of it, has too few samples.
    """
    if not 0 <= client < config.num_clients:
        raise ConfigError(
            f"Client {client} is not part of the partition: with partition.num_clients="
            f"{config.num_clients}, allowed are 0 to {config.num_clients - 1}."
        )
    start, size = _share(len(labels), config, client)
    if config.scheme == "iid":
        permutation = numpy_generator(run_seed, Purpose.PARTITION).permutation(len(labels))
        chosen = permutation[np.arange(start, start + size) % len(labels)]
    else:
        rng = numpy_generator(run_seed, Purpose.PARTITION, client)
        draw = _major_class if config.scheme == "major_class" else _dirichlet
        chosen = draw(labels, config, size, rng)
    return np.sort(chosen)


def held_out_indices(
    own_labels: npt.NDArray[np.int64],
    test_labels: npt.NDArray[np.int64],
    num_samples: int,
    run_seed: int,
    client: int,
) -> Indices:
    """Return test samples for one client, whose classes are about as frequent as among its own.

    A partition deals training samples alone. What a client would meet after training is of the same
    kind as what it trained on, so its test samples are drawn from the shared test set, class by class
    in the proportions of its own labels. Clients draw independently of each other.

    Args:
        own_labels: of the client's training samples.
        test_labels: (N,) of the test set.
        num_samples: how many, >= 1; fewer where the client's classes have fewer.
        run_seed: the run's seed.
        client: its number.

    Returns:
        Distinct indices into ``test_labels``, ascending.

    Raises:
        DataError: when the test set has none of the client's classes.
    """
    num_classes = 1 + int(max(own_labels.max(), test_labels.max()))
    available = np.bincount(test_labels, minlength=num_classes)
    own = np.bincount(own_labels, minlength=num_classes) * (available > 0)
    available = available * (own > 0)
    size = min(num_samples, int(available.sum()))
    if not size:
        raise DataError("The test set holds no image of the classes that this client trains on.")
    rng = numpy_generator(run_seed, Purpose.HELD_OUT, client)
    counts = _capped_multinomial(size, own / own.sum(), available, rng)
    chosen = [
        rng.choice(np.flatnonzero(test_labels == label), counts[label], replace=False)
        for label in np.flatnonzero(counts)
    ]
    return np.sort(np.concatenate(chosen))


def _share(num_samples: int, config: PartitionConfig, client: int) -> tuple[int, int]:
    """Return where in the permutation an iid client's samples start, and how many it holds."""
    size = config.samples_per_client
    if size is not None:
        if size > num_samples:
            raise DataError(
                f"partition.samples_per_client={size} is more than the training set's "
                f"{num_samples} samples: lower it."
            )
        return client * size, size
    if config.num_clients > num_samples:
        raise DataError(
            f"partition.num_clients={config.num_clients} is more than the training set's "
            f"{num_samples} samples: lower it, or set partition.samples_per_client so that clients "
            "share samples."
        )
    if config.scheme != "iid":
        return 0, num_samples // config.num_clients
    start = client * num_samples // config.num_clients
    return start, (client + 1) * num_samples // config.num_clients - start


def _major_class(
    labels: npt.NDArray[np.int64], config: PartitionConfig, size: int, rng: np.random.Generator
) -> Indices:
    major = rng.choice(np.flatnonzero(np.bincount(labels)))
    members = np.flatnonzero(labels == major)
    others = np.flatnonzero(labels != major)
    num_major = round(config.gamma * size)
    if num_major > len(members):
        raise DataError(
            f"Class {major} has {len(members)} training samples, but a client whose major class it "
            f"is holds {num_major} (partition.gamma={config.gamma} of {size}): lower "
            "partition.gamma or partition.samples_per_client."
        )
    if size - num_major > len(others):
        raise DataError(
            f"The classes other than {major} have {len(others)} training samples, but a client "
            f"holds {size - num_major} of them (partition.gamma={config.gamma} of {size}): raise "
            "partition.gamma or lower partition.samples_per_client."
        )
    return np.concatenate(
        [
            rng.choice(members, num_major, replace=False),
            rng.choice(others, size - num_major, replace=False),
        ]
    )


def _dirichlet(
    labels: npt.NDArray[np.int64], config: PartitionConfig, size: int, rng: np.random.Generator
) -> Indices:
    available = np.bincount(labels)
    classes = np.flatnonzero(available)
    available = available[classes]
    proportions = rng.dirichlet(config.concentration * available / available.sum())
    counts = _capped_multinomial(size, proportions, available, rng)
    return np.concatenate(
        [
            rng.choice(np.flatnonzero(labels == label), count, replace=False)
            for label, count in zip(classes, counts, strict=True)
        ]
    )


def _capped_multinomial(
    size: int, proportions: npt.NDArray[np.float64], available: Counts, rng: np.random.Generator
) -> Counts:
    """Draw ``size`` samples by ``proportions``, no more of a class than it has."""
    counts = np.zeros_like(available)
    # Every round but the last fills at least one class, so there are no more rounds than classes.
    while missing := size - counts.sum():
        room = available - counts
        weights = np.where(room > 0, proportions, 0)
        if weights.sum() == 0:  # every class that q favours is used up
            weights = room.astype(np.float64)
        drawn = rng.multinomial(missing, weights / weights.sum())
        counts += np.minimum(drawn, room)
    return counts
