"""The Python client of the certification service: the project's own types in and out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsmooth_core.certification.row_format import CertifiedRow
from fedsmooth_core.errors import ConfigError, ServiceError, ServiceUnreachableError
from fedsmooth_core.models import ModelSpec
from server.certification import certification_pb2 as pb
from server.certification.certification_pb2_grpc import CertificationStub
from server.certification.jobs import Job, JobState, JobTerms, Submission
from server.certification.messages import (
    architecture_message,
    job_of,
    rows_of,
    state_messages,
    summary_of,
    terms_message,
)

T = TypeVar("T")

RETRY = "retry-after-seconds"
"""Name of the metadata that comes with a refusal that is over by then, e.g. of a full queue."""

_CHUNK = 1 << 20
_SECONDS = 30.0
"""How long the service may take over a question that it answers from what it knows."""
_ONLINE_SECONDS = 600.0
"""How long it may take over images, which wait for their turn on the device."""
_BYTES_A_SECOND = 100_000
"""An upload slower than this is given up."""

# A service that is gone without a word (a machine that lost its power) is noticed within a minute.
_OPTIONS = (
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.max_receive_message_length", 16 << 20),
)


@dataclass(frozen=True)
class Connection:
    """Where the service is, and how to be let in."""

    address: str
    """HOST:PORT."""
    root_certificates: Path | None = None
    """The authority (PEM) that signed the service's certificate; None trusts the system's."""
    token_file: Path | None = None
    """Holds the bearer token. It is read before each call, so that it can be replaced."""
    certificate: Path | None = None
    """This client's certificate chain (PEM), where the service asks for one."""
    key: Path | None = None
    """The certificate's private key (PEM)."""
    insecure: bool = False
    """Talk without TLS: for a service on this machine."""


@dataclass(frozen=True)
class Progress:
    """How far a job is."""

    job: Job
    new_rows: list[CertifiedRow]
    """In the order of certification; those that a message before brought are not repeated."""
    summary: dict[str, Any]
    """Of all rows so far, as :func:`fedsmooth_core.certification.analysis.summary` returns it."""
    seconds_left: float | None
    """Estimate; None before the first image."""


@dataclass(frozen=True)
class Answer:
    """What the smoothed classifier says to an image."""

    label: int
    """Class, or ``ABSTAIN`` (-1)."""
    class_name: str
    """Empty where it abstains."""
    radius: float | None = None
    """Certified l2 radius in [0, 1] pixel units, 0 where it abstains; None where none was asked for."""


