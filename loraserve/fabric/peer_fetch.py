"""One attempt to get a segment from a peer, in a thread of the fabric's: the head, then the body.

Nothing is allocated before the head is known to be the one that the control plane told, and nothing is sealed
before the body is known to be the head's.
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

from loraserve.adapters.body_hashes import ChunkHasher, CorruptError
from loraserve.adapters.segment import AdapterSegment, SegmentError, SegmentHead, SegmentWriter
from loraserve.clock import Clock
from loraserve.errors import OverloadedError
from loraserve.fabric.verify import verifier
from loraserve.fabric.wanted import Wanted
from loraserve.pace import no_rest
from loraserve.transport.base import (
    BadPeerError,
    FetchStoppedError,
    NotPublishedError,
    PeerBusyError,
    PeerFailedError,
    PeerGoneError,
    PeerSlowError,
    Transport,
    TransportError,
)
from placement.fabric.attempts import Outcome

SLOW_IDLES = 4
"""A peer that drips is as good as silent: some piece must be whole within so many times of what it may be
silent, but not within less than `MIN_SLOW_S`, which a busy machine may take."""

MIN_SLOW_S = 5.0

_MAX_TEXT = 200


class UnusableError(Exception):
    """The head is the right one, and what it describes cannot be used here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSource:
    """A peer as one transport reaches it."""

    transport: Transport
    address: bytes
    replica_id: str

    def __str__(self) -> str:
        return f"replica {self.replica_id} over {self.transport.scheme}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A checked head, as it came and as it reads."""

    raw: bytes
    decoded: SegmentHead


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """What came: a sealed segment, and the seconds for its bytes and for what was left to verify then."""

    segment: AdapterSegment
    body_s: float
    verify_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """How a step failed, in one line; `is_missing`: the scheme's library is not there."""

    outcome: Outcome
    text: str
    is_missing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetching:
    """What the steps of an attempt need to know; `tell` hears how many bytes are in place, and `rest` is
    called after each piece of work."""

    clock: Clock
    verifiers: Executor
    idle_timeout_s: float
    is_stopped: Callable[[], bool]
    tell: Callable[[int], None]
    rest: Callable[[], None] = no_rest


def fetch_head(source: PeerSource, wanted: Wanted, idle_timeout_s: float) -> Head | Failure:
    """Ask for the head and check it."""
    try:
        return _checked_head(source, wanted, idle_timeout_s)
    except Exception as error:  # A transport that fails in whatever way is replaced by the next one.
        return _failure(error, had_head=False)


def fetch_body(source: PeerSource, wanted: Wanted, head: Head, fetching: Fetching) -> Body | Failure:
    """Allocate, fetch and verify the body; a failure leaves nothing behind. OverloadedError if the system has
    no memory."""
    try:
        writer = SegmentWriter(head.decoded)
    except OSError as error:
        raise OverloadedError(
            f"{wanted.version_id}: no memory for {head.decoded.body_bytes} bytes: {error}"
        ) from error
    # Errors end here, and with them what they hold of the writer's memory.
    try:
        body_s, verify_s = _fill(writer, source, wanted, head.decoded, fetching)
        return Body(segment=writer.seal(), body_s=body_s, verify_s=verify_s)
    except Exception as error:  # As above.
        return _failure(error, had_head=True)
    finally:
        writer.abandon()


def _checked_head(source: PeerSource, wanted: Wanted, idle_timeout_s: float) -> Head:
    raw, body_bytes = source.transport.read_head(
        source.address, wanted.version_id, idle_timeout_s=idle_timeout_s
    )
    found = hashlib.sha256(raw).hexdigest()
    if found != wanted.head_sha256:
        raise CorruptError(f"its head hashes to {found[:16]}, expected {wanted.head_sha256[:16]}")
    try:
        head = SegmentHead.decode(raw)
        head.check_fits(
            name=wanted.version_id,
            digest=wanted.digest or head.digest,
            max_lora_rank=wanted.max_lora_rank,
            max_bytes=wanted.max_bytes,
        )
    except SegmentError as error:
        raise UnusableError(str(error)) from error
    if body_bytes != head.body_bytes:
        raise CorruptError(f"its body has {body_bytes} bytes, expected {head.body_bytes}")
    return Head(raw=bytes(raw), decoded=head)


