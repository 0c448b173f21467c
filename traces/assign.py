"""Giving adapters and ranks to the requests of a trace that has none, or has others.

Seeded and pure: the same arguments give the same trace on every machine.
"""

import itertools
import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from traces.types import Trace, TraceError, TraceRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRef:
    """An adapter that a request may name, and its rank."""

    name: str
    rank: int


Draw = Callable[[int, float | None, random.Random], Iterator[int]]
"""Number of adapters, parameter, random numbers in; an endless stream of places out."""


def _round_robin(count: int, parameter: float | None, rng: random.Random) -> Iterator[int]:
    return itertools.cycle(range(count))


def _uniform(count: int, parameter: float | None, rng: random.Random) -> Iterator[int]:
    while True:
        yield int(rng.random() * count)


def _zipf(count: int, parameter: float | None, rng: random.Random) -> Iterator[int]:
    exponent = 1.0 if parameter is None else parameter
    sums = list(itertools.accumulate(place**-exponent for place in range(1, count + 1)))
    while True:
        yield min(bisect_right(sums, rng.random() * sums[-1]), count - 1)


def _power(count: int, parameter: float | None, rng: random.Random) -> Iterator[int]:
    exponent = 1.0 if parameter is None else parameter
    while True:
        yield min(int(count * rng.random() ** (1 / exponent)), count - 1)


METHODS: dict[str, Draw] = {
    "round-robin": _round_robin,
    "uniform": _uniform,
    "zipf": _zipf,
    "power": _power,
}
"""How the next adapter is drawn. `round-robin`: each in turn. `uniform`: each equally likely. `zipf`:
the k-th of the given order weighs k^-parameter (default 1). `power`: S-LoRA's law, where one of the
first k of n comes with probability (k/n)^parameter (default 1, which is uniform)."""

_WITH_PARAMETER = {"zipf", "power"}
_MAX_PARAMETER = 100.0


def assign_adapters(
    trace: Trace,
    adapters: Sequence[AdapterRef],
    *,
    method: str = "round-robin",
    seed: int = 0,
    parameter: float | None = None,
    base_share: float = 0.0,
) -> Trace:
    """Give every request an adapter of these, or with probability `base_share` the base model.

    What the trace said before is replaced; arrivals and lengths stay. The first adapters are the
    popular ones under `zipf` and, with a parameter below 1, under `power`.
    """
    places = assigned_places(
        len(trace), len(adapters), method=method, seed=seed, parameter=parameter, base_share=base_share
    )
    known = (*adapters, None)
    return replace(
        trace,
        requests=tuple(
            _with_adapter(request, known[place])
            for request, place in zip(trace.requests, places, strict=True)
        ),
    )


def assigned_places(
    num_requests: int,
    num_adapters: int,
    *,
    method: str = "round-robin",
    seed: int = 0,
    parameter: float | None = None,
    base_share: float = 0.0,
) -> Iterator[int]:
    """The places of the adapters that `assign_adapters` gives to so many requests, -1 for the base model."""
    draw = _drawer(method, parameter)
    if not 0 <= base_share <= 1:
        raise TraceError(f"a base share of {base_share} is not possible; it must be from 0 to 1")
    if not num_adapters and base_share < 1:
        raise TraceError("no adapters to assign; name at least one, or set the base share to 1")
    rng = random.Random(seed)
    places = draw(num_adapters, parameter, rng)
    if base_share == 0:
        return itertools.islice(places, num_requests)
    return (-1 if rng.random() < base_share else next(places) for _ in range(num_requests))


def map_adapters(trace: Trace, adapters: Sequence[AdapterRef], *, keep_known: bool = True) -> Trace:
    """Replace the adapter names of a trace by registered ones: the k-th most popular name becomes the
    k-th adapter, starting over when they run out. Base-model requests stay so.

    With `keep_known` a name that is registered keeps itself and only takes the registered rank.
    """
    names = tuple(trace.adapter_counts())
    if names and not adapters:
        raise TraceError("no adapters to map the trace's names to; name at least one")
    known = {adapter.name: adapter for adapter in adapters} if keep_known else {}
    strangers = [name for name in names if name not in known]
    mapping = known | dict(zip(strangers, itertools.cycle(adapters), strict=False))
    return replace(
        trace,
        requests=tuple(
            request if request.adapter is None else _with_adapter(request, mapping[request.adapter])
            for request in trace.requests
        ),
    )


def unknown_adapters(trace: Trace, names: Iterable[str]) -> tuple[str, ...]:
    """The adapters that the trace names and that are not among these, most popular first."""
    known = set(names)
    return tuple(name for name in trace.adapter_counts() if name not in known)


def _drawer(method: str, parameter: float | None) -> Draw:
    if method not in METHODS:
        raise TraceError(f"no assignment method is called {method!r}; there are: {', '.join(METHODS)}")
    if parameter is not None:
        if method not in _WITH_PARAMETER:
            raise TraceError(f"{method} takes no parameter; leave it out, or use zipf or power")
        if not 0 < parameter <= _MAX_PARAMETER:
            right = f"it must be above 0 and at most {_MAX_PARAMETER:g}"
            raise TraceError(f"a {method} parameter of {parameter} is not possible; {right}")
    return METHODS[method]


def _with_adapter(request: TraceRequest, adapter: AdapterRef | None) -> TraceRequest:
    if adapter is None:
        return replace(request, adapter=None, rank=None)
    return replace(request, adapter=adapter.name, rank=adapter.rank)
