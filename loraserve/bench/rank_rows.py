"""What `bench rank` measures: the batches, and in which order the adapters for them are loaded.

Pure. A row is one batch that an engine computes again and again: its sequences, and the adapter of each.

Prefill rows are one step of `prompt_tokens` tokens: one prompt of that length, or four of a quarter each.
Decode rows are steps of `sequences` sequences. The batches:

  base        no adapter
  rR          one adapter of rank R
  low, high   several adapters of the lowest rank; of the highest
  mixed       half the sequences on adapters of the lowest rank, half on adapters of the highest, in turn
  low_part    those sequences of `mixed` that are on the lowest rank, without the others; high_part likewise
  base_batch, base_part   sequences as in `mixed` and in its parts, without adapters
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Literal

Mode = Literal["off", "rank-true", "padded", "stock"]
Kind = Literal["prefill", "decode"]

MODES: tuple[Mode, ...] = ("off", "rank-true", "padded", "stock")
"""In the order in which they run: what is compared most closely runs side by side."""

KINDS: tuple[Kind, ...] = ("prefill", "decode")
_PREFILL_BATCH = 4
_PER_RANK = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedAdapter:
    """An adapter as the rows name it."""

    name: str
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """`prompt_tokens` of a prefill step; `sequences` of a decode step, each with a prompt of
    `decode_prompt_tokens` and an output of `output_tokens`."""

    prompt_tokens: int = 256
    sequences: int = 8
    decode_prompt_tokens: int = 4
    output_tokens: int = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One batch: `adapters` has one entry per sequence, None for the base model; `prompt_tokens` and
    `output_tokens` are those of each. `base` is the batch of the same shape without adapters."""

    kind: Kind
    batch: str
    adapters: tuple[str | None, ...]
    prompt_tokens: int
    output_tokens: int
    base: str

    @property
    def name(self) -> str:
        """The key of the row, such as prefill_r8."""
        return f"{self.kind}_{self.batch}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSet:
    """Rows that are measured in turn while these adapters are loaded."""

    loaded: tuple[str, ...]
    rows: tuple[Row, ...]


def plan_rows(
    mode: Mode, adapters: Sequence[RankedAdapter], sizes: Sizes, *, num_slots: int, quick: bool
) -> tuple[RowSet, ...]:
    """The rows of one engine, the first set with all batches of several sequences.

    With `quick` the ranks between the lowest and the highest are left out, and most batches.
    """
    by_rank: dict[int, list[str]] = {}
    for adapter in adapters:
        by_rank.setdefault(adapter.rank, []).append(adapter.name)
    ranks = sorted(by_rank)
    if mode == "off":
        return (RowSet(loaded=(), rows=tuple(_base_rows(sizes, parts=len(ranks) > 1))),)
    low, high = by_rank[ranks[0]][:_PER_RANK], by_rank[ranks[-1]][:_PER_RANK]
    outer = tuple(dict.fromkeys(low + high))
    rows = [row for row in _base_rows(sizes, parts=False) if row.batch == "base"]
    rows += _rank_rows(sizes, {rank: by_rank[rank][0] for rank in {ranks[0], ranks[-1]}})
    if len(ranks) > 1:
        rows += _batch_rows(mode, sizes, low, high, quick=quick)
    sets = [RowSet(loaded=outer, rows=tuple(rows))]
    between = [] if quick else ranks[1:-1]
    for start in range(0, len(between), num_slots):
        some = {rank: by_rank[rank][0] for rank in between[start : start + num_slots]}
        sets.append(RowSet(loaded=tuple(some.values()), rows=tuple(_rank_rows(sizes, some))))
    return tuple(sets)


def base_of(kind: Kind, batch: str) -> str:
    """The batch without adapters that has as many sequences and tokens as `batch`."""
    if batch.endswith("_part"):
        return "base_part"
    many = batch in {"low", "high", "mixed", "base_batch"}
    # A decode step of any of these has all the sequences anyway.
    return "base_batch" if many and kind == "prefill" else "base"


def _base_rows(sizes: Sizes, *, parts: bool) -> Iterable[Row]:
    for kind in KINDS:
        whole, part = _lengths(kind, sizes)
        yield _row(kind, "base", (None,) * (1 if kind == "prefill" else whole), sizes)
        if parts:
            if kind == "prefill":
                yield _row(kind, "base_batch", (None,) * whole, sizes)
            yield _row(kind, "base_part", (None,) * part, sizes)


def _rank_rows(sizes: Sizes, names: dict[int, str]) -> Iterable[Row]:
    for kind in KINDS:
        for rank, name in sorted(names.items()):
            count = 1 if kind == "prefill" else sizes.sequences
            yield _row(kind, f"r{rank}", (name,) * count, sizes)


def _batch_rows(
    mode: Mode, sizes: Sizes, low: Sequence[str], high: Sequence[str], *, quick: bool
) -> Iterable[Row]:
    for kind in KINDS:
        whole, part = _lengths(kind, sizes)
        lows, highs = tuple(islice(cycle(low), part)), tuple(islice(cycle(high), part))
        mixed = tuple(name for pair in zip(lows, highs, strict=True) for name in pair)
        if mode == "stock":
            # vLLM's own execution costs the same whatever the adapters: one batch of several says it all.
            if not quick:
                yield _row(kind, "mixed", mixed, sizes)
            continue
        yield _row(kind, "mixed", mixed, sizes)
        yield _row(kind, "low_part", lows, sizes)
        yield _row(kind, "high_part", highs, sizes)
        if not quick:
            yield _row(kind, "low", tuple(islice(cycle(low), whole)), sizes)
            yield _row(kind, "high", tuple(islice(cycle(high), whole)), sizes)


def _lengths(kind: Kind, sizes: Sizes) -> tuple[int, int]:
    """How many sequences `mixed` has, and each of its parts."""
    whole = _PREFILL_BATCH if kind == "prefill" else sizes.sequences
    return whole, whole // 2


def _row(kind: Kind, batch: str, adapters: tuple[str | None, ...], sizes: Sizes) -> Row:
    base = base_of(kind, batch)
    if kind == "decode":
        prompt, output = sizes.decode_prompt_tokens, sizes.output_tokens
    else:
        lone = base == "base"
        prompt, output = (sizes.prompt_tokens if lone else sizes.prompt_tokens // _PREFILL_BATCH), 1
    return Row(
        kind=kind, batch=batch, adapters=adapters, prompt_tokens=prompt, output_tokens=output, base=base
    )