class CertificationClient:
    """A connection to the service; a context manager, safe to share among threads.

    Nothing is sent before the first call. Every call raises:

    - :class:`~fedsmooth_core.errors.ServiceUnreachableError` when the service does not answer, is shutting
      down or has a full queue: the same call may succeed later.
    - :class:`~fedsmooth_core.errors.ServiceError` when it refuses, with its sentence. ``status`` says which
      kind: ``INVALID_ARGUMENT``, ``FAILED_PRECONDITION``, ``NOT_FOUND`` and ``RESOURCE_EXHAUSTED`` stay
      as they are until somebody changes the request or the service; ``UNAUTHENTICATED`` until the token is
      replaced.
    - :class:`~fedsmooth_core.errors.ConfigError` when a file of the connection cannot be read.

    Raises:
        ConfigError: when a file of the connection is missing or of no use.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._channel = _channel(connection)
        self._stub = CertificationStub(self._channel)

    def submit(
        self,
        spec: ModelSpec,
        terms: JobTerms,
        weights: Mapping[str, Tensor] | bytes,
        submission: Submission | None = None,
        fingerprint: str = "",
    ) -> Job:
        """Upload a model and have it certified.

        Args:
            spec: its architecture.
            terms: which images to certify it on, and how.
            weights: a state dict, or the bytes of a safetensors file.
            submission: which model of which run it is; None is a run of its own.
            fingerprint: of the data set that is meant. If it is given, and the service has other images
                under that name, it refuses.

        Returns:
            The job as it stands: an equal one that was submitted before may have ended.
        """
        data = weights if isinstance(weights, bytes) else _safetensors(weights)
        submission = submission or Submission()
        header = pb.SubmitRequest.Header(
            architecture=architecture_message(spec),
            terms=terms_message(terms),
            submission=pb.Submission(run=submission.run, round=submission.round),
            dataset_fingerprint=fingerprint,
            num_bytes=len(data),
        )

        def requests() -> Iterator[pb.SubmitRequest]:
            yield pb.SubmitRequest(header=header)
            for start in range(0, len(data), _CHUNK):
                yield pb.SubmitRequest(weights=data[start : start + _CHUNK])

        seconds = _SECONDS + len(data) / _BYTES_A_SECOND
        return self._job(self._call(self._stub.Submit, requests(), seconds))

    def get(self, key: str) -> Job:
        """Return a job as it stands."""
        return self._job(self._call(self._stub.Get, pb.JobRequest(key=key), _SECONDS))

    def jobs(self, run: str = "", states: Sequence[JobState] = (), limit: int = 100) -> list[Job]:
        """Return jobs, the latest submission first: of a run or all, in some states or any."""
        request = pb.ListRequest(run=run, states=state_messages(states), limit=limit)
        response = self._call(self._stub.List, request, _SECONDS)
        return [self._job(job) for job in response.jobs]

    def watch(self, key: str, rows_seen: int = 0) -> Iterator[Progress]:
        """Follow a job until it has ended: its progress now, then whenever something has changed.

        Args:
            key: of the job.
            rows_seen: leave out so many rows, which the caller has from an earlier call.
        """
        request = pb.WatchRequest(key=key, rows_seen=rows_seen)
        for message in self._stream(self._stub.Watch, request, None):
            job = self._job(message.job)
            yield Progress(
                job,
                rows_of(message.new_rows, job.terms.procedure),
                summary_of(message.summary, job.terms.procedure),
                message.seconds_left if message.HasField("seconds_left") else None,
            )

    def cancel(self, key: str) -> Job:
        """Take a job out of the queue, and return it; one that has ended is left as it is."""
        return self._job(self._call(self._stub.Cancel, pb.JobRequest(key=key), _SECONDS))

    def fetch(self, key: str) -> tuple[list[CertifiedRow], Job]:
        """Return a job's rows as far as there are any, ordered by image, and the job."""
        messages: list[pb.Row] = []
        job: Job | None = None
        for part in self._stream(self._stub.Fetch, pb.JobRequest(key=key), 10 * _SECONDS):
            messages.extend(part.rows)
            if part.HasField("job"):
                job = self._job(part.job)
        if job is None:
            raise ServiceUnreachableError(
                f"the certification service at {self._connection.address} broke off while it sent rows: "
                "ask again.",
                "UNAVAILABLE",
            )
        return rows_of(messages, job.terms.procedure), job

    def predict(
        self,
        model: str,
        images: NDArray[np.uint8],
        *,
        n: int,
        alpha: float,
        sigma: float | None = None,
        seed: int | None = None,
    ) -> list[Answer]:
        """Ask for the smoothed classifier's labels (Cohen et al., PREDICT).

        Args:
            model: a job's key, or its weights' hash.
            images: (count, channels, height, width), 8-bit.
            n: draws an image, >= 1.
            alpha: failure probability of each answer, in (0, 1).
            sigma: noise level in [0, 1] pixel units, > 0; None is that of the model's job.
            seed: None, as it should be outside of tests, for noise that nobody can foresee.
        """
        request = pb.PredictRequest(
            model=model, images=_images(images), sigma=sigma, n=n, alpha=alpha, seed=seed
        )
        response = self._call(self._stub.Predict, request, _ONLINE_SECONDS)
        return [Answer(one.label, one.class_name) for one in response.predictions]

    def certify(
        self,
        model: str,
        images: NDArray[np.uint8],
        *,
        n0: int,
        n: int,
        alpha: float,
        sigma: float | None = None,
        seed: int | None = None,
    ) -> list[Answer]:
        """Ask for labels and the radius that provably keeps each (Cohen et al., CERTIFY).

        Args:
            model: a job's key, or its weights' hash.
            images: (count, channels, height, width), 8-bit.
            n0: draws that select a class, >= 1.
            n: draws that estimate its probability, >= 1.
            alpha: failure probability of each certificate, in (0, 1).
            sigma: noise level in [0, 1] pixel units, > 0; None is that of the model's job.
            seed: None, as it should be outside of tests, for noise that nobody can foresee.
        """
        request = pb.CertifyRequest(
            model=model, images=_images(images), sigma=sigma, n0=n0, n=n, alpha=alpha, seed=seed
        )
        response = self._call(self._stub.Certify, request, _ONLINE_SECONDS)
        return [Answer(one.label, one.class_name, one.radius) for one in response.certificates]

    def close(self) -> None:
        """End the connection, and every call on it."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _call(self, method: Callable[..., T], request: object, seconds: float) -> T:
        metadata = self._metadata()
        try:
            return method(request, timeout=seconds, metadata=metadata)
        except grpc.RpcError as error:
            raise self._problem(error) from error

    def _stream(
        self, method: Callable[..., Iterator[T]], request: object, seconds: float | None
    ) -> Iterator[T]:
        metadata = self._metadata()
        call = method(request, timeout=seconds, metadata=metadata)
        try:
            yield from call
        except grpc.RpcError as error:
            raise self._problem(error) from error
        finally:
            call.cancel()  # type: ignore[attr-defined]

    def _metadata(self) -> list[tuple[str, str]]:
        path = self._connection.token_file
        if path is None:
            return []
        token = _read(path).decode("ascii", "replace").strip()
        if not token or not token.isascii() or not token.isprintable() or " " in token:
            raise ConfigError(f"{path} holds no token: put the one that `fedsmooth token` printed.")
        return [("authorization", f"Bearer {token}")]

    def _problem(self, error: grpc.RpcError) -> ServiceError:
        code, details = error.code(), (error.details() or "").strip()
        status = code.name
        address = self._connection.address
        metadata = {item.key for item in error.trailing_metadata() or ()}
        if RETRY in metadata:
            return ServiceUnreachableError(details, status)
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            return ServiceUnreachableError(
                f"the certification service at {address} took too long: try again later.", status
            )
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
            return ServiceUnreachableError(
                f"the certification service at {address} is not available ({details.rstrip('.')}): is it "
                "running, and are address and certificates right?",
                status,
            )
        if code == grpc.StatusCode.UNIMPLEMENTED:
            details = f"what listens at {address} is no certification service of this version."
        return ServiceError(details or f"the certification service ended with {status}.", status)

    def _job(self, message: pb.Job) -> Job:
        try:
            job = job_of(message)
        except ConfigError:
            job = None
        if job is None or job.key != message.key:
            raise ServiceError(
                f"the certification service at {self._connection.address} is of another version: run the "
                "same version on both sides.",
                "FAILED_PRECONDITION",
            )
        return job


def _channel(connection: Connection) -> grpc.Channel:
    given = connection.root_certificates or connection.certificate or connection.key
    if connection.insecure:
        if given:
            raise ConfigError(
                "without TLS there are no certificates: leave out insecure, or the certificates."
            )
        return grpc.insecure_channel(connection.address, _OPTIONS)
    if (connection.certificate is None) != (connection.key is None):
        raise ConfigError("a client certificate and its key go together: give both, or neither.")

    def content(path: Path | None) -> bytes | None:
        return None if path is None else _read(path)

    credentials = grpc.ssl_channel_credentials(
        content(connection.root_certificates),
        content(connection.key),
        content(connection.certificate),
    )
    return grpc.secure_channel(connection.address, credentials, _OPTIONS)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error


def _safetensors(state: Mapping[str, Tensor]) -> bytes:
    # A clone apiece: safetensors stores neither views that share memory nor unusual strides.
    return safetensors.torch.save(
        {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in state.items()
        }
    )


def _images(images: NDArray[np.uint8]) -> pb.Images:
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ConfigError(
            f"images of shape {images.shape} and type {images.dtype} cannot be sent: give 8-bit ones, "
            "(count, channels, height, width)."
        )
    count, channels, height, width = images.shape
    return pb.Images(
        pixels=np.ascontiguousarray(images).tobytes(),
        count=count,
        channels=channels,
        height=height,
        width=width,
    )
