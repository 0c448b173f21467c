"""The workload of a simulation: a trace file, the bundled one or a preset, cut, tiled, sped up, and with
lengths, adapters and ranks for those that have none."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from loraserve.errors import BadInputError
from traces.assign import assigned_places
from traces.columns import TraceAdapter, TraceColumns, columns_of
from traces.fill import UNKNOWN, Fill
from traces.read import bundled_trace, read_columns
from traces.synthesis import Overrides, is_preset, tile, workload
from traces.synthesis.checks import check_number
from traces.synthesis.lengths import LENGTHS, Limits
from traces.synthesis.notation import read_law
from traces.synthesis.portable import stream
from traces.synthesis.ranks import RANKS, EqualRanks, Ranks, lay_out
from traces.synthesis.tiling import at_rate, scale_rate
from traces.synthesis.workload import named_settings
from traces.types import TraceError

DEMO = "demo"
AUTO = "auto"
DEFAULT_LENGTHS = "azure"
_RANKS, _ORDER, _LENGTHS = 100, 101, 102
"""Streams of random numbers that no aspect of synthesis uses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedWorkload:
    """`source` is a file, `demo` or `preset:NAME`. `limit` and `duration_s` cut it, in its own time;
    `requests` then repeats it until it has so many; at last `rate_per_s` sets its mean rate, or `speedup`
    multiplies it. So a day of a trace, sixty times faster, is a `duration_s` of 86,400 that takes 1,440 s.

    `only_adapters` leaves out the requests of a file that name none, before `requests` repeats it.

    `adapters` gives the requests so many adapters, drawn by `assign` (a method of `traces.assign`, `auto`
    is round-robin) with its `parameter`, the base model with `base_share`; `ranks` are those of the
    adapters: numbers with commas between, or a law of `traces.synthesis.ranks`. A preset takes these
    as its own. Without `adapters` a trace keeps its own, with `ranks` for them if given.

    `correlation` (-1 to 1) says how those ranks go with popularity, that is with how many requests of the
    workload an adapter has: at 1 the most popular has the highest rank, at -1 the lowest, at 0 the two are
    independent. None is 0, but leaves adapters that the law names in their order. Arrivals, lengths and
    which adapter each request has are the same whatever it is.

    `lengths` is a law of `traces.synthesis.lengths`, used instead of what the trace says, so that prompt
    blocks it names are left out. None keeps the trace's own, and is azure where it has none.
    """

    source: str
    format: str | None = None
    on_bad_row: Literal["refuse", "skip"] = "refuse"
    limit: int | None = None
    duration_s: float | None = None
    requests: int | None = None
    rate_per_s: float | None = None
    speedup: float | None = None
    only_adapters: bool = False
    adapters: int | None = None
    ranks: str | None = None
    correlation: float | None = None
    assign: str = AUTO
    parameter: float | None = None
    base_share: float = 0.0
    lengths: str | None = None

    def draw(self, seed: int) -> TraceColumns:
        """The workload; what is drawn in it is drawn by the seed. BadInputError says what is wrong."""
        with _refusing(self.source):
            if self.rate_per_s is not None and self.speedup is not None:
                raise BadInputError("--rate and --speedup both say how fast; give one of them")
            if self.correlation is not None:
                check_number("the correlation of rank and popularity", self.correlation, -1.0, 1.0)
            if is_preset(self.source):
                return self._of_preset(seed)
            return self._with_adapters(self._with_lengths(self._paced(self._read(seed)), seed), seed)

    @property
    def is_drawn(self) -> bool:
        """Whether it may depend on the seed; a file's may, for it can leave lengths and adapters open."""
        drawn = (self.adapters, self.ranks, self.lengths)
        return self.source != DEMO or any(law is not None for law in drawn)

    def _of_preset(self, seed: int) -> TraceColumns:
        if self.only_adapters:
            raise BadInputError(f"only_adapters is for files; {self.source} has a base_share to leave at 0")
        if self.assign != AUTO or self.parameter is not None:
            raise BadInputError(
                f"--assign: {self.source} draws its adapters by itself; put its law into its name, such as"
                " preset:loraserve-uniform,popularity=zipf:1.2"
            )
        asked = Overrides(
            rate=self.rate_per_s,
            duration=self.duration_s,
            requests=self.requests,
            adapters=self.adapters,
            ranks=self.ranks,
            correlation=self.correlation,
            lengths=self.lengths,
            base_share=self.base_share or None,
            seed=seed,
        )
        for name in named_settings(self.source) - {"seed"}:
            if getattr(asked, name, None) is not None:
                raise BadInputError(
                    f"--{name.replace('_', '-')}: {self.source} says it too; give one of them"
                )
        columns = workload(self.source, asked).cut(limit=self.limit)
        return columns if self.speedup is None else scale_rate(columns, self.speedup)

    def _read(self, seed: int) -> TraceColumns:
        if self.source == DEMO:
            return columns_of(bundled_trace()).cut(limit=self.limit, duration_s=self.duration_s)
        columns = read_columns(
            self.source,
            format=self.format,
            on_bad_row=self.on_bad_row,
            limit=self.limit,
            duration_s=self.duration_s,
            fill=Fill(unknown=True, seed=seed),
        )
        return self._of_adapters(columns) if self.only_adapters else columns

    def _of_adapters(self, columns: TraceColumns) -> TraceColumns:
        """The requests that name an adapter."""
        places = np.flatnonzero(columns.adapter >= 0)
        if not len(places):
            raise BadInputError(f"{self.source}: no request names an adapter, so that none would be left")
        return columns.take(places)

    def _paced(self, columns: TraceColumns) -> TraceColumns:
        if self.requests is not None:
            columns = tile(columns, self.requests)
        if self.rate_per_s is not None:
            columns = at_rate(columns, self.rate_per_s)
        return columns if self.speedup is None else scale_rate(columns, self.speedup)

    def _with_lengths(self, columns: TraceColumns, seed: int) -> TraceColumns:
        has_lengths = bool(columns.prompt_tokens.any())
        if self.lengths is None and has_lengths:
            return columns
        text = self.lengths or DEFAULT_LENGTHS
        law = read_law(text, LENGTHS, "lengths")
        pairs = law.pairs(len(columns), stream(seed, _LENGTHS), _read_lengths, Limits())
        return replace(
            columns,
            prompt_tokens=pairs[0].astype(np.int32),
            output_tokens=pairs[1].astype(np.int32),
            hash_offsets=None,
            hash_ids=None,
            source=f"{columns.source}, lengths of {text.partition(':')[0].strip()}",
        )

    def _with_adapters(self, columns: TraceColumns, seed: int) -> TraceColumns:
        if self.adapters is None:
            if self.assign != AUTO or self.parameter is not None or self.base_share:
                raise BadInputError(
                    "--assign, --parameter and --base-share want --adapters, how many there are"
                )
            return self._with_ranks(columns, seed)
        if self.adapters < 1:
            raise BadInputError(f"--adapters: {self.adapters}; expected at least 1")
        law = EqualRanks() if self.ranks is None else _ranks(self.ranks)
        adapters = law.adapters(self.adapters, stream(seed, _RANKS))
        places = assigned_places(
            len(columns),
            len(adapters),
            method="round-robin" if self.assign == AUTO else self.assign,
            seed=seed,
            parameter=self.parameter,
            base_share=self.base_share,
        )
        column = np.fromiter(places, dtype=np.int32, count=len(columns))
        return replace(columns, adapter=column, adapters=self._laid_out(law, adapters, column, seed))

    def _with_ranks(self, columns: TraceColumns, seed: int) -> TraceColumns:
        """The trace's own adapters, with ranks of the law if one is asked for."""
        if self.ranks is None:
            if self.correlation is not None:
                raise BadInputError("--correlation wants --ranks, which ranks there are")
            return columns
        if not columns.adapters:
            raise BadInputError("--ranks: the trace names no adapters; give it some with --adapters")
        law = _ranks(self.ranks)
        made = law.adapters(len(columns.adapters), stream(seed, _RANKS))
        if len(made) != len(columns.adapters):
            raise BadInputError(
                f"--ranks: names {len(made)} adapters, the trace has {len(columns.adapters)};"
                " expected as many"
            )
        laid = self._laid_out(law, made, columns.adapter, seed)
        adapters = tuple(
            TraceAdapter(name=one.name, rank=other.rank)
            for one, other in zip(columns.adapters, laid, strict=True)
        )
        return replace(columns, adapters=adapters)

    def _laid_out(
        self, law: Ranks, adapters: tuple[TraceAdapter, ...], column: NDArray[np.int32], seed: int
    ) -> tuple[TraceAdapter, ...]:
        """The adapters of the law in the order in which they take the places that the column names."""
        if self.correlation is None and law.in_order:
            return adapters
        # Where rank has nothing to do with popularity, the order need not depend on the requests.
        weights = -np.arange(len(adapters), dtype=np.float64)
        if self.correlation:
            weights = np.bincount(column[column >= 0], minlength=len(adapters)).astype(np.float64)
        return lay_out(adapters, weights, self.correlation or 0.0, stream(seed, _ORDER))


def _read_lengths(path: str) -> TraceColumns:
    return read_columns(path, on_bad_row="skip", fill=UNKNOWN)


def _ranks(text: str) -> Ranks:
    plain = text.replace(",", "/")
    is_plain = all(part.strip().isdigit() for part in plain.split("/"))
    return read_law(f"equal:{plain}" if is_plain else text, RANKS, "ranks")


@contextmanager
def _refusing(source: str) -> Iterator[None]:
    """A trace's errors as bad input."""
    try:
        yield
    except TraceError as error:
        raise BadInputError(str(error)) from error
    except OSError as error:
        raise BadInputError(f"{source}: cannot be read: {error.strerror or error}") from error
