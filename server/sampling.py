"""Client sampling: the cohort S_t of a round."""

from collections.abc import Iterable

from fedsmooth_core.seeding import Purpose, numpy_generator


def sample_cohort(
    clients: Iterable[int],
    size: int,
    seed: int,
    server_round: int,
    attempt: int = 1,
    purpose: Purpose = Purpose.COHORT,
) -> list[int]:
    """Draw ``size`` distinct clients (all of them if there are fewer), in random order.

    The draw depends on (seed, purpose, server_round, attempt) and the set of client numbers alone:
    Flower's node ids are random and its own sampling is unseeded, so neither would give the same
    cohorts twice.
    """
    ordered = sorted(clients)
    retry = [attempt] if attempt > 1 else []
    stream = numpy_generator(seed, purpose, server_round, *retry)
    chosen = stream.choice(len(ordered), size=min(size, len(ordered)), replace=False)
    return [ordered[position] for position in chosen]
