"""What if: a workload and a cluster that are as they are but for a few things.

More adapters, more or less traffic of some, replicas lost for good. All of it is a pure function of a drawn
workload and a seed, and requests that nothing is asked about stay bit for bit.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import count, islice

import numpy as np
from numpy.typing import NDArray

from loraserve.errors import BadInputError
from loraserve.simulator.scenario import MAX_DURATION_S, Failure
from placement.types import ReplicaId
from traces.columns import TraceAdapter, TraceColumns
from traces.synthesis.checks import MAX_ADAPTERS, MAX_RANK, MAX_REQUESTS
from traces.synthesis.portable import stream

BASE_NAME = "base"
MAX_FACTOR = 1000.0
_SCALED, _ADDED, _COPIED = 110, 10_000, 100_000_000
"""Streams of random numbers that nothing else uses; those of additions and copies are counted up."""

_NUMBER = r"(?:[0-9]{1,9}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})"
_ADD = re.compile(rf"(?P<count>[0-9]{{1,9}})x(?P<rank>[0-9]{{1,9}})(?:@(?P<share>{_NUMBER})(?P<unit>%?))?")
_SCALE = re.compile(rf"(?P<pattern>.+)=(?P<factor>{_NUMBER})")
_LOSE = re.compile(rf"(?P<count>[0-9]{{1,9}})(?:@(?P<at>{_NUMBER})(?P<unit>s|%))?")
_SHOWN_NAMES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class MoreAdapters:
    """So many adapters of one rank more. Their requests come on top: together `share` times as many as there
    are, or None, each adapter's as many as those there are have in the mean."""

    num_adapters: int
    rank: int
    share: float | None = None

    @classmethod
    def parse(cls, text: str) -> "MoreAdapters":
        """From `50x64`, or with a share `50x64@0.2` or `50x64@20%`; BadInputError."""
        match = _ADD.fullmatch(text.strip())
        if match is None:
            right = "50x64, that is 50 adapters of rank 64, or 50x64@0.2 for a fifth of the traffic on top"
            raise BadInputError(f"--add-adapters: {text[:80]!r}; expected such as {right}")
        found = cls(
            num_adapters=int(match["count"]),
            rank=int(match["rank"]),
            share=None if match["share"] is None else _share(match["share"], match["unit"]),
        )
        if not 1 <= found.num_adapters <= MAX_ADAPTERS:
            raise BadInputError(f"--add-adapters: {text}: expected from 1 to {MAX_ADAPTERS:,} adapters")
        if not 1 <= found.rank <= MAX_RANK:
            raise BadInputError(f"--add-adapters: {text}: expected a rank from 1 to {MAX_RANK:,}")
        if found.share is not None and found.share > MAX_FACTOR:
            raise BadInputError(f"--add-adapters: {text}: expected a share from 0 to {MAX_FACTOR:g}")
        return found

    def describe(self) -> str:
        """In words."""
        traffic = (
            "each with as many requests as the others have in the mean"
            if self.share is None
            else f"together with {100 * self.share:.3g} % of the requests there are, on top"
        )
        return f"{self.num_adapters:,} more adapters of rank {self.rank}, {traffic}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """The traffic of the adapters whose names match, times a factor; `base` is the base model, which no
    other pattern matches."""

    pattern: str
    factor: float

    @classmethod
    def parse(cls, text: str) -> "Scaled":
        """From `support-*=2`; BadInputError."""
        match = _SCALE.fullmatch(text.strip())
        if match is None or float(match["factor"]) > MAX_FACTOR:
            right = f"such as 'support-*=2': names, and a factor from 0 to {MAX_FACTOR:g}"
            raise BadInputError(f"--scale: {text[:80]!r}; expected {right}")
        return cls(pattern=match["pattern"].strip(), factor=float(match["factor"]))

    def matches(self, adapters: Sequence[TraceAdapter]) -> NDArray[np.bool_]:
        """Whether it is about each of these, and at last about the base model."""
        named = [fnmatchcase(adapter.name, self.pattern) for adapter in adapters]
        return np.array([*named, self.pattern == BASE_NAME], dtype=np.bool_)

    def describe(self) -> str:
        """In words."""
        return f"the requests of {self.pattern} times {self.factor:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LostReplicas:
    """The last so many replicas die and do not come back, at `at_s` or that share into the trace."""

    num_replicas: int
    at_s: float | None = None
    at_share: float = 1 / 3

    @classmethod
    def parse(cls, text: str) -> "LostReplicas":
        """From `2`, `2@100s` or `2@30%`; BadInputError."""
        match = _LOSE.fullmatch(text.strip())
        if match is None or (match["unit"] == "%" and float(match["at"]) > 100):
            right = "such as 1, 1@100s or 1@30%: replicas, and when, in seconds or in % of the trace"
            raise BadInputError(f"--lose: {text[:80]!r}; expected {right}")
        number = int(match["count"])
        if match["at"] is None:
            return cls(num_replicas=number)
        if match["unit"] == "s":
            return cls(num_replicas=number, at_s=float(match["at"]))
        return cls(num_replicas=number, at_share=float(match["at"]) / 100)

    def failures(self, num_replicas: int, duration_s: float) -> tuple[Failure, ...]:
        """A failure for each, of a cluster whose replicas are `replica-0` and on; BadInputError."""
        if not 1 <= self.num_replicas < num_replicas:
            right = f"from 1 to {num_replicas - 1}" if num_replicas > 1 else "two replicas, to lose one"
            raise BadInputError(f"--lose: {self.num_replicas} of {num_replicas}; expected {right}")
        at_s = self.at_share * duration_s if self.at_s is None else self.at_s
        if at_s > duration_s:
            raise BadInputError(
                f"--lose: at {at_s:g} s; expected a time within the {duration_s:g} s there are"
            )
        # As long as a simulation can last at most, so that nothing comes back while there are requests.
        return tuple(
            Failure(at_s=at_s, replica_id=ReplicaId(f"replica-{place}"), down_s=MAX_DURATION_S)
            for place in range(num_replicas - self.num_replicas, num_replicas)
        )

    def describe(self) -> str:
        """In words."""
        when = f"{100 * self.at_share:.3g} % of the way" if self.at_s is None else f"{self.at_s:g} s"
        what = "1 replica" if self.num_replicas == 1 else f"{self.num_replicas} replicas"
        return f"{what} lost for good, {when} into the trace"


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """All that is different; nothing is, if nothing is given.

    Factors of several patterns multiply; what is added goes by the traffic as it is after that, each
    addition by itself.
    """

    add: tuple[MoreAdapters, ...] = ()
    scale: tuple[Scaled, ...] = ()
    lose: LostReplicas | None = None

    @classmethod
    def parse(
        cls, *, add: Sequence[str] = (), scale: Sequence[str] = (), lose: str | None = None
    ) -> "WhatIf":
        """From the texts that the command line takes; BadInputError shows the form."""
        return cls(
            add=tuple(MoreAdapters.parse(text) for text in add),
            scale=tuple(Scaled.parse(text) for text in scale),
            lose=None if lose is None else LostReplicas.parse(lose),
        )

    def __bool__(self) -> bool:
        return bool(self.add or self.scale or self.lose)

    @property
    def is_drawn(self) -> bool:
        """Whether it makes a workload depend on the seed."""
        return bool(self.add or self.scale)

    def apply(self, trace: TraceColumns, seed: int) -> TraceColumns:
        """The workload as it would be; BadInputError where that cannot be.

        Arrivals stay in order and within the trace's time; adapters keep their places, those added come
        after them, and one whose requests are all gone is still there.
        """
        return with_adapters(scaled(trace, self.scale, seed), self.add, seed)

    def failures(self, num_replicas: int, duration_s: float) -> tuple[Failure, ...]:
        """The replicas that are lost, of so many, in a trace of that length; BadInputError."""
        return () if self.lose is None else self.lose.failures(num_replicas, duration_s)

    def describe(self) -> tuple[str, ...]:
        """A line in words for each thing that is different, for reports."""
        lost = () if self.lose is None else (self.lose,)
        return tuple(one.describe() for one in (*self.scale, *self.add, *lost))


def lost_replicas(text: str, num_replicas: int, duration_s: float) -> tuple[Failure, ...]:
    """The failures that `1@30%` means for so many replicas and a trace of that length; BadInputError."""
    return LostReplicas.parse(text).failures(num_replicas, duration_s)


def scaled(trace: TraceColumns, scales: Sequence[Scaled], seed: int) -> TraceColumns:
    """The workload with some of its traffic multiplied.

    Of n requests with one factor there are round(factor * n) afterwards. Below 1, requests are left out at
    random. Above, each is copied, and of the rest of the factor so many at random: a copy comes at most a
    mean gap after its original, and not after the trace's next request, so bursts stay as they are and only
    grow. Its prompt shares blocks with other copies as the originals do with each other, but none with them.
    """
    if not scales:
        return trace
    factor_of = np.ones(len(trace.adapters) + 1)
    for scale in scales:
        matches = scale.matches(trace.adapters)
        if not matches[trace.adapter].any():
            raise BadInputError(f"--scale: {scale.pattern!r} has no requests; {_known(trace)}")
        factor_of[matches] *= scale.factor
    # The base model's place is -1, and its factor the last.
    factors = factor_of[trace.adapter]
    expected = float(factors.sum())
    if expected > MAX_REQUESTS:
        raise BadInputError(f"--scale: makes {expected:,.0f} requests; expected {MAX_REQUESTS:,} at most")
    generations = _generations(factors, stream(seed, _SCALED).random(len(trace)))
    kept = np.flatnonzero(generations >= 1)
    if not len(kept):
        raise BadInputError("--scale: leaves no requests; expected a factor above 0 for some")
    copies = []
    for number in range(1, int(generations.max())):
        rows = np.flatnonzero(generations > number)
        # A draw for each request there is: what one is moved by does not depend on who else is copied.
        moves = stream(seed, _COPIED + number).random(len(trace))[rows]
        copies.append(_copied(trace, rows, moves, number))
    return _merged([trace.take(kept), *copies])


def with_adapters(trace: TraceColumns, more: Sequence[MoreAdapters], seed: int) -> TraceColumns:
    """The workload with more adapters, named `added-rank-R-K`, and their requests.

    A request is drawn from those there are, whatever their adapter: its lengths, and its arrival, moved as
    that of a copy in `scaled`, so that the added traffic rises and falls with the rest. The adapters of one
    addition have equally many requests, but for one.
    """
    adapters, parts = list(trace.adapters), [trace]
    for place, one in enumerate(more):
        rng = stream(seed, _ADDED + place)
        number = _num_added(trace, one)
        sources = np.floor(rng.random(number) * len(trace)).astype(np.int64)
        turn = np.argsort(rng.random(number), kind="stable") % one.num_adapters
        added = _copied(trace, sources, rng.random(number), -1 - place)
        first, names = len(adapters), {adapter.name for adapter in adapters}
        free = (name for k in count() if (name := f"added-rank-{one.rank}-{k}") not in names)
        adapters += [TraceAdapter(name=name, rank=one.rank) for name in islice(free, one.num_adapters)]
        parts.append(replace(added, adapter=(first + turn).astype(np.int32)))
    return replace(_merged(parts), adapters=tuple(adapters)) if more else trace


def _num_added(trace: TraceColumns, more: MoreAdapters) -> int:
    if more.share is not None:
        number = round(more.share * len(trace))
    else:
        num_named = int((trace.adapter >= 0).sum())
        if not num_named:
            right = f"such as {more.num_adapters}x{more.rank}@0.2, a fifth of the traffic on top"
            raise BadInputError(
                f"--add-adapters: no adapter has requests to go by; expected a share, {right}"
            )
        number = round(more.num_adapters * num_named / len(trace.adapters))
    if number + len(trace) > MAX_REQUESTS:
        raise BadInputError(
            f"--add-adapters: adds {number:,} requests; expected {MAX_REQUESTS:,} at most in all"
        )
    return number


def _generations(factors: NDArray[np.float64], order: NDArray[np.float64]) -> NDArray[np.int64]:
    """How often each request is there: its factor, rounded up for those of the lowest order."""
    generations = np.floor(factors).astype(np.int64)
    for factor in np.unique(factors).tolist():
        rows = np.flatnonzero(factors == factor)
        num_more = round((factor - math.floor(factor)) * len(rows))
        generations[rows[np.argsort(order[rows], kind="stable")[:num_more]]] += 1
    return generations


def _copied(
    trace: TraceColumns, sources: NDArray[np.int64], moves: NDArray[np.float64], generation: int
) -> TraceColumns:
    """Copies of requests, each moved by a share of what it may be, with prompt blocks of their
    generation's own."""
    gap_s = np.append(np.diff(trace.arrival_s), 0.0)
    most_s = np.minimum(gap_s, float(gap_s.mean()))
    copies = trace.take(sources)
    arrival_s = copies.arrival_s + moves * most_s[sources]
    ids = None if copies.hash_ids is None else _mixed(copies.hash_ids, generation)
    # Drawn requests come in no order.
    order = np.argsort(arrival_s, kind="stable")
    return replace(copies, arrival_s=arrival_s, hash_ids=ids).take(order)


