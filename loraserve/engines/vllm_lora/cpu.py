"""Rank-true LoRA execution on the CPU: each adapter's rows times its own matrices, at their true rank.

A slot holds references to matrices of exactly the adapter's rank, so nothing is padded and filling a slot
copies nothing. What does not change from layer to layer is decided once per step: which rows belong to which
slot, and which adapters have so few of them that one call of the compiled kernel (`few_rows`) beats large
products. Engine processes only.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

from loraserve.engines.vllm_lora.few_rows import load
from loraserve.engines.vllm_lora.room import Room
from loraserve.engines.vllm_lora.rows import RowGroups, Span, group_rows
from loraserve.engines.vllm_lora.transpose import Transpose, transpose_with_torch
from loraserve.engines.vllm_lora.weights import LayerSource

_A_ROWS = 16
"""A's height is a multiple of this: products of another height take torch up to twice as long."""
_JOINED_RANKS = 24
"""Up to so many rank rows one product with the slices' B and zeros between them takes less time than one
product for each slice."""
FEW_ROWS = 32
"""Up to so many rows per adapter the kernel reads an adapter's matrices faster than torch multiplies them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceWeights:
    """Rank rows `begin` to `end` of the layer's A feed outputs `left` to `right` through `b` [rank, out]."""

    begin: int
    end: int
    left: int
    right: int
    b: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One adapter's matrices for one layer, scaling included: `a` [at least `ranks`, in].

    `ranks` is the sum of the slices' ranks, above which `a` is zero.

    `joined_b` [ranks, out] holds all slices' B, each beside the others' zeros, where that is the faster way
    to multiply many rows. `described` is what the kernel reads: addresses and sizes. `size_bytes` is what
    the matrices take, counted once: all slots of all layers are added up between two steps.
    """

    a: torch.Tensor
    ranks: int
    slices: tuple[SliceWeights, ...]
    joined_b: torch.Tensor | None
    described: NDArray[np.int64]
    size_bytes: int


def prepare_layer(
    source: LayerSource,
    output_slices: Sequence[int],
    dtype: torch.dtype,
    padded_rank: int = 0,
    *,
    room: Room | None = None,
    transpose: Transpose = transpose_with_torch,
) -> LayerWeights:
    """Copy one layer's matrices into the layout that is multiplied fastest, scaling applied.

    The scaling is applied in float32 and rounded once. `padded_rank` pads every slice with zeros to that
    rank: what an engine without true ranks computes. The copies lie in `room`.
    """
    room = room or Room(0)
    a = _room_for_a(source, padded_rank, dtype, room)
    slices: list[SliceWeights] = []
    begin = left = 0
    for part, width in zip(source, output_slices, strict=True):
        if part is not None:
            rank = padded_rank or part.rank
            a[begin : begin + part.rank] = part.a
            b = room.take(rank, part.b.shape[0], dtype=dtype, zeroed=rank > part.rank)
            transpose(part.b, part.scaling, b[: part.rank])
            slices.append(SliceWeights(begin=begin, end=begin + rank, left=left, right=left + width, b=b))
            begin += rank
        left += width
    joined = _join(slices, begin, left, room) if not padded_rank else None
    held = [a, *(part.b for part in slices), *([] if joined is None else [joined])]
    return LayerWeights(
        a=a,
        ranks=begin,
        slices=tuple(slices),
        joined_b=joined,
        described=_describe(a, begin, slices),
        size_bytes=sum(tensor.nbytes for tensor in held),
    )


def _room_for_a(source: LayerSource, padded_rank: int, dtype: torch.dtype, room: Room) -> torch.Tensor:
    """Room for the slices' A, one below the other, with zeros where none will be."""
    held = [part for part in source if part is not None]
    height = sum(padded_rank or part.rank for part in held)
    rows = -(-height // _A_ROWS) * _A_ROWS
    zeroed = rows > sum(part.rank for part in held)
    return room.take(rows, held[0].a.shape[1], dtype=dtype, zeroed=zeroed)


def _join(slices: Sequence[SliceWeights], ranks: int, width: int, room: Room) -> torch.Tensor | None:
    if len(slices) < 2 or ranks > _JOINED_RANKS:
        return None
    joined = room.take(ranks, width, dtype=slices[0].b.dtype)
    for part in slices:
        joined[part.begin : part.end, part.left : part.right] = part.b
    return joined


def _describe(a: torch.Tensor, ranks: int, slices: Sequence[SliceWeights]) -> NDArray[np.int64]:
    """The kernel's Layer: address and height of A, then every slice's bounds and the address of its B."""
    fields = [a.data_ptr(), ranks, len(slices)]
    for part in slices:
        fields += [part.begin, part.end, part.left, part.right, part.b.data_ptr()]
    return np.array(fields, dtype=np.int64)


class CpuStep(PunicaWrapperBase):  # type: ignore[misc]
    """What all layers share: this step's rows, grouped. vLLM calls `update_metadata` when they change."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.kernel: Any = load(str(dtype).removeprefix("torch."))
        self.num_rows = 0
        """How many rows a layer must have for the spans to lie within it."""
        self.few = np.empty((0, 3), dtype=np.int64)
        self.num_few_rows = 0
        self.many: tuple[Span, ...] = ()
        self.order: NDArray[np.int64] | None = None
        self._scratch = np.empty(0, dtype=np.float32)
        self.pointers = np.empty(0, dtype=np.uintp)

    def update_metadata(
        self, mapping: Any, lora_index_to_id: Sequence[int | None], *_: Any, **__: Any
    ) -> None:
        """Group the rows of the next step by slot."""
        slot_of = {adapter: slot for slot, adapter in enumerate(lora_index_to_id) if adapter is not None}
        self.group(group_rows(mapping.index_mapping, slot_of))

    def group(self, groups: RowGroups) -> None:
        """Take the groups, the small ones for the kernel."""
        most = FEW_ROWS if self.kernel else 0
        few = [span for span in groups.spans if span.stop - span.start <= most]
        self.few = np.array([(span.slot, span.start, span.stop) for span in few], dtype=np.int64)
        self.num_few_rows = sum(span.stop - span.start for span in few)
        self.many = tuple(span for span in groups.spans if span.stop - span.start > most)
        self.order = groups.order
        if groups.order is None:
            self.num_rows = max((span.stop for span in groups.spans), default=0)
        else:
            self.num_rows = int(groups.order.max()) + 1
        if self.pointers.size < self.num_few_rows:
            self.pointers = np.empty(self.num_few_rows, dtype=np.uintp)

    def scratch(self, floats: int) -> int:
        """The address of room for so many float32 values, the same for all layers."""
        if self._scratch.size < floats:
            self._scratch = np.empty(floats, dtype=np.float32)
        return self._scratch.ctypes.data

    def add_shrink(self, *_: Any, **__: Any) -> None:
        """Never called: every layer has a LayerExecution of its own."""
        raise NotImplementedError("this layer has no rank-true execution")

    add_expand = add_lora_embedding = add_lora_linear = add_lora_logits = add_shrink


class LayerExecution:
    """One layer's slots and how they are applied; stands where vLLM's layer looks for its wrapper."""

    def __init__(self, step: CpuStep, num_slots: int) -> None:
        self._step = step
        self.slots: list[LayerWeights | None] = [None] * num_slots
        self._addresses = (ctypes.c_void_p * num_slots)()
        self._most_ranks = 0

    def fill(self, slot: int, weights: LayerWeights | None) -> None:
        """Let the slot hold these matrices, or none."""
        self.slots[slot] = weights
        self._addresses[slot] = None if weights is None else weights.described.ctypes.data
        self._most_ranks = max((held.ranks for held in self.slots if held is not None), default=0)

    def add_lora_linear(self, y: torch.Tensor, x: torch.Tensor, *_: Any, **__: Any) -> None:
        """Add every adapter's share to its rows of `y` [rows, out], given `x` [rows, in], in place.

        Rows of the base model are not touched. RuntimeError for fewer rows than the step has: the kernel
        would write beyond them.
        """
        step = self._step
        if not step.num_rows:
            return
        num_rows, width = x.shape
        if num_rows < step.num_rows:
            raise RuntimeError(f"LoRA for {step.num_rows} rows in a layer that has {num_rows}")
        if x.dtype != step.dtype or y.dtype != step.dtype:
            # A router computed in float32, or `lora_dtype` given: the kernel knows one type.
            share = torch.zeros_like(y, dtype=step.dtype)
            self.add_lora_linear(share, x.to(step.dtype))
            y.add_(share)
            return
        if step.num_few_rows:
            self._add_few(y, x, width)
        for span in step.many:
            weights = self.slots[span.slot]
            if weights is None:
                continue
            if step.order is None:
                _multiply(y[span.start : span.stop], x[span.start : span.stop], weights)
                continue
            rows = torch.from_numpy(step.order[span.start : span.stop])
            gathered = y.index_select(0, rows)
            _multiply(gathered, x.index_select(0, rows), weights)
            y.index_copy_(0, rows, gathered)

    def _add_few(self, y: torch.Tensor, x: torch.Tensor, width: int) -> None:
        step = self._step
        step.kernel(
            x.data_ptr(),
            x.stride(0),
            y.data_ptr(),
            y.stride(0),
            width,
            step.few.ctypes.data,
            len(step.few),
            None if step.order is None else step.order.ctypes.data,
            ctypes.addressof(self._addresses),
            step.scratch(step.num_few_rows * (width + self._most_ranks)),
            step.pointers.ctypes.data,
        )


def _multiply(y: torch.Tensor, x: torch.Tensor, weights: LayerWeights) -> None:
    hidden = torch.nn.functional.linear(x, weights.a)
    if weights.joined_b is not None:
        y.addmm_(hidden[:, : weights.ranks], weights.joined_b)
        return
    for part in weights.slices:
        y[:, part.left : part.right].addmm_(hidden[:, part.begin : part.end], part.b)
