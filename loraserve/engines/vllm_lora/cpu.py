"""Rank-true LoRA execution on the CPU: each adapter's rows times its own matrices, at their true rank.

A slot holds references to matrices of exactly the adapter's rank, so nothing is padded and filling a slot
copies nothing. What does not change from layer to layer is decided once per step. Engine processes only.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

from loraserve.engines.vllm_lora.rows import RowGroups, Span, group_rows
from loraserve.engines.vllm_lora.weights import LayerSource

_FUSED_RANKS = 64
"""Up to so many rank rows the slices' B stand in one block-diagonal matrix: one small product instead of
three costs less than the zeros in it."""
_FUSED_ROWS = 32
"""Up to so many rows of a step that holds."""


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
    """One adapter's matrices for one layer, scaling included.

    `a` [in, sum of the slices' ranks]; `fused_b` [that sum, out] or None.
    """

    a: torch.Tensor
    slices: tuple[SliceWeights, ...]
    fused_b: torch.Tensor | None

    @property
    def size_bytes(self) -> int:
        """What the matrices take."""
        tensors = [self.a, *(part.b for part in self.slices)]
        if self.fused_b is not None:
            tensors.append(self.fused_b)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def prepare_layer(
    source: LayerSource, output_slices: Sequence[int], dtype: torch.dtype, padded_rank: int = 0
) -> LayerWeights:
    """Copy one layer's matrices into the layout that is multiplied fastest, scaling applied.

    The scaling is applied in float32 and rounded once. `padded_rank` pads every slice with zeros to that
    rank: what an engine without true ranks computes.
    """
    a_parts: list[torch.Tensor] = []
    slices: list[SliceWeights] = []
    begin = left = 0
    for part, width in zip(source, output_slices, strict=True):
        if part is not None:
            rank = padded_rank or part.rank
            a = torch.zeros(rank, part.a.shape[1], dtype=dtype)
            a[: part.rank] = part.a
            b = torch.zeros(rank, width, dtype=dtype)
            b[: part.rank] = (part.b.float() * part.scaling).t()
            a_parts.append(a)
            slices.append(SliceWeights(begin=begin, end=begin + rank, left=left, right=left + width, b=b))
            begin += rank
        left += width
    fused = _fuse(slices, begin, left, dtype) if not padded_rank else None
    return LayerWeights(a=torch.cat(a_parts).t(), slices=tuple(slices), fused_b=fused)


def _fuse(slices: Sequence[SliceWeights], ranks: int, width: int, dtype: torch.dtype) -> torch.Tensor | None:
    if len(slices) < 2 or ranks > _FUSED_RANKS:
        return None
    fused = torch.zeros(ranks, width, dtype=dtype)
    for part in slices:
        fused[part.begin : part.end, part.left : part.right] = part.b
    return fused


class CpuStep(PunicaWrapperBase):  # type: ignore[misc]
    """What all layers share: this step's rows, grouped. vLLM calls `update_metadata` when they change."""

    def __init__(self) -> None:
        self.groups = RowGroups()
        self.order: torch.Tensor | None = None

    def update_metadata(
        self, mapping: Any, lora_index_to_id: Sequence[int | None], *_: Any, **__: Any
    ) -> None:
        """Group the rows of the next step by slot."""
        slot_of = {adapter: slot for slot, adapter in enumerate(lora_index_to_id) if adapter is not None}
        self.groups = group_rows(mapping.index_mapping, slot_of)
        order = self.groups.order
        self.order = None if order is None else torch.from_numpy(order)

    def add_shrink(self, *_: Any, **__: Any) -> None:
        """Never called: every layer has a LayerExecution of its own."""
        raise NotImplementedError("this layer has no rank-true execution")

    add_expand = add_lora_embedding = add_lora_linear = add_lora_logits = add_shrink


class LayerExecution:
    """One layer's slots and how they are applied; stands where vLLM's layer looks for its wrapper."""

    def __init__(self, step: CpuStep, num_slots: int) -> None:
        self._step = step
        self.slots: list[LayerWeights | None] = [None] * num_slots

    def add_lora_linear(self, y: torch.Tensor, x: torch.Tensor, *_: Any, **__: Any) -> None:
        """Add every adapter's share to its rows of `y` [rows, out], given `x` [rows, in], in place.

        Rows of the base model are not touched.
        """
        step = self._step
        spans = step.groups.spans
        if not spans:
            return
        order = step.order
        if order is None:
            for weights, span in self._filled(spans):
                _apply(y[span.start : span.stop], x[span.start : span.stop], weights)
            return
        gathered_x, gathered_y = x.index_select(0, order), y.index_select(0, order)
        for weights, span in self._filled(spans):
            _apply(gathered_y[span.start : span.stop], gathered_x[span.start : span.stop], weights)
        y.index_copy_(0, order, gathered_y)

    def _filled(self, spans: Sequence[Span]) -> Iterator[tuple[LayerWeights, Span]]:
        for span in spans:
            weights = self.slots[span.slot]
            if weights is not None:
                yield weights, span


def _apply(y: torch.Tensor, x: torch.Tensor, weights: LayerWeights) -> None:
    hidden = torch.mm(x, weights.a)
    if weights.fused_b is not None and x.shape[0] <= _FUSED_ROWS:
        y.addmm_(hidden, weights.fused_b)
        return
    for part in weights.slices:
        y[:, part.left : part.right].addmm_(hidden[:, part.begin : part.end], part.b)
