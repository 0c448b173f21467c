"""The breakers of a fabric: one for each scheme, one for each address that failed lately."""

import logging
from collections.abc import Mapping

from loraserve.clock import Clock
from placement.fabric.attempts import Outcome
from placement.fabric.breaker import Breaker, BreakerCommand, BreakerEvent, BreakerRules

logger = logging.getLogger(__name__)

_MAX_ADDRESSES = 1024

_OF_ADDRESS = {
    Outcome.UNREACHABLE: BreakerEvent.FAILED,
    Outcome.GONE: BreakerEvent.FAILED,
    Outcome.SLOW: BreakerEvent.FAILED,
    Outcome.CORRUPT: BreakerEvent.FAILED,
    Outcome.BROKEN: BreakerEvent.ABANDONED,
    Outcome.STOPPED: BreakerEvent.ABANDONED,
}
_OF_SCHEME = {
    Outcome.BROKEN: BreakerEvent.FAILED,
    Outcome.UNREACHABLE: BreakerEvent.ABANDONED,
    Outcome.GONE: BreakerEvent.ABANDONED,
    Outcome.SLOW: BreakerEvent.ABANDONED,
    Outcome.STOPPED: BreakerEvent.ABANDONED,
}
"""What an attempt's end says of its address and of its scheme; SUCCEEDED where nothing is named: the peer
answered."""


class Breakers:
    """Says whether a scheme and an address may be tried, and learns from how attempts end."""

    def __init__(self, rules: BreakerRules, clock: Clock) -> None:
        self._rules = rules
        self._clock = clock
        self._schemes: dict[str, Breaker] = {}
        self._addresses: dict[tuple[str, bytes], tuple[str, Breaker]] = {}

    def allows(self, scheme: str, address: bytes, peer: str) -> bool:
        """Whether an attempt may begin; if so its end must be told."""
        scheme_breaker = self._of_scheme(scheme)
        if not self._ask(scheme_breaker):
            return False
        if self._ask(self._of_address(scheme, address, peer)):
            return True
        scheme_breaker.handle(BreakerEvent.ABANDONED, self._clock.now_s())
        return False

    def learn(self, scheme: str, address: bytes, peer: str, outcome: Outcome, *, is_missing: bool) -> None:
        """An attempt that was allowed has ended so; `is_missing`: the scheme's library is not there."""
        event = _OF_ADDRESS.get(outcome, BreakerEvent.SUCCEEDED)
        self._tell(self._of_address(scheme, address, peer), event, f"replica {peer} over {scheme}")
        event = _OF_SCHEME.get(outcome, BreakerEvent.SUCCEEDED)
        self._tell(self._of_scheme(scheme), BreakerEvent.MISSING if is_missing else event, scheme)
        self._forget_idle()

    def blame_scheme(self, scheme: str) -> None:
        """A peer that could not be reached over this scheme was reached over another."""
        self._tell(self._of_scheme(scheme), BreakerEvent.FAILED, scheme)

    def not_closed(self) -> Mapping[str, str]:
        """The breakers that keep attempts away, or have just begun to try again, and their states."""
        named = [*self._schemes.items()]
        named += [(f"{peer}/{scheme}", one) for (scheme, _), (peer, one) in self._addresses.items()]
        return {name: one.state.value for name, one in named if one.state.value != "closed"}

    def _of_scheme(self, scheme: str) -> Breaker:
        return self._schemes.setdefault(scheme, Breaker(self._rules))

    def _of_address(self, scheme: str, address: bytes, peer: str) -> Breaker:
        # By address: a replica that was started again is not blamed for the one before.
        return self._addresses.setdefault((scheme, address), (peer, Breaker(self._rules)))[1]

    def _ask(self, breaker: Breaker) -> bool:
        return BreakerCommand.ALLOW in breaker.handle(BreakerEvent.ASKED, self._clock.now_s())

    def _tell(self, breaker: Breaker, event: BreakerEvent, name: str) -> None:
        now_s = self._clock.now_s()
        said = breaker.handle(event, now_s)
        if BreakerCommand.OPENED in said:
            logger.warning("%s keeps failing: not tried for %.3g s", name, breaker.open_until_s - now_s)
        elif BreakerCommand.CLOSED in said:
            logger.info("%s works again", name)

    def _forget_idle(self) -> None:
        """Keep only what says something, and not for ever: addresses come and go with processes."""
        for key in [key for key, (_, one) in self._addresses.items() if one.is_idle]:
            del self._addresses[key]
        while len(self._addresses) > _MAX_ADDRESSES:
            del self._addresses[next(iter(self._addresses))]
