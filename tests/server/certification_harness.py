"""A certification service in this process, and models to submit to it."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from fedsmooth_core.certification.procedure import Procedure
from fedsmooth_core.models import ModelSpec, build_model
from server.certification.client import CertificationClient, Connection
from server.certification.jobs import JobTerms
from server.certification.main import CertificationServer, ServiceOptions

SPEC = ModelSpec("small_cnn", "he", num_classes=10, channels=1, height=8, width=8)


def terms(num_images: int | None = 4, **procedure: object) -> JobTerms:
    """A job on digits of a fraction of a second."""
    values = {"sigma": 0.25, "n0": 10, "n": 100} | procedure
    return JobTerms("digits", Procedure(**values), num_images=num_images)


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Initial weights: another model for another seed."""
    generator = torch.Generator().manual_seed(seed)
    return dict(build_model(SPEC, [0.3], [0.4], generator).state_dict())


class Running:
    """A service that answers."""

    def __init__(self, server: CertificationServer, loop: asyncio.AbstractEventLoop) -> None:
        self.server = server
        self.loop = loop
        self.address = f"127.0.0.1:{server.port}"
        self.store = server._store

    def client(self, **connection: object) -> CertificationClient:
        return CertificationClient(Connection(self.address, **{"insecure": True} | connection))

    def stop(self, grace: float = 0.2) -> None:
        asyncio.run_coroutine_threadsafe(self.server.stop(grace), self.loop).result(30)

    def left_behind(self) -> dict[str, object]:
        """What a refused call could leave: jobs, models, files, calls, places for uploads."""
        with self.store.reading() as connection:
            models = connection.execute("SELECT count(*) FROM weights").fetchone()[0]
        return {
            "jobs": sum(self.store.counts().values()),
            "models": models,
            "files": sorted(path.name for path in self.store.directory.iterdir()),
            "calls": len(self.server._guard._active),
            "places": self.server._service._uploads._places._value,
            "feeds": len(self.server._service._feeds._feeds),
        }


@contextlib.contextmanager
def serving(directory: Path, **options: object) -> Iterator[Running]:
    """Run a service on a free port of the loopback until the block ends."""
    values = {"listen": "127.0.0.1:0", "insecure": "certificate" not in options, "device": "cpu"}
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        server = CertificationServer(ServiceOptions(directory, **values | options))
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(30)
        running = Running(server, loop)
        try:
            yield running
        finally:
            running.stop()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
