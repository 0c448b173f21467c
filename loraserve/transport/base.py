"""The protocol of the fabric's transports.

A process publishes regions under keys; another one fetches them with an address that came to it some other
way, as opaque bytes. A region has a head, small and read as a whole, and a body, read into the place where it
is to lie. What the bytes mean is nobody's business here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from loraserve.errors import StaleError, UnavailableError, WorkFailedError
from loraserve.pace import Pace

MAX_HEAD_BYTES = 16 * 1024**2
MAX_KEY_BYTES = 1024

Buffer = Any
"""A contiguous buffer of host memory (anything `memoryview` takes), or one of device memory
(`__cuda_array_interface__`), which only transports with `takes_device_memory` take."""


class TransportError(WorkFailedError):
    """A transfer failed; another transport, or another peer, may do better."""


class PeerGoneError(TransportError, UnavailableError):
    """The peer cannot be reached, or went away in the middle."""


class PeerSlowError(TransportError, UnavailableError):
    """The peer sent nothing for as long as it was allowed to."""


class PeerBusyError(TransportError, UnavailableError):
    """The peer is there and refuses, since it serves as many as it can."""


class PeerFailedError(TransportError, UnavailableError):
    """The peer is there and says that it failed: its fault, not that of the transport here."""


class NotPublishedError(TransportError, StaleError):
    """The peer serves no region under this key (any more)."""


class BadPeerError(TransportError):
    """The peer, or whoever answers at its address, does not speak this protocol."""


class FetchStoppedError(TransportError):
    """Whoever wanted the bytes does not want them any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """What is published: a head of at most `MAX_HEAD_BYTES`, and a body that does not change.

    `fd` and `fd_offset` name the same body in a file (a sealed memfd), for transports that send files
    without copying them; -1: there is none. Whoever still reads a region keeps a reference to it, and so its
    memory; `fd` must stay open as long (put what owns it into `owner`).
    """

    head: bytes
    body: Buffer
    size_bytes: int
    fd: int = -1
    fd_offset: int = 0
    owner: object = None


Progress = Callable[[int, int], None]
"""Called with (begin, end) in the fetching thread once these bytes of the body are in place; ranges come in
any order and do not overlap. What it raises ends the fetch."""


class Transport(Protocol):
    """One way to move regions.

    Thread-safe. Methods block; `read_head` and `fetch` may run in several threads at once. A fetch that
    fails may have written to its destination, and writes nothing more once it has returned or raised.
    Every wait is bounded: `idle_timeout_s` is how long a peer may send nothing. `piece_bytes` is about how
    much of a body comes between two calls of `on_bytes`; set to less, for fetches from then on, less is done
    at a time. Threads that give bodies to peers keep the `pace`, where there is one.
    """

    scheme: str
    takes_device_memory: bool
    piece_bytes: int
    pace: Pace | None

    @property
    def address(self) -> bytes:
        """What a peer of the same scheme needs to reach this process; at most 4 KiB."""
        ...

    def publish(self, key: str, region: Region) -> None:
        """Serve the region under this key from now on; AlreadyExistsError for one that is served."""
        ...

    def withdraw(self, key: str) -> None:
        """Serve it no more; transfers that run go on to their end. What is not served is no error."""
        ...

    def read_head(self, address: bytes, key: str, *, idle_timeout_s: float) -> tuple[bytes, int]:
        """The region's head, and how many bytes its body has. TransportError."""
        ...

    def fetch(
        self,
        address: bytes,
        key: str,
        into: Buffer,
        *,
        on_bytes: Progress,
        idle_timeout_s: float,
        stop: Callable[[], bool],
    ) -> None:
        """Fill `into`, which is exactly as long as the body, and return when all of it is in place.

        `stop` is asked often, also while nothing comes; once it says so, FetchStoppedError. TransportError
        otherwise, BadPeerError if the body has another length.
        """
        ...

    def active_bytes(self) -> int:
        """Bytes of regions that are being read by or from this process now."""
        ...

    def close(self) -> None:
        """Serve nothing, end every transfer and give all threads and sockets back; safe to call twice."""
        ...
