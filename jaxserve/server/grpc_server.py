"""The gRPC server: services, limits and its port."""

from __future__ import annotations

import errno
from concurrent.futures import Executor
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from jaxserve.proto.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from jaxserve.server.access.door import Door
from jaxserve.server.access.grpc_access import RequireAccess, check_rules
from jaxserve.server.config import ServerConfig
from jaxserve.server.control_servicer import ControlServicer
from jaxserve.server.early_refusals import RefuseEarly
from jaxserve.server.health import HealthReporter
from jaxserve.server.inference_servicer import InferenceServicer
from jaxserve.server.malformed import RefuseMalformed
from jaxserve.server.ports import check_can_listen, listen_error
from jaxserve.server.state import ServerState
from jaxserve.server.tls import TlsKeeper

KEEPALIVE_S = 60
KEEPALIVE_TIMEOUT_S = 20
MIN_CLIENT_PING_INTERVAL_S = 10
MAX_PING_STRIKES = 3


def channel_options(config: ServerConfig) -> list[tuple[str, Any]]:
    """gRPC core's settings, each a limit on what one client can cost."""
    options: list[tuple[str, Any]] = [
        ("grpc.so_reuseport", 0),  # A busy port is an error, not a share of it.
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", config.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", config.max_metadata_bytes),
        ("grpc.max_concurrent_streams", config.max_concurrent_streams),
        ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_CLIENT_PING_INTERVAL_S * 1000),
        ("grpc.http2.max_ping_strikes", MAX_PING_STRIKES),
    ]
    if config.max_connection_age_s is not None:
        options.append(("grpc.max_connection_age_ms", int(config.max_connection_age_s * 1000)))
    return options


def create_grpc_server(
    config: ServerConfig,
    state: ServerState,
    health: HealthReporter,
    workers: Executor,
    door: Door,
    tls: TlsKeeper | None = None,
) -> tuple[grpc.aio.Server, int]:
    """A server that listens once it is started, and its port.

    Must be called on the running event loop. Raises ConfigError when the port
    cannot be had.
    """
    server = grpc.aio.server(
        options=channel_options(config),
        interceptors=(RequireAccess(door.ring, state), RefuseEarly(state), RefuseMalformed()),
        maximum_concurrent_rpcs=config.max_concurrent_calls,
    )
    check_rules(file.services_by_name[name] for file, name in _SERVICES)
    inference = InferenceServicer(state, workers, door, config.pacing)
    inference_pb2_grpc.add_InferenceServicer_to_server(inference, server)
    control_pb2_grpc.add_ControlServicer_to_server(ControlServicer(state, config.lora_dir), server)
    health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
    if config.reflection:
        names = [
            *(file.services_by_name[name].full_name for file, name in _SERVICES),
            reflection.SERVICE_NAME,
        ]
        reflection.enable_server_reflection(names, server)
    check_can_listen("--grpc-port", config.host, config.grpc_port)
    host = f"[{config.host}]" if ":" in config.host else config.host
    try:
        address = f"{host}:{config.grpc_port}"
        if tls is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, tls.grpc_credentials())
    except RuntimeError as error:  # Taken since it was looked at, most likely.
        taken = OSError(errno.EADDRINUSE, "")
        raise listen_error("--grpc-port", config.host, config.grpc_port, taken) from error
    return server, port


_SERVICES = (
    (inference_pb2.DESCRIPTOR, "Inference"),
    (control_pb2.DESCRIPTOR, "Control"),
    (health_pb2.DESCRIPTOR, "Health"),
)