def _mixed(ids: NDArray[np.int64], generation: int) -> NDArray[np.int64]:
    """Other ids, equal where these are and else as good as never: SplitMix64's mixing, 63 bits of it."""
    mixed = ids.astype(np.uint64) + np.uint64((generation * 0x9E3779B97F4A7C15) % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)


def _merged(parts: Sequence[TraceColumns]) -> TraceColumns:
    """All their requests in order of arrival, at one time those of the first parts first."""
    first = parts[0]
    offsets, ids = None, None
    if first.hash_offsets is not None:
        counts = [np.diff(part.hash_offsets) for part in parts if part.hash_offsets is not None]
        offsets = np.concatenate(([0], np.cumsum(np.concatenate(counts)))).astype(np.int64)
        held = zip(parts, counts, strict=True)
        # A trace that was cut still has the ids of what was cut off.
        ids = np.concatenate([part.hash_ids[: num.sum()] for part, num in held if part.hash_ids is not None])
    joined = replace(
        first,
        arrival_s=np.concatenate([part.arrival_s for part in parts]),
        prompt_tokens=np.concatenate([part.prompt_tokens for part in parts]),
        output_tokens=np.concatenate([part.output_tokens for part in parts]),
        adapter=np.concatenate([part.adapter for part in parts]),
        hash_offsets=offsets,
        hash_ids=ids,
    )
    return joined.take(np.argsort(joined.arrival_s, kind="stable"))


def _share(number: str, unit: str) -> float:
    return float(number) / 100 if unit == "%" else float(number)


def _known(trace: TraceColumns) -> str:
    """Whose requests there are, as an error says it."""
    names = [adapter.name for adapter in trace.adapters]
    more = f" and {len(names) - _SHOWN_NAMES:,} others" if len(names) > _SHOWN_NAMES else ""
    known = ", ".join(name[:40] for name in names[:_SHOWN_NAMES])
    return f"the trace's adapters are {known or 'none'}{more}, the base model is {BASE_NAME}"
