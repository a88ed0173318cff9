"""What every call passes through: who calls, how many at a time, and what becomes of an error."""

import asyncio
import inspect
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from fedsmooth_core.errors import DataError, FedSmoothError, ServiceError, ServiceUnreachableError
from server.certification.auth import Tokens
from server.certification.client import RETRY
from server.certification.store import QueueFullError, StorageError, UnknownJobError

_log = logging.getLogger(__name__)

_HEALTH = "/grpc.health.v1.Health/"
_LONGEST = 600  # characters of a sentence: what a caller wrote may be quoted in it
_RETRY = ((RETRY, "10"),)
_LOG_SECONDS = 1.0
"""Between two lines about refusals of one kind to one caller: a flood of calls makes no flood of lines."""

# Health asks for no token, so strangers fill these places: they are not those of other calls.
_HEALTH_CALLS = {"Check": 128, "Watch": 32}
_HEALTH_SECONDS = 5.0
"""A call of health that has not said within this time what it asks about is ended."""

MAX_HEALTH_CALLS = sum(_HEALTH_CALLS.values())
"""Calls of health at a time, of all callers together."""

ANYBODY = "anybody"
"""Name of every caller of a service without tokens."""


@dataclass(frozen=True)
class Caller:
    """Who makes a call."""

    name: str
    """Of the token, or :data:`ANYBODY`."""
    peer: str
    """Where the call came from, as gRPC writes it."""

    def __str__(self) -> str:
        return f"{self.name} at {self.peer}"


CALLER: ContextVar[Caller] = ContextVar("caller")
"""Who makes the call under way."""

# gRPC's classes are generic for type checkers alone.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class Guard(grpc.aio.ServerInterceptor):
    """Lets calls in and turns errors into a status with one sentence; never a trace to the caller.

    Args:
        tokens: who may call; None lets in everybody whom TLS lets in.
        max_calls: calls at a time; those of health are counted apart.
        count: is told the method and the status of each call that has ended.
    """

    def __init__(
        self, tokens: Tokens | None, max_calls: int, count: Callable[[str, str], None]
    ) -> None:
        self._tokens = tokens
        self._max_calls = max_calls
        self._count = count
        self._active: set[asyncio.Task[Any]] = set()
        self._health_calls: Counter[str] = Counter()
        self._refusals: dict[tuple[str, str], tuple[float, int]] = {}
        self._draining = False

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        method = handler_call_details.method
        handler = await continuation(handler_call_details)
        if method.startswith(_HEALTH):
            return self._bounded(handler, method.removeprefix(_HEALTH))
        # What a caller made up is no label of a metric, and stands in no log.
        name = "unknown" if handler is None else method.rpartition("/")[2]
        authorization = dict(handler_call_details.invocation_metadata or ()).get("authorization")
        try:
            caller = self._admit(authorization)
        except ServiceError as error:
            return self._refusing(name, error)
        return self._guarded(handler, name, caller, authorization)

    async def drain(self, grace: float) -> None:
        """Refuse new calls; end those that are still running after ``grace`` seconds."""
        self._draining = True
        if self._active:
            await asyncio.wait(self._active, timeout=grace)
        for task in self._active:
            task.cancel()
        if self._active:
            await asyncio.wait(self._active, timeout=grace)

    def _admit(self, authorization: str | bytes | None) -> str:
        """Return who calls, or raise the refusal."""
        caller = self._name_of(authorization)
        if self._draining:
            raise _shutting_down()
        if len(self._active) >= self._max_calls:
            raise ServiceUnreachableError(
                f"the service has {self._max_calls} calls at a time: try again later.",
                "RESOURCE_EXHAUSTED",
            )
        return caller

    def _name_of(self, authorization: str | bytes | None) -> str:
        """Return the name of a token, or raise the refusal of one that does not let in (any more)."""
        if self._tokens is None:
            return ANYBODY
        return self._tokens.name_of(authorization if isinstance(authorization, str) else None)

    def _bounded(self, handler: Handler, name: str) -> Handler:
        """Return a handler of health that waits neither for ever nor in any number."""
        if handler is None or name not in _HEALTH_CALLS:
            return None
        inner = _behaviour(handler)

        async def answer(requests: AsyncIterator[Any], context: Context) -> Any:
            if self._health_calls[name] >= _HEALTH_CALLS[name]:
                most = _HEALTH_CALLS[name]
                sentence = f"the service has {most} calls of {name} at a time: try again later."
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, sentence, _RETRY)
            self._health_calls[name] += 1
            try:
                async with asyncio.timeout(_HEALTH_SECONDS):
                    request = await anext(requests, _Unreadable())
                if isinstance(request, _Unreadable):
                    sentence = (
                        "the request is no message of grpc.health.v1: send a HealthCheckRequest."
                    )
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, sentence)
                return await inner(request, context)
            except TimeoutError:
                sentence = f"no request came within {_HEALTH_SECONDS:g} s: send it with the call."
                await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, sentence)
            finally:
                self._health_calls[name] -= 1

        # As a stream of requests: gRPC itself would wait for a single one without end.
        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        return make(answer, _lenient(handler.request_deserializer), handler.response_serializer)

    def _refusing(self, name: str, refusal: ServiceError) -> Handler:
        async def refuse(requests: object, context: Context) -> None:
            async with self._answering(context, name, "somebody"):
                raise refusal

        # Whatever kind of call it is: no request is read, and no response is sent.
        return grpc.stream_unary_rpc_method_handler(refuse)

    def _guarded(
        self, handler: Handler, name: str, caller: str, authorization: str | bytes | None
    ) -> Handler:
        if handler is None:
            return None
        inner = _behaviour(handler)

        def check() -> None:
            self._name_of(authorization)

        async def unary(request: Any, context: Context) -> Any:
            async with self._answering(context, name, caller):
                return await inner(_readable(request, check), context)

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            async with (
                self._answering(context, name, caller),
                aclosing(inner(_readable(request, check), context)) as responses,
            ):
                async for response in responses:
                    # A stream may be open for days: a token that is revoked meanwhile reads no more of it.
                    check()
                    yield response

        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        assert not handler.response_streaming or inspect.isasyncgenfunction(inner)
        return make(
            stream if handler.response_streaming else unary,
            _lenient(handler.request_deserializer),
            handler.response_serializer,
        )

    @asynccontextmanager
    async def _answering(self, context: Context, name: str, caller: str) -> AsyncIterator[None]:
        task = asyncio.current_task()
        assert task is not None
        self._active.add(task)
        CALLER.set(Caller(caller, context.peer()))
        status = "OK"
        try:
            try:
                yield
            except asyncio.CancelledError:
                status = "CANCELLED"
                if not self._draining or context.cancelled():
                    raise
                task.uncancel()
                raise _shutting_down() from None
            except GeneratorExit:
                status = "CANCELLED"
                raise
        except Exception as error:
            status, sentence, trailing = _verdict(error)
            if status == "INTERNAL":
                _log.error("%s for %s failed", name, CALLER.get(), exc_info=error)
            else:
                self._log_refusal(name, status, sentence)
            await context.abort(grpc.StatusCode[status], sentence, trailing)
        finally:
            self._active.discard(task)
            self._count(name, status)

    def _log_refusal(self, name: str, status: str, sentence: str) -> None:
        caller = CALLER.get()
        now = time.monotonic()
        logged_at, unsaid = self._refusals.get((status, caller.name), (-math.inf, 0))
        if now < logged_at + _LOG_SECONDS:
            self._refusals[status, caller.name] = logged_at, unsaid + 1
            return
        self._refusals[status, caller.name] = now, 0
        more = f" ({unsaid} more such refusals before it)" if unsaid else ""
        _log.info("refused %s for %s: %s: %s%s", name, caller, status, sentence, more)


