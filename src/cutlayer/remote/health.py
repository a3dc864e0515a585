"""gRPC's standard health check, for orchestrators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from cutlayer.remote import network


def health_handler(running: Callable[[], bool]) -> Any:
    """Answers the health check by `running`. Watch is not offered: strangers could keep its streams open."""

    async def check(request: Any, context: Any) -> Any:
        if request.service not in ("", network.SERVICE):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r} is here")
        state = "SERVING" if running() else "NOT_SERVING"
        return health_pb2.HealthCheckResponse(status=state)

    handler = grpc.unary_unary_rpc_method_handler(
        check, health_pb2.HealthCheckRequest.FromString, health_pb2.HealthCheckResponse.SerializeToString
    )
    return grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": handler})
