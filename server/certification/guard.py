"""What every call passes through: who calls, how many at a time, and what becomes of an error."""

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
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

CALLER: ContextVar[str] = ContextVar("caller")
"""Whose token the call under way came with, and from where: for the log."""

# gRPC's classes are generic for type checkers alone.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class Guard(grpc.aio.ServerInterceptor):
    """Lets calls in and turns errors into a status with one sentence; never a trace to the caller.

    Args:
        tokens: who may call; None lets in everybody whom TLS lets in.
        max_calls: calls at a time; health is not counted.
        count: is told the method and the status of each call that has ended.
    """

    def __init__(
        self, tokens: Tokens | None, max_calls: int, count: Callable[[str, str], None]
    ) -> None:
        self._tokens = tokens
        self._max_calls = max_calls
        self._count = count
        self._active: set[asyncio.Task[Any]] = set()
        self._draining = False

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        method = handler_call_details.method
        handler = await continuation(handler_call_details)
        if method.startswith(_HEALTH):
            return handler
        metadata = dict(handler_call_details.invocation_metadata or ())
        try:
            caller = self._admit(metadata.get("authorization"))
        except ServiceError as error:
            return self._refusing(method, error)
        return self._guarded(handler, method, caller)

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
        caller = "anybody"
        if self._tokens is not None:
            text = authorization if isinstance(authorization, str) else None
            caller = self._tokens.name_of(text)
        if self._draining:
            raise _shutting_down()
        if len(self._active) >= self._max_calls:
            raise ServiceUnreachableError(
                f"the service has {self._max_calls} calls at a time: try again later.",
                "RESOURCE_EXHAUSTED",
            )
        return caller

    def _refusing(self, method: str, refusal: ServiceError) -> Handler:
        async def refuse(requests: object, context: Context) -> None:
            async with self._answering(context, method, "somebody"):
                raise refusal

        # Whatever kind of call it is: no request is read, and no response is sent.
        return grpc.stream_unary_rpc_method_handler(refuse)

    def _guarded(self, handler: Handler, method: str, caller: str) -> Handler:
        if handler is None:
            return None
        inner = _behaviour(handler)

        async def unary(request: Any, context: Context) -> Any:
            async with self._answering(context, method, caller):
                return await inner(_readable(request), context)

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            async with self._answering(context, method, caller):
                async for response in inner(_readable(request), context):
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
    async def _answering(self, context: Context, method: str, caller: str) -> AsyncIterator[None]:
        task = asyncio.current_task()
        assert task is not None
        name = method.rpartition("/")[2]
        self._active.add(task)
        CALLER.set(f"{caller} at {context.peer()}")
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
                _log.info("refused %s for %s: %s: %s", name, CALLER.get(), status, sentence)
            await context.abort(grpc.StatusCode[status], sentence, trailing)
        finally:
            self._active.discard(task)
            self._count(name, status)


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


def _readable(request: Any) -> Any:
    if hasattr(request, "__aiter__"):
        return _each_readable(request)
    if isinstance(request, _Unreadable):
        raise ServiceError(
            "the request is no message of this service: use its certification.proto.",
            "INVALID_ARGUMENT",
        )
    return request


async def _each_readable(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _readable(request)


def _behaviour(handler: Any) -> Callable[..., Any]:
    behaviour: Callable[..., Any] | None = (
        handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    )
    assert behaviour is not None
    return behaviour
