"""Fills vLLM's stacked LoRA tensors at an adapter's own rank, piece by piece, and says what they hold.

Engine processes only; needs torch, not Triton, and works on CPU tensors as on a device's. vLLM allocates
every slot of a layer in one tensor at `max_lora_rank`, so slots cannot be allocated by rank: a low-rank
adapter leaves the rest of its slot unused, which `slot_memory` counts.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from loraserve.engines.vllm_lora.weights import LayerSource

RANK_STEP = 8
"""The kernels read ranks rounded up to this: the width of one 16-byte load of half-precision weights."""


def readable_rank(rank: int, max_rank: int) -> int:
    """How many rank rows the kernels may read where the highest rank of a slot's adapter is `rank`."""
    return min(max_rank, -(-rank // RANK_STEP) * RANK_STEP)


def slot_pieces(
    layer: Any, slot: int, source: "LayerSource | None", piece_bytes: int, *, rank: int
) -> Iterator[int]:
    """Write one layer's A and B into `slot`, yielding the bytes written after each piece.

    `source` is what `weights.layer_sources` gives for the layer (any of float32, float16, bfloat16, in
    memory that may be read-only); None where the adapter leaves the layer alone. B is multiplied by the
    scaling in float32 and rounded once. `rank` is the highest rank of the adapter in any layer: up to there
    the kernels read, so what this layer does not fill below is set to zero; above, the slot is left as it
    was. A piece has at most `piece_bytes`, or one row where a row is longer. All work is queued on the
    current stream; nothing waits for the device. The slot must be in no request's use until the last piece.
    """
    parts = source or (None,) * len(layer.lora_a_stacked)
    stacks = zip(parts, layer.lora_a_stacked, layer.lora_b_stacked, strict=True)
    for part, a_stacked, b_stacked in stacks:
        max_rank = b_stacked.shape[-1]
        if rank > max_rank:
            raise ValueError(f"an adapter of rank {rank} does not fit slots of rank {max_rank}")
        a_rank = _local_rank(layer, rank, a_stacked.shape[-2], max_rank)
        a_target = a_stacked[slot, 0, : readable_rank(a_rank, a_stacked.shape[-2])]
        b_target = b_stacked[slot, 0, :, : readable_rank(rank, max_rank)]
        yield from _block_pieces(a_target, part.a if part else None, 1.0, piece_bytes)
        scaling = part.scaling if part else 1.0
        yield from _block_pieces(b_target, part.b if part else None, scaling, piece_bytes)


def slot_memory(modules: Mapping[str, Any], slot_ranks: Sequence[int]) -> tuple[int, int]:
    """Bytes that the LoRA layers' slots take, and the bytes of them that adapters of these ranks fill."""
    allocated = used = 0
    # One layer may be known by two names.
    for layer in {id(layer): layer for layer in modules.values()}.values():
        for a_stacked, b_stacked in zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True):
            shard, max_rank = a_stacked.shape[-2], b_stacked.shape[-1]
            a_row = a_stacked.shape[-1] * a_stacked.element_size()
            b_row = b_stacked.shape[-2] * b_stacked.element_size()
            allocated += a_stacked.shape[0] * shard * a_row + b_stacked.shape[0] * max_rank * b_row
            for rank in slot_ranks:
                used += _local_rank(layer, rank, shard, max_rank) * a_row + rank * b_row
    return allocated, used


def _local_rank(layer: Any, rank: int, shard: int, max_rank: int) -> int:
    """How much of a rank falls into this worker's rows of A: all but where A is split by rank (S-LoRA)."""
    first = layer.tp_rank * shard if shard < max_rank else 0
    return min(max(rank - first, 0), shard)


def _block_pieces(
    target: torch.Tensor, source: torch.Tensor | None, scaling: float, piece_bytes: int
) -> Iterator[int]:
    """Fill a matrix with another in its upper left corner and zeros elsewhere, some rows at a time."""
    row_bytes = target.shape[1] * target.element_size()
    step = max(1, piece_bytes // max(1, row_bytes))
    for first in range(0, target.shape[0], step):
        piece = target[first : first + step]
        num_rows = num_columns = 0
        if source is not None and first < source.shape[0]:
            rows = _on_device(source[first : first + step], piece, scaling)
            num_rows, num_columns = rows.shape
            piece[:num_rows, :num_columns].copy_(rows)
        piece[num_rows:].zero_()
        piece[:num_rows, num_columns:].zero_()
        yield piece.numel() * piece.element_size()


def _on_device(rows: torch.Tensor, target: torch.Tensor, scaling: float) -> torch.Tensor:
    if target.is_cuda:
        # From pinned memory the copy waits for nothing; from a mapped segment it would wait for the device.
        rows = rows.contiguous().pin_memory().to(target.device, non_blocking=True)
    # A new tensor, never in place: `rows` may lie in a sealed segment that others map as well.
    return rows if scaling == 1.0 else rows.to(torch.float32) * scaling
