"""One pass over the rows of a trace: what is no request is counted, the rest goes into columns.

Many rows are taken at once where nothing about them is unusual, and else one by one: both ways give
the same columns and the same errors.
"""

import math
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from traces.columns import BASE, TraceColumns
from traces.files.adapter_table import AdapterTable
from traces.fill import Fill
from traces.formats.base import Block, Row, RowError
from traces.types import MAX_BAD_ROWS_KEPT, BadRow, TraceError

MAX_REQUESTS = 50_000_000
"""About 1.2 GB of columns; beyond it a limit must be given."""
MAX_ROWS = 10_000_000
"""The same of a trace that is wanted row by row: about 2 GB."""
MAX_HASH_IDS = 200_000_000
MAX_DURATION_S = 10 * 366 * 86_400.0

OnBadRow = Literal["refuse", "skip"]

_KEPT_UNSORTED = 1 << 20


@dataclass(slots=True, kw_only=True)
class Reading:
    """What one pass over a file has found so far. Rows of an ordered format may never step back in time:
    the time of every row whose time could be read counts, a failed request's too.

    `done` says that no further row can matter.
    """

    source: str
    refuse: bool
    ordered: bool
    has_lengths: bool
    adapters: AdapterTable
    limit: int | None
    duration_s: float | None
    max_requests: int = MAX_REQUESTS
    done: bool = False
    origin_s: float | None = None
    latest_s: float = -math.inf
    num_bad_rows: int = 0
    bad_rows: list[BadRow] = field(default_factory=list)
    _time_s: "array[float]" = field(default_factory=lambda: array("d"))
    _prompt: "array[int]" = field(default_factory=lambda: array("i"))
    _output: "array[int]" = field(default_factory=lambda: array("i"))
    _adapter: "array[int]" = field(default_factory=lambda: array("i"))
    _hash_ids: "array[int]" = field(default_factory=lambda: array("q"))
    _hash_counts: "array[int]" = field(default_factory=lambda: array("i"))

    def __len__(self) -> int:
        return len(self._time_s)

    def rows(self, rows: Iterator[tuple[int, Callable[[], Row | None]]]) -> None:
        """Take rows one by one, each as its line number and what reads it."""
        for line, read in rows:
            if self.done:
                return
            try:
                if (row := self._checked(read)) is not None:
                    self._append(row, line)
            except RowError as error:
                self._count_bad(line, str(error))
            except OverflowError as error:
                raise TraceError(f"{error}, which no trace has", source=self.source, line=line) from error

    def block(self, block: Block) -> bool:
        """Take many rows at once; False, and nothing taken, if one of them may be bad."""
        count = len(block)
        if count == 0 or self.done:
            return True
        num_hash_ids = 0 if block.hash_ids is None else len(block.hash_ids)
        if len(self) + count > self.max_requests or len(self._hash_ids) + num_hash_ids > MAX_HASH_IDS:
            return False
        if not self._is_good(block):
            return False
        time_s, kept = block.time_s, count
        if self.ordered:
            if self.origin_s is None:
                self.origin_s = float(time_s[0])
            kept = self._kept(time_s - self.origin_s)
            self.latest_s = float(time_s[-1])
        zeros = np.zeros(kept, dtype=np.int32)
        self._extend(
            time_s[:kept],
            zeros if block.prompt_tokens is None else block.prompt_tokens[:kept],
            zeros if block.output_tokens is None else block.output_tokens[:kept],
            zeros + BASE if block.adapter is None else block.adapter[:kept],
            zeros if block.hash_counts is None else block.hash_counts[:kept],
        )
        if block.hash_ids is not None and block.hash_counts is not None:
            self._hash_ids.frombytes(block.hash_ids[: int(block.hash_counts[:kept].sum())].tobytes())
        self._compact()
        return True

    def expanded(self, block: Block, line: int) -> None:
        """Take the requests that one line stands for."""
        if len(self) + len(block) > self.max_requests:
            raise self._too_many(line)
        if not self.block(block):
            self._count_bad(line, "its requests have times or lengths that are not possible")

    def bad(self, line: int, reason: str) -> None:
        """Count a line that is no request."""
        self._count_bad(line, reason)

    def columns(
        self, *, format: str, block_tokens: int, fill: Fill, keep_adapters: bool = False
    ) -> TraceColumns:
        """All that was taken; TraceError if that is nothing."""
        if not len(self):
            raise self._nothing_left()
        time_s = np.frombuffer(self._time_s, dtype=np.float64)
        columns: dict[str, Any] = {
            "prompt_tokens": np.frombuffer(self._prompt, dtype=np.int32),
            "output_tokens": np.frombuffer(self._output, dtype=np.int32),
            "adapter": np.frombuffer(self._adapter, dtype=np.int32),
        }
        if not self.ordered:
            order = np.argsort(time_s, kind="stable")
            time_s = time_s[order]
            self._check_span(time_s)
            order = order[: self._kept_of_all(time_s - time_s[0])]
            time_s = time_s[: len(order)]
            columns = {name: column[order] for name, column in columns.items()}
        origin_s = time_s[0] if self.origin_s is None else self.origin_s
        if not self.has_lengths:
            columns["prompt_tokens"], columns["output_tokens"] = fill.lengths(len(time_s))
        adapters = self.adapters.adapters()
        if not keep_adapters:
            columns["adapter"], used = _only_used(columns["adapter"], len(adapters))
            adapters = tuple(adapters[place] for place in used)
        if len(self._hash_ids):
            counts = np.frombuffer(self._hash_counts, dtype=np.int32)
            columns["hash_offsets"] = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
            columns["hash_ids"] = np.frombuffer(self._hash_ids, dtype=np.int64)
        return TraceColumns(
            arrival_s=time_s - origin_s,
            adapters=adapters,
            source=self.source,
            format=format,
            hash_block_tokens=block_tokens,
            bad_rows=tuple(self.bad_rows),
            num_bad_rows=self.num_bad_rows,
            **columns,
        )

    def _is_good(self, block: Block) -> bool:
        time_s = block.time_s
        if self.has_lengths:
            if block.prompt_tokens is None or block.output_tokens is None:
                return False
            if block.prompt_tokens.min() < 1 or block.output_tokens.min() < 1:
                return False
        if not self.ordered:
            return bool(np.all(np.isfinite(time_s)))
        origin_s = time_s[0] if self.origin_s is None else self.origin_s
        # Each is False for a NaN.
        return bool(
            time_s[0] >= self.latest_s
            and np.all(time_s[1:] >= time_s[:-1])
            and time_s[-1] - origin_s <= MAX_DURATION_S
        )

    def _kept(self, arrival_s: NDArray[np.float64]) -> int:
        """How many of these, which are next and in order, the cut leaves; `done` if not all of them."""
        kept = len(arrival_s)
        if self.duration_s is not None and arrival_s[-1] >= self.duration_s:
            kept = int(np.searchsorted(arrival_s, self.duration_s, side="left"))
            self.done = True
        if self.limit is not None and len(self) + kept >= self.limit:
            kept = self.limit - len(self)
            self.done = True
        return kept

    def _kept_of_all(self, arrival_s: NDArray[np.float64]) -> int:
        kept = len(arrival_s)
        if self.duration_s is not None:
            kept = int(np.searchsorted(arrival_s, self.duration_s, side="left"))
        return kept if self.limit is None else min(kept, self.limit)

    def _check_span(self, time_s: NDArray[np.float64]) -> None:
        span_s = float(time_s[-1] - time_s[0])
        if span_s > MAX_DURATION_S:
            what = f"{span_s:g} s between the first request and the last; a trace ends within ten years"
            raise TraceError(what, source=self.source)

    def _compact(self) -> None:
        """Of rows that come in any order, only as many as the limit can ever be of use."""
        if self.ordered or self.limit is None or len(self) < max(_KEPT_UNSORTED, 4 * self.limit):
            return
        kept = np.argsort(np.frombuffer(self._time_s), kind="stable")[: self.limit]
        for name in ("_time_s", "_prompt", "_output", "_adapter"):
            column = getattr(self, name)
            taken = np.frombuffer(column, dtype=column.typecode)[kept]
            setattr(self, name, array(column.typecode, taken.tobytes()))

    def _extend(
        self,
        time_s: NDArray[np.float64],
        prompt: NDArray[np.int32],
        output: NDArray[np.int32],
        adapter: NDArray[np.int32],
        hash_counts: NDArray[np.int32],
    ) -> None:
        self._time_s.frombytes(np.ascontiguousarray(time_s, dtype=np.float64).tobytes())
        self._prompt.frombytes(np.ascontiguousarray(prompt, dtype=np.int32).tobytes())
        self._output.frombytes(np.ascontiguousarray(output, dtype=np.int32).tobytes())
        self._adapter.frombytes(np.ascontiguousarray(adapter, dtype=np.int32).tobytes())
        self._hash_counts.frombytes(np.ascontiguousarray(hash_counts, dtype=np.int32).tobytes())

    def _checked(self, read: Callable[[], Row | None]) -> Row | None:
        try:
            row = read()
        except RowError as error:
            if error.time_s is not None and self.ordered:
                self._advance(error.time_s)
            raise
        if row is None:
            return None
        if self.ordered:
            self._advance(row.time_s)
        if not self.has_lengths:
            return row
        for what, value in (("prompt", row.prompt_tokens), ("output", row.output_tokens)):
            if value < 1:
                raise RowError(f"{value} {what} tokens; a request has at least 1")
        return row

    def _append(self, row: Row, line: int) -> None:
        if self.ordered:
            if self.origin_s is None:
                self.origin_s = row.time_s
            if self.duration_s is not None and row.time_s - self.origin_s >= self.duration_s:
                self.done = True
                return
        if len(self) >= self.max_requests or len(self._hash_ids) + len(row.hash_ids) > MAX_HASH_IDS:
            raise self._too_many(line)
        place = BASE if row.adapter is None else self.adapters.place(row.adapter, row.rank)
        self._time_s.append(row.time_s)
        self._prompt.append(row.prompt_tokens)
        self._output.append(row.output_tokens)
        self._adapter.append(place)
        self._hash_ids.extend(row.hash_ids)
        self._hash_counts.append(len(row.hash_ids))
        if self.ordered and self.limit is not None and len(self) >= self.limit:
            self.done = True
        elif not self.ordered:
            self._compact()

    def _advance(self, time_s: float) -> None:
        if time_s < self.latest_s:
            back_s = self.latest_s - time_s
            raise RowError(f"time goes back by {back_s:g} s; rows must be in order of arrival")
        if self.origin_s is not None and time_s - self.origin_s > MAX_DURATION_S:
            after_s = time_s - self.origin_s
            raise RowError(f"{after_s:g} s after the first request; a trace ends within ten years")
        self.latest_s = time_s

    def _too_many(self, line: int) -> TraceError:
        what = (
            f"more than {self.max_requests:,} requests or {MAX_HASH_IDS:,} blocks; give a limit or a duration"
        )
        return TraceError(what, source=self.source, line=line)

    def _count_bad(self, line: int, reason: str) -> None:
        if self.refuse:
            raise TraceError(
                f"{reason} (on-bad-row 'skip' counts such rows and goes on)", source=self.source, line=line
            )
        self.num_bad_rows += 1
        if len(self.bad_rows) < MAX_BAD_ROWS_KEPT:
            self.bad_rows.append(BadRow(line=line, reason=reason))

    def _nothing_left(self) -> TraceError:
        if not self.bad_rows:
            return TraceError("no requests after the header; expected one per line", source=self.source)
        first = self.bad_rows[0]
        what = f"no usable request: all {self.num_bad_rows:,} rows are bad, the first because {first.reason}"
        return TraceError(what, source=self.source, line=first.line)


def _only_used(adapter: NDArray[np.int32], count: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The column in places among the adapters that have a request, and which those are."""
    used = np.flatnonzero(np.bincount(adapter[adapter >= 0], minlength=count))
    if len(used) == count:
        return adapter, used
    places = np.full(count + 1, BASE, dtype=np.int32)
    places[used] = np.arange(len(used), dtype=np.int32)
    return places[adapter], used
