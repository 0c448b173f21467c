"""What a workload is: requests with arrivals, lengths and adapters, and the rows that were no requests.

Knows no file format and no cluster.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

MAX_BAD_ROWS_KEPT = 1000
"""How many bad rows a trace remembers one by one; all of them are counted."""


class TraceError(ValueError):
    """A trace cannot be used; `str(error)` is one line: where, what, and what would be right."""

    def __init__(self, what: str, *, source: str = "", line: int | None = None) -> None:
        where = source if line is None else f"{source}:{line}"
        super().__init__(f"{where}: {what}" if where else what)
        self.what = what
        self.source = source
        self.line = line

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_error, (self.what, self.source, self.line)


def _rebuild_error(what: str, source: str, line: int | None) -> TraceError:
    return TraceError(what, source=source, line=line)


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """One request of a workload.

    `index` is its place in the trace, `arrival_s` counts from the first request. `adapter` None is
    the base model; `rank` None is unknown. `hash_ids` names the prompt's blocks where the trace does.
    """

    index: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    adapter: str | None = None
    rank: int | None = None
    hash_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """A line of a trace file that is no usable request."""

    line: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Requests in order of arrival, the first at 0 s; build it with `Trace.of`.

    `bad_rows` holds the first thousand skipped rows, `num_bad_rows` counts all of them.
    """

    requests: tuple[TraceRequest, ...]
    source: str
    format: str
    bad_rows: tuple[BadRow, ...] = ()
    num_bad_rows: int = 0

    def __post_init__(self) -> None:
        previous_s = 0.0
        for index, request in enumerate(self.requests):
            if request.index != index or not previous_s <= request.arrival_s < math.inf:
                raise TraceError(f"request {index} is out of order; build traces with Trace.of")
            previous_s = request.arrival_s
        if self.requests and self.requests[0].arrival_s != 0:
            raise TraceError("the first request is not at 0 s; build traces with Trace.of")

    @classmethod
    def of(
        cls,
        requests: Iterable[TraceRequest],
        *,
        source: str,
        format: str,
        bad_rows: tuple[BadRow, ...] = (),
        num_bad_rows: int = 0,
    ) -> "Trace":
        """Sort by arrival (ties keep their order), count from the first arrival, number from 0."""
        ordered = sorted(requests, key=lambda request: request.arrival_s)
        origin_s = ordered[0].arrival_s if ordered else 0.0
        return cls(
            requests=tuple(
                request
                if request.index == index and origin_s == 0
                else replace(request, index=index, arrival_s=request.arrival_s - origin_s)
                for index, request in enumerate(ordered)
            ),
            source=source,
            format=format,
            bad_rows=bad_rows,
            num_bad_rows=num_bad_rows,
        )

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def duration_s(self) -> float:
        """Seconds from the first arrival to the last."""
        return self.requests[-1].arrival_s if self.requests else 0.0

    def adapter_counts(self) -> dict[str, int]:
        """Requests per adapter name, most popular first, ties by name; the base model is left out."""
        counts = Counter(request.adapter for request in self.requests if request.adapter is not None)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def cut(self, *, limit: int | None = None, duration_s: float | None = None) -> "Trace":
        """The first `limit` requests and those that arrive before `duration_s`, whichever is less."""
        check_cut(limit, duration_s)
        kept = self.requests[:limit]
        if duration_s is not None:
            kept = tuple(request for request in kept if request.arrival_s < duration_s)
        return replace(self, requests=kept)


def check_cut(limit: int | None, duration_s: float | None) -> None:
    """Refuse a cut that would leave nothing."""
    if limit is not None and limit < 1:
        raise TraceError(f"a limit of {limit} requests leaves nothing; it must be at least 1")
    if duration_s is not None and not duration_s > 0:
        raise TraceError(f"a duration of {duration_s} s leaves nothing; it must be above 0")
