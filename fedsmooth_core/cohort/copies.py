"""Noisy copies in the order of the algorithm and in that of stacked networks."""

from torch import Tensor


def by_client(copies: Tensor, num_clients: int) -> Tensor:
    """(m, K * B, ...) to (K, m * B, ...)."""
    per_client: Tensor = copies.unflatten(1, (num_clients, -1))
    return per_client.transpose(0, 1).flatten(1, 2)


def by_copy(logits: Tensor, num_copies: int) -> Tensor:
    """(K, m * B, classes) to (m, K * B, classes)."""
    per_copy: Tensor = logits.unflatten(1, (num_copies, -1))
    return per_copy.transpose(0, 1).flatten(1, 2)