def _verdict(error: Exception) -> tuple[str, str, tuple[tuple[str, str], ...]]:
    """Return the status, the sentence, and the metadata that come with them."""
    sentence = str(error)
    if len(sentence) > _LONGEST:
        sentence = sentence[:_LONGEST] + " ..."
    if isinstance(error, ServiceError):
        retry = _RETRY if isinstance(error, ServiceUnreachableError) else ()
        return error.status, sentence, retry
    if isinstance(error, QueueFullError):
        return "RESOURCE_EXHAUSTED", sentence, _RETRY
    if isinstance(error, DataError):
        return "FAILED_PRECONDITION", sentence, ()
    if isinstance(error, UnknownJobError):
        return "NOT_FOUND", sentence, ()
    if isinstance(error, StorageError | OSError):
        _log.error("the service's directory cannot be used: %s", error)
        return "UNAVAILABLE", "the service cannot use its directory now: try again later.", _RETRY
    if isinstance(error, FedSmoothError):
        return "INVALID_ARGUMENT", sentence, ()
    return "INTERNAL", "the service failed at this call: its log says why.", ()


def _shutting_down() -> ServiceError:
    return ServiceUnreachableError("the service is shutting down: try again later.", "UNAVAILABLE")


class _Unreadable:
    """Stands for a message that is none."""


def _lenient(deserialise: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    # What gRPC itself does about bytes that are no message: a trace in the log and its words to the caller.
    assert deserialise is not None

    def read(data: bytes) -> Any:
        try:
            return deserialise(data)
        except DecodeError:
            return _Unreadable()

    return read


def _readable(request: Any, check: Callable[[], None]) -> Any:
    if hasattr(request, "__aiter__"):
        return _each_readable(request, check)
    if isinstance(request, _Unreadable):
        raise ServiceError(
            "the request is no message of this service: use its certification.proto.",
            "INVALID_ARGUMENT",
        )
    return request


async def _each_readable(
    requests: AsyncIterator[Any], check: Callable[[], None]
) -> AsyncIterator[Any]:
    async for request in requests:
        check()
        yield _readable(request, check)


def _behaviour(handler: Any) -> Callable[..., Any]:
    behaviour: Callable[..., Any] | None = (
        handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    )
    assert behaviour is not None
    return behaviour
