"""Tiny federations that every test of the server can run."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fedsmooth_core.config import RunConfig
from server.configuration import compose
from server.simulation import quiet_flower

# Four clients of 40 digits each, three rounds of two steps: well under a second, with its certificates.
TINY = [
    "runtime.device=cpu",
    "partition.num_clients=4",
    "partition.samples_per_client=40",
    "federation.num_rounds=3",
    "federation.checkpoint_every=1",
    "training.local_steps=2",
    "training.batch_size=8",
    "training.learning_rate=0.1",
    "evaluation.every=1",
    "certification.n0=20",
    "certification.n=100",
    "certification.num_images=5",
]


@pytest.fixture(scope="session", autouse=True)
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Decode the digits once for all tests here, and nowhere in the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDSMOOTH_CACHE", str(tmp_path_factory.mktemp("decoded")))
        yield


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """`runtime.threads` changes PyTorch's threads for the whole process."""
    threads = torch.get_num_threads()
    quiet_flower()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def console() -> Console:
    """A console that no terminal shows."""
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="session")
def tiny_overrides() -> list[str]:
    """Settings of a tiny run, for a command line."""
    return list(TINY)


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., RunConfig]:
    """Compose a tiny run, with more overrides, into ``tmp_path/<folder>``."""

    def make(*overrides: str, folder: str = "run") -> RunConfig:
        return compose([*TINY, f"run_dir={tmp_path / folder}", *overrides])

    return make
