"""gRPC servers and channels with the options that every process of LoRAServe uses."""

import ipaddress
from collections.abc import Iterable

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from loraserve.errors import BadInputError

DEFAULT_MAX_MESSAGE_BYTES = 16 * 1024**2
KEEPALIVE_TIME_S = 5.0
KEEPALIVE_TIMEOUT_S = 5.0
MAX_RECONNECT_BACKOFF_S = 2.0
CONNECT_TIMEOUT_S = 2.0

_COMMON_OPTIONS: tuple[tuple[str, int], ...] = (
    # The peer's host may be unreachable through a proxy that the environment names.
    ("grpc.enable_http_proxy", 0),
    ("grpc.keepalive_time_ms", int(KEEPALIVE_TIME_S * 1000)),
    ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),
    # A ping that finds the peer gone counts as its own; gRPC would wait a minute for it by default.
    ("grpc.http2.ping_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),
    ("grpc.http2.max_pings_without_data", 0),
)

_SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    # With it a second process would share a busy port in silence instead of being refused.
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    # Clients may ping at their own keepalive rate without being cut off.
    ("grpc.http2.min_ping_interval_without_data_ms", int(KEEPALIVE_TIME_S * 500)),
)

_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # Retries are the caller's, who knows what may be repeated.
    ("grpc.enable_retries", 0),
    # Each channel has a connection of its own, so that closing one never disturbs another.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", int(MAX_RECONNECT_BACKOFF_S * 1000)),
)


def _size_options(max_message_bytes: int) -> tuple[tuple[str, int], ...]:
    return (
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
    )


def make_server(
    *,
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    max_concurrent_rpcs: int | None = None,
) -> grpc.aio.Server:
    """A server without services or ports, for `bind` and `start`.

    Calls beyond `max_concurrent_rpcs` are refused with RESOURCE_EXHAUSTED.
    """
    options = (*_COMMON_OPTIONS, *_SERVER_OPTIONS, *_size_options(max_message_bytes))
    return grpc.aio.server(options=options, maximum_concurrent_rpcs=max_concurrent_rpcs)


def make_channel(
    address: str,
    *,
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    connect_timeout_s: float = CONNECT_TIMEOUT_S,
) -> grpc.aio.Channel:
    """A plaintext channel to `host:port`; connecting happens on first use.

    A call to a peer that does not answer fails after `connect_timeout_s`; to a port that nobody listens
    at, at once.
    """
    options = (
        *_COMMON_OPTIONS,
        *_CHANNEL_OPTIONS,
        # gRPC's name for the least time that a connection attempt is given.
        ("grpc.min_reconnect_backoff_ms", int(connect_timeout_s * 1000)),
        *_size_options(max_message_bytes),
    )
    return grpc.aio.insecure_channel(address, options=options)


def check_loopback(host: str, *, insecure_listen: bool) -> None:
    """BadInputError unless `host` is a loopback address or the operator insists."""
    if insecure_listen or host == "localhost":
        return
    try:
        if ipaddress.ip_address(host.strip("[]")).is_loopback:
            return
    except ValueError:
        pass
    raise BadInputError(
        f"host: {host} is not a loopback address and the service has no encryption or authentication;"
        " use 127.0.0.1, or pass --insecure-listen to listen there all the same"
    )


def bind(server: grpc.aio.Server, host: str, port: int, *, insecure_listen: bool = False) -> int:
    """Listen at `host:port` and return the port, which the system picks for 0.

    BadInputError for a host that is not loopback without `insecure_listen`, and for a busy port.
    """
    check_loopback(host, insecure_listen=insecure_listen)
    shown = f"[{host}]" if ":" in host and not host.startswith("[") else host
    try:
        bound = server.add_insecure_port(f"{shown}:{port}")
    except RuntimeError:
        bound = 0
    if bound == 0:
        raise BadInputError(
            f"port: cannot listen at {shown}:{port}: it is in use or not this machine's;"
            " choose another port, or 0 to have one picked"
        )
    return bound


class Health:
    """The `grpc.health.v1` answers of one server, all NOT_SERVING until told otherwise."""

    def __init__(self, server: grpc.aio.Server, services: Iterable[str]) -> None:
        self._names = (health.OVERALL_HEALTH, *services)
        self._serving = False
        self._servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    @property
    def serving(self) -> bool:
        """What was last set."""
        return self._serving

    async def set_serving(self, serving: bool) -> None:
        """Set every service of this server."""
        self._serving = serving
        response = health_pb2.HealthCheckResponse
        for name in self._names:
            await self._servicer.set(name, response.SERVING if serving else response.NOT_SERVING)

    async def enter_shutdown(self) -> None:
        """NOT_SERVING for good."""
        self._serving = False
        await self._servicer.enter_graceful_shutdown()


def add_reflection(server: grpc.aio.Server, services: Iterable[str]) -> None:
    """Let clients list and describe these services, health and reflection themselves."""
    reflection.enable_server_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
