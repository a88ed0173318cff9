"""Connections of the HTTP listener: one that asks nothing is closed, so that it takes no place for ever."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

SECONDS = 10.0
"""A connection whose next request has not come within this time, or twice it at most, is closed."""


class ImpatientProtocol(H11Protocol):
    """HTTP/1.1 by uvicorn, which itself waits without end for the headers of a request."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(  # type: ignore[override]  # as in uvicorn: it knows its transport
        self, transport: asyncio.Transport
    ) -> None:
        super().connection_made(transport)
        self._look(self.cycle, is_first=True)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _look(self, before: RequestResponseCycle | None, is_first: bool = False) -> None:
        waits = self.cycle is None or self.cycle.response_complete
        if not is_first and waits and self.cycle is before:
            self.transport.close()
            return
        self._timer = self.loop.call_later(SECONDS, self._look, self.cycle)
