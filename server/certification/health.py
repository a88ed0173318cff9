"""grpc.health.v1 for any number of watchers who come and go."""

import asyncio

from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer

from server.certification.guard import Context

_SECONDS = 0.1
"""Between two looks at the status."""


class Health(HealthServicer):  # type: ignore[misc]
    """The servicer of grpcio-health-checking, but for Watch.

    There a watcher that leaves takes the others' news with it: they are never told of a change again.
    """

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> None:
        """Tell the status of a service now, and whenever it has changed, until the caller leaves."""
        told = None
        unknown = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        while True:
            status = self._server_status.get(request.service, unknown)
            if status != told:
                await context.write(health_pb2.HealthCheckResponse(status=status))
            told = status
            await asyncio.sleep(_SECONDS)
