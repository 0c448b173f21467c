"""One layer's adapters for the compiled kernel, made with numpy alone, and what comes out in float64."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
NOTHING = 7.0
"""Stands in columns and rows that the kernel must not write."""


def to_bf16(values: Array) -> Array:
    """Nearest bfloat16, as its 16 bits; NaN stays NaN."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: Array) -> Array:
    """The values of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """A type of the kernel: how numpy stores it, and its relative rounding error."""

    name: str
    eps: float

    def stored(self, values: Array) -> Array:
        """As the kernel reads it."""
        return to_bf16(values) if self.name == "bfloat16" else values.astype(np.float32)

    def read(self, stored: Array) -> Array:
        """Its float64 values."""
        values = from_bf16(stored) if self.name == "bfloat16" else stored
        return values.astype(np.float64)


NUMBERS = (Number(name="float32", eps=2.0**-24), Number(name="bfloat16", eps=2.0**-8))


class Adapter:
    """Random matrices of one adapter: a [sum of ranks, width] and per slice (left, right, b [rank, out])."""

    def __init__(
        self, number: Number, width: int, slices: Sequence[tuple[int, int]], rng: np.random.Generator
    ) -> None:
        """`slices`: (rank, outputs) of each; rank 0: the adapter leaves it alone."""
        ranks = sum(rank for rank, _ in slices)
        self.a = number.stored(rng.standard_normal((ranks, width)) / width**0.5)
        self.slices: list[tuple[int, int, int, int, Array]] = []
        begin = left = 0
        for rank, outputs in slices:
            if rank:
                b = number.stored(rng.standard_normal((rank, outputs)) / rank**0.5)
                self.slices.append((begin, begin + rank, left, left + outputs, b))
            begin, left = begin + rank, left + outputs
        fields = [self.a.ctypes.data, ranks, len(self.slices)]
        for first, last, left, right, b in self.slices:
            fields += [first, last, left, right, b.ctypes.data]
        self.described = np.array(fields, dtype=np.int64)

    def add(self, number: Number, y: Array, x: Array) -> Array:
        """Add the adapter's share to y, in float64; the result has the sum of all terms' sizes."""
        a = number.read(self.a)
        hidden, hidden_sizes = x @ a.T, np.abs(x) @ np.abs(a.T)
        sizes = np.abs(y)
        for first, last, left, right, b in self.slices:
            values = number.read(b)
            y[:, left:right] += hidden[:, first:last] @ values
            sizes[:, left:right] += hidden_sizes[:, first:last] @ np.abs(values)
        return sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A step of one layer: spans (slot, start, stop) of the rows that `order` picks, of `num_rows` in all."""

    num_rows: int
    spans: Sequence[tuple[int, int, int]]
    order: Sequence[int] | None = None

    def rows(self, span: tuple[int, int, int]) -> list[int]:
        """The rows of a span."""
        rows = range(span[1], span[2])
        return list(rows) if self.order is None else [self.order[row] for row in rows]


def wrong_of(
    kernel: Any,
    number: Number,
    step: Step,
    slots: Sequence[Adapter | None],
    *,
    width: int,
    outputs: int,
    rng: np.random.Generator,
) -> str:
    """Run the kernel once over wider tensors than it may touch; what is wrong with the result, or ''."""
    x = number.stored(np.full((step.num_rows, width + 3), np.nan))
    y = number.stored(rng.standard_normal((step.num_rows, outputs + 5)))
    used = sorted(row for span in step.spans for row in step.rows(span))
    x[used, :width] = number.stored(rng.standard_normal((len(used), width)))
    before = y.copy()
    spans = np.array(step.spans, dtype=np.int64).reshape(-1, 3)
    order = None if step.order is None else np.array(step.order, dtype=np.int64)
    addresses: Any = (ctypes.c_void_p * len(slots))(
        *(None if one is None else one.described.ctypes.data for one in slots)
    )
    most = max((len(one.a) for one in slots if one), default=0)
    needed = len(used) * (width + most)
    scratch = np.full(needed + 16, NOTHING, dtype=np.float32)
    pointers = np.full(len(used) + 2, 7, dtype=np.uintp)
    kernel(
        x.ctypes.data,
        x.shape[1],
        y.ctypes.data,
        y.shape[1],
        width,
        spans.ctypes.data,
        len(spans),
        None if order is None else order.ctypes.data,
        ctypes.addressof(addresses),
        scratch.ctypes.data,
        pointers.ctypes.data,
    )
    if (scratch[needed:] != NOTHING).any() or (pointers[len(used) :] != 7).any():
        return "it wrote behind its scratch memory"
    untouched = before.copy()
    for span in step.spans:
        adapter, rows = slots[span[0]], step.rows(span)
        if adapter is None:
            continue
        expected = number.read(before[rows])
        sizes = adapter.add(number, expected, number.read(x[rows, :width]))
        error = np.abs(number.read(y[rows]) - expected)
        # One rounding of the result, and in float32 one per term at most.
        allowed = number.eps * np.abs(expected) + (width + most + 8) * 2.0**-24 * sizes
        if not (error <= allowed).all():
            return f"span {span}: off by {np.nanmax(error - allowed)}"
        for _, _, left, right, _ in adapter.slices:
            untouched[rows, left:right] = y[rows, left:right]
    if not np.array_equal(untouched, y):
        return "it changed what no adapter changes"
    return ""
