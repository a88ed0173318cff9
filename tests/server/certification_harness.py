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
    values = {"sigma": 0.25, "n0": 10, "n": 100} | procedure
    return JobTerms("digits", Procedure(**values), num_images=num_images)


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return dict(build_model(SPEC, [0.3], [0.4], generator).state_dict())


class Running:
    """A service that answers; ``address`` is where."""

    def __init__(self, server: CertificationServer, loop: asyncio.AbstractEventLoop) -> None:
        self.server = server
        self.loop = loop
        self.address = f"127.0.0.1:{server.port}"
        self.store = server._store
        self.guard = server._guard
        self.service = server._service

    def client(self, **connection: object) -> CertificationClient:
        return CertificationClient(Connection(self.address, **{"insecure": True} | connection))

    def stop(self, grace: float = 0.5) -> None:
        asyncio.run_coroutine_threadsafe(self.server.stop(grace), self.loop).result(30)


@contextlib.contextmanager
def serving(directory: Path, **options: object) -> Iterator[Running]:
    """Run a service on a free port of the loopback until the block ends."""
    values = {"listen": "127.0.0.1:0", "insecure": "certificate" not in options, "device": "cpu"}
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    server = CertificationServer(ServiceOptions(directory, **values | options))
    thread.start()
    stopped = False
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(30)
        running = Running(server, loop)
        stop, running.stop = running.stop, lambda *a: None
        yield running
        stop()
        stopped = True
    finally:
        if not stopped:
            with contextlib.suppress(Exception):
                asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
