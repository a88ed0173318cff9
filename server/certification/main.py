"""The service as a process: one event loop for gRPC, health, reflection, the page and the metrics."""

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import torch
import uvicorn
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from grpc_reflection.v1alpha._async import ReflectionServicer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route

from fedsmooth_core.device import choose_device
from fedsmooth_core.errors import CertificationError, ConfigError
from server.certification import certification_pb2 as pb
from server.certification.auth import Tokens, check_exposure, server_credentials
from server.certification.certification_pb2_grpc import add_CertificationServicer_to_server
from server.certification.datasets import Datasets
from server.certification.engine import Engine
from server.certification.guard import MAX_HEALTH_CALLS, Guard
from server.certification.health import Health
from server.certification.http_connections import ImpatientProtocol
from server.certification.limits import Limits
from server.certification.metrics import Metrics
from server.certification.page import app as page
from server.certification.service import Service
from server.certification.store import JobStore

_log = logging.getLogger(__name__)

NAME = pb.DESCRIPTOR.services_by_name["Certification"].full_name

GRACE_SECONDS = 3.0
"""How long calls and the turn on the device may go on after the service was told to end."""

_THREADS = 16
_LARGEST_REQUEST = 16 << 20  # the images of a call; parts of an upload are smaller
_LARGEST_PART = 16 << 20  # of an answer
_HEALTH_SECONDS = 1.0
_HTTP_CONNECTIONS = 256

_OPTIONS = (
    # Else two services could listen on one port, and each would get half of the calls.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", _LARGEST_REQUEST),
    ("grpc.max_send_message_length", _LARGEST_PART),
    ("grpc.max_metadata_size", 16 << 10),
    ("grpc.max_concurrent_streams", 256),
    # A peer that is gone without a word is noticed within a minute; one that pings all the time is let go.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 4),
    # A connection costs a descriptor before anybody knows whose it is.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 300_000),
)


@dataclass(frozen=True)
class ServiceOptions:
    """How a service is started."""

    directory: Path
    """Of its queue, models, rows and results."""
    listen: str = "127.0.0.1:50061"
    """HOST:PORT of gRPC; port 0 takes a free one."""
    certificate: Path | None = None
    key: Path | None = None
    client_authority: Path | None = None
    """Callers must show a certificate that it has signed."""
    tokens: Path | None = None
    """Callers must send one of these tokens."""
    insecure: bool = False
    """No TLS, on this machine's loopback alone."""
    http: str | None = None
    """HOST:PORT of the page, the metrics and /health; None serves none."""
    data: Mapping[str, Path] = field(default_factory=dict)
    """Folders of images, by the names that jobs call them by."""
    device: str = "auto"
    batch_size: int | None = None
    """Noisy images in one forward pass; None takes what is fast for the model."""
    drop_superseded: bool = False
    """A newer model of a run drops the unfinished jobs of older ones."""
    limits: Limits = field(default_factory=Limits)


