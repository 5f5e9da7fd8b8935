"""Client of a process's gRPC health service, for the health checks of containers."""

from __future__ import annotations

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

WAIT_S = 5.0  # longest wait for an answer, in seconds


def ask_health(address: str) -> str:
    """Query a process's health service.

    Args:
        address: address of the health service, such as 127.0.0.1:9098.

    Returns:
        The problem, or an empty text if the process is healthy.
    """
    with grpc.insecure_channel(address) as channel:
        try:
            found = HealthStub(channel).Check(HealthCheckRequest(), timeout=WAIT_S)
        except grpc.RpcError as error:
            return f"its health service at {address} does not answer ({error.code().name})"
    if found.status != HealthCheckResponse.SERVING:
        return f"its health service at {address} reports {found.status}"
    return ""
