"""A workload as columns: a million requests in a few numpy arrays.

The simulator's input and the synthesiser's output; `traces.types.Trace` is the same row by row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from traces.types import BadRow, Trace, TraceRequest, check_cut

BASE = -1
"""The place that stands for the base model in the column `adapter`."""

DEFAULT_BLOCK_TOKENS = 512
_BLOCK_TOKENS = {"qwen": 16}


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceAdapter:
    """An adapter that a workload names; `rank` None is unknown."""

    name: str
    rank: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TraceColumns:
    """n requests in order of arrival, the first at 0 s.

    `arrival_s` is float64; `prompt_tokens`, `output_tokens` and `adapter` are int32, the last a place in
    `adapters` or `BASE`. Where the trace names its prompts' blocks, request i has
    `hash_ids[hash_offsets[i]:hash_offsets[i + 1]]` (int64 both), one per `hash_block_tokens` tokens.
    """

    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    adapter: NDArray[np.int32]
    adapters: tuple[TraceAdapter, ...]
    source: str
    format: str
    hash_offsets: NDArray[np.int64] | None = None
    hash_ids: NDArray[np.int64] | None = None
    hash_block_tokens: int = 512
    bad_rows: Sequence[BadRow] = ()
    num_bad_rows: int = 0

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def duration_s(self) -> float:
        """Seconds from the first arrival to the last."""
        return float(self.arrival_s[-1]) if len(self) else 0.0

    def cut(self, *, limit: int | None = None, duration_s: float | None = None) -> "TraceColumns":
        """The first `limit` requests, and of these the ones before `duration_s`; None does not cut.

        TraceError for a limit or a duration that is not above 0.
        """
        check_cut(limit, duration_s)
        size = len(self) if limit is None else min(limit, len(self))
        if duration_s is not None:
            size = min(size, int(np.searchsorted(self.arrival_s, duration_s)))
        return replace(
            self,
            arrival_s=self.arrival_s[:size],
            prompt_tokens=self.prompt_tokens[:size],
            output_tokens=self.output_tokens[:size],
            adapter=self.adapter[:size],
            hash_offsets=None if self.hash_offsets is None else self.hash_offsets[: size + 1],
        )

    def take(self, places: NDArray[np.int64]) -> "TraceColumns":
        """The requests at these places, any number of times each; their arrivals must not go back."""
        offsets, ids = self._hashes_at(places)
        return replace(
            self,
            arrival_s=self.arrival_s[places],
            prompt_tokens=self.prompt_tokens[places],
            output_tokens=self.output_tokens[places],
            adapter=self.adapter[places],
            hash_offsets=offsets,
            hash_ids=ids,
        )

    def _hashes_at(
        self, places: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64] | None, NDArray[np.int64] | None]:
        if self.hash_offsets is None or self.hash_ids is None:
            return None, None
        lengths = np.diff(self.hash_offsets)[places]
        offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
        # Where each request's ids begin here, less where they begin in what is made.
        shift = np.repeat(self.hash_offsets[places] - offsets[:-1], lengths)
        return offsets, self.hash_ids[np.arange(offsets[-1]) + shift]


def columns_of(trace: Trace, *, hash_block_tokens: int | None = None) -> TraceColumns:
    """The same workload as columns; blocks are of `hash_block_tokens` tokens, or as the trace's format
    has them."""
    places: dict[tuple[str, int | None], int] = {}
    adapter = np.empty(len(trace), dtype=np.int32)
    for index, request in enumerate(trace.requests):
        if request.adapter is None:
            adapter[index] = BASE
        else:
            adapter[index] = places.setdefault((request.adapter, request.rank), len(places))
    counts = [len(request.hash_ids) for request in trace.requests]
    has_hashes = any(counts)
    return TraceColumns(
        arrival_s=np.array([request.arrival_s for request in trace.requests], dtype=np.float64),
        prompt_tokens=np.array([request.prompt_tokens for request in trace.requests], dtype=np.int32),
        output_tokens=np.array([request.output_tokens for request in trace.requests], dtype=np.int32),
        adapter=adapter,
        adapters=tuple(TraceAdapter(name=name, rank=rank) for name, rank in places),
        source=trace.source,
        format=trace.format,
        hash_offsets=np.concatenate(([0], np.cumsum(counts, dtype=np.int64))) if has_hashes else None,
        hash_ids=np.fromiter(_hash_ids(trace), dtype=np.int64, count=sum(counts)) if has_hashes else None,
        hash_block_tokens=hash_block_tokens or _BLOCK_TOKENS.get(trace.format, DEFAULT_BLOCK_TOKENS),
        bad_rows=trace.bad_rows,
        num_bad_rows=trace.num_bad_rows,
    )


def trace_of(columns: TraceColumns) -> Trace:
    """The same workload row by row; what a row has no room for, the size of its blocks, is left out."""
    adapters: list[tuple[str | None, int | None]] = [(one.name, one.rank) for one in columns.adapters]
    adapters.append((None, None))  # the place BASE
    offsets, ids = columns.hash_offsets, columns.hash_ids
    rows = zip(
        columns.arrival_s.tolist(),
        columns.prompt_tokens.tolist(),
        columns.output_tokens.tolist(),
        columns.adapter.tolist(),
        strict=True,
    )
    return Trace(
        requests=tuple(
            TraceRequest(
                index=index,
                arrival_s=arrival_s,
                prompt_tokens=prompt_tokens,
                output_tokens=output_tokens,
                adapter=adapters[place][0],
                rank=adapters[place][1],
                hash_ids=()
                if offsets is None or ids is None
                else tuple(ids[offsets[index] : offsets[index + 1]].tolist()),
            )
            for index, (arrival_s, prompt_tokens, output_tokens, place) in enumerate(rows)
        ),
        source=columns.source,
        format=columns.format,
        bad_rows=tuple(columns.bad_rows),
        num_bad_rows=columns.num_bad_rows,
    )


def _hash_ids(trace: Trace) -> Iterator[int]:
    return (block for request in trace.requests for block in request.hash_ids)
