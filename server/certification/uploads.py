"""Receiving a model: bounded in bytes and in time, believed in nothing."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fedsmooth_core.errors import ServiceError, ServiceUnreachableError
from server.certification import certification_pb2 as pb
from server.certification.limits import Limits

_BYTES_A_SECOND = 100_000
"""An upload slower than this, on average, is ended: as the Python client gives it up."""


class Uploads:
    """The places for models that are being received, ``max_uploads`` of them, in memory.

    Memory is taken as bytes come, never for what a caller announces.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._places = asyncio.Semaphore(limits.max_uploads)

    async def header(self, requests: AsyncIterator[pb.SubmitRequest]) -> pb.SubmitRequest.Header:
        """Read the first message.

        Raises:
            ServiceError: if it is no header, does not come, or announces a model that is too large.
        """
        first = await self._next(requests, self._limits.stall_seconds)
        if first is None or first.WhichOneof("part") != "header":
            raise _wrong("an upload begins with a header: send it in the first message.")
        announced = first.header.num_bytes
        if not announced:
            raise _wrong("the header announces no bytes: num_bytes is the length of the file.")
        if announced > self._limits.max_model_bytes:
            raise ServiceError(
                f"the model has {announced} bytes, and this service takes {self._limits.max_model_bytes}: "
                "submit a smaller one.",
                "RESOURCE_EXHAUSTED",
            )
        return first.header

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Hold one of the places while a model is in memory.

        Raises:
            ServiceUnreachableError: if none is free for ``stall_seconds``.
        """
        try:
            # While it waits it reads nothing: what the caller has sent stays at the caller's.
            async with asyncio.timeout(self._limits.stall_seconds):
                await self._places.acquire()
        except TimeoutError:
            raise ServiceUnreachableError(
                f"this service receives {self._limits.max_uploads} models at a time: try again later.",
                "RESOURCE_EXHAUSTED",
            ) from None
        try:
            yield
        finally:
            self._places.release()

    async def content(self, requests: AsyncIterator[pb.SubmitRequest], announced: int) -> bytes:
        """Read all other messages, and return the file.

        Raises:
            ServiceError: if more or fewer bytes come than the header announced, or another header.
            ServiceUnreachableError: if they come too slowly.
        """
        clock = asyncio.get_running_loop().time
        started, received = clock(), bytearray()
        limits = self._limits
        while True:
            slowest = limits.stall_seconds + len(received) / _BYTES_A_SECOND
            left = started + min(slowest, limits.upload_seconds) - clock()
            part = await self._next(requests, min(left, limits.stall_seconds))
            if part is None:
                break
            if part.WhichOneof("part") != "weights":
                raise _wrong("after the header only weights may follow.")
            if len(received) + len(part.weights) > announced:
                raise _wrong(f"more bytes came than the {announced} that the header announces.")
            received += part.weights
        if len(received) < announced:
            raise _wrong(
                f"{len(received)} bytes came of the {announced} that the header announces."
            )
        return bytes(received)

    async def _next(
        self, requests: AsyncIterator[pb.SubmitRequest], seconds: float
    ) -> pb.SubmitRequest | None:
        try:
            async with asyncio.timeout(seconds):
                return await anext(requests, None)
        except TimeoutError:
            raise ServiceUnreachableError(
                "the upload is too slow or has stalled: send the model again.", "DEADLINE_EXCEEDED"
            ) from None


def _wrong(sentence: str) -> ServiceError:
    return ServiceError(sentence, "INVALID_ARGUMENT")
