"""What of the CUDA engine needs no CUDA: how a cohort is divided."""

import pytest
import torch

from fedsmooth_core.cohort.cuda import clients_that_fit

GIB = 2**30


@pytest.mark.parametrize(
    ("free", "num_clients", "expected"),
    [
        (200, 100, 100),  # room for all
        (100, 100, 50),  # (.8 * 100 - .8) GiB have room for 79: two chunks, equal ones
        (27, 50, 17),  # for 20: three chunks
        (13, 100, 9),  # for 9
        (1, 100, 1),  # for none: one is tried, and says what it lacks
        (200, 1, 1),
    ],
)
def test_a_cohort_is_divided_into_equal_chunks_that_fit(monkeypatch, free, num_clients, expected):
    """Clients of 1 GiB; what PyTorch holds without using it is free, too."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: ((free - 1) * GIB, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2 * GIB)
    kept = int(0.8 * GIB)
    assert clients_that_fit(num_clients, GIB, kept, torch.device("cuda")) == expected
