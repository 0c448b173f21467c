"""What `scripts/bench/chaos` decides without looking at a cluster: what to kill, what an answer is worth."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import ceil
from random import Random


class Kind(StrEnum):
    """What is killed; a link is cut and restored."""

    REPLICA = "replica"
    ENGINE = "engine"
    CONTROLLER = "controller"
    ROUTER = "router"
    LINK = "link"


WEIGHTS: Mapping[Kind, int] = {
    Kind.REPLICA: 30,
    Kind.ENGINE: 20,
    Kind.CONTROLLER: 15,
    Kind.ROUTER: 20,
    Kind.LINK: 15,
}


class Bucket(StrEnum):
    """How a request ended; each one is in exactly one of these."""

    COMPLETED = "completed"
    ENDED_UNAVAILABLE = "ended_unavailable"
    REFUSED = "refused"
    LOST = "lost"
    DUPLICATED = "duplicated"
    WRONG_ADAPTER = "wrong_adapter"


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a request says when nothing happens; `finish` is a finish reason's value."""

    token_ids: tuple[int, ...]
    text: str
    finish: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """What came of a request; `finishes` are the finish reasons of all its steps, in order."""

    token_ids: tuple[int, ...] = ()
    text: str = ""
    finishes: tuple[str, ...] = ()


def plan_kills(num_kills: int, *, links: bool, seed: int) -> list[Kind]:
    """The order of the kills; each kind has its share of any number of them, as near as can be.

    Without `links` their share goes to the others.
    """
    weights = {kind: weight for kind, weight in WEIGHTS.items() if links or kind is not Kind.LINK}
    total = sum(weights.values())
    shares = {kind: num_kills * weight / total for kind, weight in weights.items()}
    counts = {kind: int(share) for kind, share in shares.items()}
    by_rest = sorted(shares, key=lambda kind: (counts[kind] - shares[kind], kind))
    for kind in by_rest[: num_kills - sum(counts.values())]:
        counts[kind] += 1
    order = [kind for kind, count in counts.items() for _ in range(count)]
    Random(seed).shuffle(order)
    return order


def judge_whole(expected: Expected, received: Received) -> tuple[Bucket, str]:
    """The bucket of a request that ended well by its own account, and what is wrong with it, '' if nothing.

    Tokens that come a second time are duplicated; anything else that is not as expected is lost.
    """
    if len(received.finishes) > 1:
        return Bucket.DUPLICATED, f"it ended {len(received.finishes)} times"
    bucket, wrong = judge_part(expected, received)
    if wrong:
        return bucket, wrong
    missing = len(expected.token_ids) - len(received.token_ids)
    if missing:
        return Bucket.LOST, f"the last {missing} of {len(expected.token_ids)} tokens are missing"
    if received.text != expected.text:
        return Bucket.LOST, f"the tokens are right and the text is not: {_difference(expected, received)}"
    if received.finishes != (expected.finish,):
        return Bucket.LOST, f"it ended with {received.finishes}, not {expected.finish}"
    return Bucket.COMPLETED, ""


def judge_part(expected: Expected, received: Received) -> tuple[Bucket, str]:
    """The same for a request that ended early: what came must be how the answer begins."""
    want, got = expected.token_ids, received.token_ids
    at = next((at for at, pair in enumerate(zip(want, got, strict=False)) if pair[0] != pair[1]), None)
    if at is None and len(got) <= len(want):
        if not expected.text.startswith(received.text):
            return Bucket.LOST, f"the text is not the beginning: {_difference(expected, received)}"
        return Bucket.ENDED_UNAVAILABLE, ""
    at = len(want) if at is None else at
    if _repeats(want, got[at:], at):
        return Bucket.DUPLICATED, f"from token {at} of {len(want)} on it says again what it has said"
    if got[at:] and _found(want, got[at:], at + 1):
        return Bucket.LOST, f"tokens are missing after token {at} of {len(want)}"
    return Bucket.LOST, f"from token {at} of {len(want)} on it is another text ({len(got)} tokens came)"


def _repeats(want: Sequence[int], rest: Sequence[int], at: int) -> bool:
    """Whether the rest begins anew at an earlier place of the answer."""
    return any(_begins(want[start:], rest) for start in range(at))


def _found(want: Sequence[int], rest: Sequence[int], first: int) -> bool:
    return any(_begins(want[start:], rest) for start in range(first, len(want)))


def _begins(long: Sequence[int], rest: Sequence[int]) -> bool:
    size = min(len(long), len(rest), 8)
    return size > 0 and tuple(long[:size]) == tuple(rest[:size])


def _difference(expected: Expected, received: Received) -> str:
    pairs = zip(expected.text, received.text, strict=False)
    at = next((at for at, (want, got) in enumerate(pairs) if want != got), None)
    at = min(len(expected.text), len(received.text)) if at is None else at
    return f"at character {at} {received.text[at : at + 12]!r} instead of {expected.text[at : at + 12]!r}"


class Tally:
    """Every request in exactly one bucket, from its beginning to its end."""

    def __init__(self) -> None:
        self.issued = 0
        self.open = 0
        self.buckets: Counter[Bucket] = Counter()

    def begin(self) -> None:
        """A request is sent."""
        self.issued += 1
        self.open += 1

    def end(self, bucket: Bucket) -> None:
        """It has ended."""
        self.open -= 1
        self.buckets[bucket] += 1

    def check(self) -> None:
        """AssertionError unless every request is accounted for."""
        ended = sum(self.buckets.values())
        assert self.issued == ended + self.open, f"{self.issued} issued, {ended} ended, {self.open} open"


def percentile(values: Iterable[float], share: float) -> float | None:
    """The smallest value that `share` of all do not exceed (nearest rank); None of nothing."""
    ordered = sorted(values)
    return ordered[max(0, ceil(share * len(ordered)) - 1)] if ordered else None
