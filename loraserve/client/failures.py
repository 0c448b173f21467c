"""What a failed call tells the client: whether it was sent, whether the peer is lost, which error it is."""

from collections.abc import Sequence

import grpc

from loraserve.client_types import ServedBy
from loraserve.errors import LoraServeError, UnavailableError
from loraserve.rpc.status import error_of

NOT_CONNECTED = ("failed to connect", "DNS resolution failed", "name resolution failure")
"""How gRPC's words for a call that never left this machine begin."""

MARK = "loraserve-"
"""The prefix of the trailing metadata with which a router says that the answer is its own."""


def is_unavailable(error: grpc.aio.AioRpcError) -> bool:
    """Whether the peer, or what it needs, was lost or could not be reached.

    A server that is being stopped cancels calls that come meanwhile; nobody asks here about those that the
    caller cancelled.
    """
    return error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


def never_sent(error: grpc.aio.AioRpcError) -> bool:
    """Whether the call failed for want of a connection, so that nothing of it was ever sent."""
    # The beginning alone: a router that tells why it does not reach the cluster quotes them.
    return is_unavailable(error) and (error.details() or "").startswith(NOT_CONNECTED)


def is_told(error: grpc.aio.AioRpcError) -> bool:
    """Whether a router that admitted the call ended it, as opposed to a connection or router that went."""
    metadata = error.trailing_metadata()
    return any(str(key).startswith(MARK) for key, _ in metadata or ())


def error_from(error: grpc.aio.AioRpcError, what: str, addresses: Sequence[str]) -> LoraServeError:
    """The error that a person sees; `what` is router or replica.

    A connection that failed is told by its address: gRPC's own text is no help to a person.
    """
    return unreachable(what, addresses) if never_sent(error) else error_of(error)


def unreachable(what: str, addresses: Sequence[str]) -> UnavailableError:
    """The error of peers that nobody listens at."""
    plural = "s" if len(addresses) > 1 else ""
    return UnavailableError(f"{what}{plural} {', '.join(addresses)}: cannot be reached; is the cluster up?")


def served_by(metadata: object) -> ServedBy:
    """What a router's trailing metadata says of its choice."""
    if not isinstance(metadata, grpc.aio.Metadata):
        return ServedBy()
    version = metadata.get(f"{MARK}table-version")
    failovers = metadata.get(f"{MARK}failovers")
    return ServedBy(
        replica=_text(metadata.get(f"{MARK}replica")),
        table_version=int(version) if version is not None and version.isdigit() else None,
        reason=_text(metadata.get(f"{MARK}reason")),
        failovers=int(failovers) if failovers is not None and failovers.isdigit() else 0,
    )


def _text(value: str | bytes | None) -> str | None:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
