"""Where one acquisition tries to get its bytes, one source after the other: events in, commands out.

Peers come in the order of preference, each with its schemes in theirs; the origin comes last. What an outcome
says decides what is left: a peer that lied or serves no such thing is out, one that broke off or was slow is
tried again over another scheme, but after all others, one that could not be reached over one scheme is tried
over the next at once.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

DEFAULT_MAX_ATTEMPTS = 8


class Outcome(Enum):
    """How an attempt ended.

    REFUSED: a breaker did not let it begin. UNREACHABLE: nobody serves over this scheme, or says that it
    cannot now. BROKEN: the scheme itself failed. GONE: the peer went away in the middle. SLOW: it sent
    nothing for too long. CORRUPT: what it sent is wrong, or too short. NOT_PUBLISHED: it has no such segment.
    UNUSABLE: it is the right one, and cannot be used here, wherever it comes from. FAILED: the origin has
    failed. STOPPED: nobody wants it.
    """

    DONE = "done"
    REFUSED = "refused"
    UNREACHABLE = "unreachable"
    BROKEN = "broken"
    GONE = "gone"
    SLOW = "slow"
    CORRUPT = "corrupt"
    NOT_PUBLISHED = "not published"
    UNUSABLE = "unusable"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerChoice:
    """A peer and the schemes that it can be reached over, the preferred first."""

    peer_id: str
    schemes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """The acquisition has its turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The attempt that was asked for last has ended so."""

    outcome: Outcome


AttemptEvent = Begun | Ended


@dataclass(frozen=True, slots=True, kw_only=True)
class TryPeer:
    """Fetch from this peer over this scheme; answered by Ended."""

    peer_id: str
    scheme: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TryOrigin:
    """Read it from the origin; answered by Ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """It is here; nothing more is asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    """It cannot be had; nothing more is asked. `reason` is the last outcome, None if there was no source."""

    reason: Outcome | None


AttemptCommand = TryPeer | TryOrigin | Finish | GiveUp

_PEER_IS_OUT = frozenset({Outcome.CORRUPT, Outcome.NOT_PUBLISHED})
_PEER_COMES_LAST = frozenset({Outcome.GONE, Outcome.SLOW})
_NOTHING_HELPS = frozenset({Outcome.UNUSABLE, Outcome.STOPPED})


class Attempts:
    """One door: `handle(event) -> commands`, exactly one command for each event; ValueError for one that
    does not answer the last command. Each pair of peer and scheme is tried once at most, and `max_attempts`
    peers' attempts at most begin; the origin may always be tried."""

    def __init__(
        self,
        peers: Iterable[PeerChoice],
        *,
        has_origin: bool,
        max_attempts: int = DEFAULT_MAX_ATTEMPTS,
    ) -> None:
        pairs = ((peer.peer_id, scheme) for peer in peers for scheme in peer.schemes)
        # A peer that is named twice is still one.
        self._left: list[tuple[str, str]] = list(dict.fromkeys(pairs))
        self._has_origin = has_origin
        self._attempts_left = max_attempts
        self._asked: TryPeer | TryOrigin | None = None
        self._has_begun = False

    def handle(self, event: AttemptEvent) -> tuple[AttemptCommand, ...]:
        """Take one event in and say what is to be done."""
        match event:
            case Begun():
                if self._has_begun:
                    raise ValueError("has begun already")
                self._has_begun = True
                return (self._next(None),)
            case Ended(outcome=outcome):
                asked, self._asked = self._asked, None
                if asked is None:
                    raise ValueError(f"{outcome.value}: no attempt was asked for")
                return (self._after(asked, outcome),)

    def _after(self, asked: TryPeer | TryOrigin, outcome: Outcome) -> AttemptCommand:
        if outcome is Outcome.DONE:
            return Finish()
        if outcome in _NOTHING_HELPS or isinstance(asked, TryOrigin):
            return GiveUp(reason=outcome)
        if outcome is Outcome.REFUSED:
            self._attempts_left += 1
        same = [pair for pair in self._left if pair[0] == asked.peer_id]
        others = [pair for pair in self._left if pair[0] != asked.peer_id]
        if outcome in _PEER_IS_OUT:
            self._left = others
        elif outcome in _PEER_COMES_LAST:
            self._left = others + same
        return self._next(outcome)

    def _next(self, last: Outcome | None) -> AttemptCommand:
        if self._left and self._attempts_left > 0:
            self._attempts_left -= 1
            peer_id, scheme = self._left.pop(0)
            self._asked = TryPeer(peer_id=peer_id, scheme=scheme)
        elif self._has_origin:
            self._has_origin = False
            self._asked = TryOrigin()
        else:
            return GiveUp(reason=last)
        return self._asked