class CertificationServer:
    """All parts of a service, in one event loop.

    Attributes:
        port: of gRPC.
        http_port: of the page and the metrics; 0 where there are none.
        description: where it listens, and what it asks of callers.
        is_beyond_repair: set once only another process can certify; ``final_problem`` says why.

    Raises:
        FedSmoothError: when something of the options cannot be used, or another service has the directory.
    """

    port: int
    http_port = 0
    description: str

    def __init__(self, options: ServiceOptions) -> None:
        self._options = options
        host, _ = _host_and_port(options.listen)
        self._credentials = server_credentials(
            options.certificate, options.key, options.client_authority
        )
        self._tokens = None if options.tokens is None else Tokens(options.tokens)
        knows = self._tokens is not None or options.client_authority is not None
        check_exposure(host, self._credentials is not None, knows, options.insecure)
        datasets = Datasets(options.data)
        device = choose_device(options.device)
        # Rows say float32, so CUDA may not round convolutions to TF32 as it would by default.
        torch.backends.cudnn.allow_tf32 = False
        self._http_socket = None if options.http is None else _listen(options.http)
        self._store = JobStore(options.directory)
        self._engine = Engine(
            self._store,
            datasets,
            device,
            options.batch_size,
            drop_superseded=options.drop_superseded,
        )
        self._datasets = datasets
        self._metrics = Metrics(self._store, self._engine)
        self.is_beyond_repair = asyncio.Event()
        self.final_problem = ""
        self.description = ", ".join(
            [
                "TLS" if self._credentials else "no TLS",
                *(["client certificates"] if options.client_authority else []),
                *(["tokens"] if self._tokens else []),
                f"device {device}",
            ]
        )

    async def start(self) -> None:
        """Begin to certify and to answer.

        Raises:
            ConfigError: when the address cannot be listened on.
        """
        limits = self._options.limits
        self._guard = Guard(self._tokens, limits.max_calls, self._metrics.count_call)
        self._server = grpc.aio.server(
            interceptors=[self._guard],
            options=_OPTIONS,
            # The guard's own limits have sentences; this one also bounds what it does not count.
            maximum_concurrent_rpcs=2 * limits.max_calls + MAX_HEALTH_CALLS,
        )
        self._service = Service(self._store, self._engine, self._datasets, limits)
        add_CertificationServicer_to_server(self._service, self._server)
        self._health = Health()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (NAME, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
            ReflectionServicer([*names, reflection.SERVICE_NAME]), self._server
        )
        await self._report_health()
        try:
            if self._credentials is None:
                self.port = self._server.add_insecure_port(self._options.listen)
            else:
                self.port = self._server.add_secure_port(self._options.listen, self._credentials)
        except RuntimeError as error:
            raise ConfigError(
                f"{self._options.listen} cannot be listened on: it is in use or not of this machine, so "
                "choose another HOST:PORT."
            ) from error
        self._engine.start()
        await self._server.start()
        self._tasks = [asyncio.create_task(self._keep_reporting_health())]
        if self._http_socket is not None:
            self.http_port = self._http_socket.getsockname()[1]
            config = uvicorn.Config(
                self._site(),
                lifespan="off",
                ws="none",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                http=ImpatientProtocol,
                limit_concurrency=_HTTP_CONNECTIONS,
                timeout_graceful_shutdown=1,
            )
            self._http = _Http(config)
            self._tasks.append(asyncio.create_task(self._http.serve(sockets=[self._http_socket])))

    async def stop(self, grace: float = GRACE_SECONDS) -> None:
        """End: no new calls, a grace for what runs; all that was certified is on the disk."""
        await self._health.enter_graceful_shutdown()
        self._tasks[0].cancel()
        await asyncio.gather(self._guard.drain(grace), asyncio.to_thread(self._engine.stop, grace))
        await self._server.stop(0.5)
        if self._http_socket is not None:
            self._http.should_exit = True
            await asyncio.wait(self._tasks[1:], timeout=grace)
        self._store.close()

    def close(self) -> None:
        """Let go of the directory of a service that could not be started."""
        self._store.close()

    async def _keep_reporting_health(self) -> None:
        while True:
            await self._report_health()
            if self._engine.problem_is_final:
                self.final_problem = self._engine.problem
                self.is_beyond_repair.set()
            await asyncio.sleep(_HEALTH_SECONDS)

    async def _report_health(self) -> None:
        statuses = health_pb2.HealthCheckResponse
        status = statuses.NOT_SERVING if self._engine.problem else statuses.SERVING
        for name in ("", NAME):
            await self._health.set(name, status)

    def _site(self) -> Starlette:
        def metrics(request: Request) -> Response:
            return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)

        def health(request: Request) -> Response:
            problem = self._engine.problem
            return PlainTextResponse(f"{problem or 'ok'}\n", 503 if problem else 200)

        return Starlette(
            routes=[
                Route("/metrics", metrics),
                Route("/health", health),
                Mount("/", page(self._store)),
            ]
        )


class _Http(uvicorn.Server):
    """Uvicorn, but for its signal handlers: the service has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run_service(options: ServiceOptions, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT, then end within seconds; so too when only a restart can help.

    Args:
        options: how.
        say: is told where the service listens, once it does, and that it ends.

    Raises:
        FedSmoothError: when it cannot start, or cannot certify any more.
    """
    _log_plainly()
    _take_all_descriptors()
    executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="call")
    loop = asyncio.new_event_loop()
    try:
        loop.set_default_executor(executor)
        problem = loop.run_until_complete(_serve(options, say))
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        loop.close()
    _leave_threads_behind(status=1 if problem else 0)
    if problem:
        raise CertificationError(problem)


async def _serve(options: ServiceOptions, say: Callable[[str], None]) -> str:
    """Return the problem that ended it, or nothing."""
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    server = CertificationServer(options)
    try:
        await server.start()
    except BaseException:
        server.close()
        raise
    host, _ = _host_and_port(options.listen)
    say(f"Certification service: {host}:{server.port} ({server.description})")
    if options.http is not None:
        say(f"Page and metrics: http://{_host_and_port(options.http)[0]}:{server.http_port}")
    ends = [asyncio.create_task(event.wait()) for event in (told, server.is_beyond_repair)]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    for end in ends:
        end.cancel()
    say("The service ends.")
    if not server.final_problem:
        await server.stop()
    else:
        say(server.final_problem)
        # What a broken device was given to compute may never end.
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(server.stop(), 3 * GRACE_SECONDS)
    return server.final_problem


def _leave_threads_behind(status: int) -> None:
    """End the process even while a call's thread is stuck, say in a download: nothing is lost by it."""
    due = time.monotonic() + 1
    for thread in threading.enumerate():
        if thread.name.startswith("call"):
            thread.join(max(0.0, due - time.monotonic()))
            if thread.is_alive():
                logging.shutdown()
                os._exit(status)


def _take_all_descriptors() -> None:
    """Let connections use as many descriptors as the system grants: the usual soft limit is low."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Where "most" is no number, the system refuses it as a soft limit (macOS): then all stays as it was.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _log_plainly() -> None:
    logging.Formatter.converter = time.gmtime
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)sZ %(message)s", datefmt="%Y-%m-%dT%H:%M:%S"
    )
    logging.getLogger("server.certification").setLevel(logging.INFO)


def _listen(address: str) -> socket.socket:
    host, port = _host_and_port(address)
    bare = host.strip("[]")
    try:
        family = socket.AF_INET6 if ":" in bare else socket.AF_INET
        return socket.create_server((bare, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"{address} cannot be listened on ({error.strerror}): choose another HOST:PORT."
        ) from error


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) >= 2**16:
        raise ConfigError(f"{address!r} is no address: give HOST:PORT, e.g. 127.0.0.1:50061.")
    return host, int(port)