class _Watch:
    """What the transport tells of a body on its way, and what ends it."""

    def __init__(self, hasher: ChunkHasher, fetching: Fetching) -> None:
        self._hasher = hasher
        self._fetching = fetching
        self._num_bytes = 0
        self._slow_s = max(SLOW_IDLES * fetching.idle_timeout_s, MIN_SLOW_S)
        self._moved_at_s = fetching.clock.now_s()
        self._is_slow = False

    def on_bytes(self, begin: int, end: int) -> None:
        """These bytes are in place; CorruptError if they, or earlier ones, cannot be right."""
        self._hasher.on_bytes(begin, end)
        self._num_bytes += end - begin
        self._moved_at_s = self._fetching.clock.now_s()
        self._fetching.tell(self._num_bytes)
        self._fetching.rest()

    def stop(self) -> bool:
        """Whether the transport is to end the fetch."""
        self._is_slow = self._is_slow or self._fetching.clock.now_s() > self._moved_at_s + self._slow_s
        return self._is_slow or self._fetching.is_stopped() or self._hasher.has_failed

    def check(self) -> None:
        """CorruptError or PeerSlowError if that is what the transport was stopped for."""
        self._hasher.check()
        if self._is_slow:
            raise PeerSlowError(f"no piece in {self._slow_s:g} s after {self._num_bytes} bytes") from None


def _fill(
    writer: SegmentWriter, source: PeerSource, wanted: Wanted, head: SegmentHead, fetching: Fetching
) -> tuple[float, float]:
    hasher = verifier(head, writer.body, fetching.verifiers, fetching.rest)
    watch = _Watch(hasher, fetching)
    began_s = fetching.clock.now_s()
    try:
        source.transport.fetch(
            source.address,
            wanted.version_id,
            writer.body,
            on_bytes=watch.on_bytes,
            idle_timeout_s=fetching.idle_timeout_s,
            stop=watch.stop,
        )
        fetched_s = fetching.clock.now_s()
        while hasher.work():
            fetching.rest()
            if fetching.is_stopped():
                raise FetchStoppedError("nobody wants it any more")
        hasher.finish()
    except BaseException:
        hasher.stop()
        watch.check()
        raise
    return fetched_s - began_s, fetching.clock.now_s() - fetched_s


def _failure(error: Exception, *, had_head: bool) -> Failure:
    outcome = _outcome(error, had_head=had_head)
    text = str(error).replace("\n", " ")
    if outcome is Outcome.BROKEN and not isinstance(error, TransportError):
        text = f"{type(error).__name__}: {text}"
    return Failure(outcome=outcome, text=text[:_MAX_TEXT], is_missing=isinstance(error, ImportError))


def _outcome(error: Exception, *, had_head: bool) -> Outcome:
    """What an error says about the peer and the scheme."""
    match error:
        case UnusableError():
            return Outcome.UNUSABLE
        case CorruptError():
            return Outcome.CORRUPT
        case FetchStoppedError():
            return Outcome.STOPPED
        case NotPublishedError():
            return Outcome.NOT_PUBLISHED
        case PeerSlowError():
            return Outcome.SLOW
        case PeerBusyError() | PeerFailedError():
            return Outcome.UNREACHABLE
        case PeerGoneError():
            return Outcome.GONE if had_head else Outcome.UNREACHABLE
        case BadPeerError():
            return Outcome.CORRUPT if had_head else Outcome.UNREACHABLE
        case _:
            return Outcome.BROKEN
