"""Asking a process's gRPC health service, as containers do."""

from __future__ import annotations

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

WAIT_S = 5.0


def ask_health(address: str) -> str:
    """What is wrong with a process.

    Args:
        address: of its health service, as 127.0.0.1:9098.

    Returns:
        Nothing if it serves.
    """
    with grpc.insecure_channel(address) as channel:
        try:
            found = HealthStub(channel).Check(HealthCheckRequest(), timeout=WAIT_S)
        except grpc.RpcError as error:
            return f"its health service at {address} does not answer ({error.code().name})"
    if found.status != HealthCheckResponse.SERVING:
        return f"its health service at {address} says {found.status}"
    return ""
