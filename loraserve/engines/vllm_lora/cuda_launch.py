"""Launches the rank-true kernels: tiles, grids, and what they are told about a batch.

Knows torch and Triton only, so that Triton's interpreter can run it without a GPU and without vLLM.

Checked without a GPU: numerics in float32 and float16 through Triton's interpreter (whose product of
bfloat16 blocks is wrong, so not in that), and compilation for compute capability 8.0 and 9.0. Tile sizes
start from those of vLLM 0.29 and were not tuned on a device.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from loraserve.engines.vllm_lora.cuda_kernels import expand_kernel, shrink_kernel
from loraserve.engines.vllm_lora.cuda_slots import RANK_STEP

DECODE_ROWS = 128
"""Below this many rows a step counts as decoding: few rows per adapter, bound by reading the weights."""

# One 16-byte access of half-precision numbers, and what Triton takes an integer argument to be divisible by.
_ALIGNMENT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Which rows of a batch belong to which slot; all tensors int32, on the kernels' device.

    Group i holds `group_rows[i]` rows: those that `sorted_rows` names from `group_first[i]` on. They use
    slot `group_slots[i]`, or no adapter where that is -1. `num_groups` is the grid's size, which may be more
    than there are groups: the slots of those are -1.
    """

    sorted_rows: torch.Tensor
    group_rows: torch.Tensor
    group_first: torch.Tensor
    group_slots: torch.Tensor
    num_groups: int
    slot_ranks: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """The block sizes of one launch; `split_k` programs share one product over the input features."""

    block_m: int
    block_n: int
    block_k: int
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 2


def shrink_tiles(num_rows: int, in_features: int, *, one_pass: bool) -> Tiles:
    """The tiles of shrink for so many rows.

    Two sets only, chosen by the number of rows and never by a rank, so that nothing is compiled while the
    engine serves. `block_n` is 16, the smallest that a matrix unit takes: it is the step in which a rank
    costs. `one_pass` forgoes the split, whose additions come in no fixed order.
    """
    decode = num_rows < DECODE_ROWS
    block_k = min(256 if decode else 64, max(16, triton.next_power_of_2(in_features)))
    # A decoding step has a handful of blocks for a whole GPU: only the split keeps it busy.
    wanted = 16 if decode else 8
    split_k = 1 if one_pass else min(wanted, triton.next_power_of_2(triton.cdiv(in_features, block_k)))
    return Tiles(block_m=16 if decode else 64, block_n=16, block_k=block_k, split_k=split_k)


def expand_tiles(num_rows: int, max_rank: int) -> Tiles:
    """The tiles of expand for so many rows, again two sets only."""
    decode = num_rows < DECODE_ROWS
    return Tiles(
        block_m=16 if decode else 64,
        block_n=128 if decode else 64,
        block_k=16 if max_rank <= 16 else 32,
    )


def rank_step(max_rank: int) -> int:
    """What ranks are rounded up to where `max_rank` rows are allocated."""
    return RANK_STEP if max_rank % RANK_STEP == 0 else 1


def buffer_width(highest_rank: int) -> int:
    """How wide the buffer between shrink and expand must be for adapters up to `highest_rank`."""
    # Always a multiple of what Triton specialises on: one compiled kernel for all.
    return max(1, -(-highest_rank // _ALIGNMENT)) * _ALIGNMENT


# Without a limit, because a captured graph goes on reading what it was given; two entries per LoRA layer.
@functools.cache
def _table(slices: tuple[tuple[int, int, int], ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(slices, dtype=torch.int64, device=device)


def slice_table(
    weights: Sequence[torch.Tensor], out_features: Sequence[int], first_column: int = 0
) -> torch.Tensor:
    """int64 [slices, 3] on the weights' device: address, first output column, output columns.

    A function of its key alone, so remembering it can never be wrong. Its copy to the device is not
    allowed while a CUDA graph is captured: each layer must have run once before.
    """
    firsts = itertools.accumulate(out_features, initial=first_column)
    addresses = [weight.data_ptr() for weight in weights]
    if any(address % _ALIGNMENT for address in addresses):
        raise ValueError(f"LoRA weights must begin at a multiple of {_ALIGNMENT} bytes")
    return _table(tuple(zip(addresses, firsts, out_features, strict=False)), weights[0].device)


def _triton_type(dtype: torch.dtype) -> Any:
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]


def shrink(
    inputs: torch.Tensor,
    weights: Sequence[torch.Tensor],
    buffer: torch.Tensor,
    groups: Groups,
    *,
    highest_rank: int,
    scaling: float = 1.0,
    rank_offset: int = 0,
    one_pass: bool = False,
) -> None:
    """Writes buffer[slice, row, :rank] for every row that has an adapter.

    inputs [rows, in], weights per slice [slots, 1, rank rows, in] of the same type, buffer float32
    [slices, rows, width]. `highest_rank` bounds the grid: at least that of every slot in `groups` now and,
    where a CUDA graph is captured, in all its replays. `rank_offset` is the first rank row of a shard of A.
    Above a row's rank the buffer holds nothing of meaning.
    """
    num_rows, in_features = inputs.shape
    slot_rows = weights[0].shape[-2]
    width = min(slot_rows, buffer.shape[-1])
    tiles = shrink_tiles(num_rows, in_features, one_pass=one_pass)
    if tiles.split_k > 1:
        buffer.zero_()
    local_rank = min(highest_rank - rank_offset, width)
    # Never an empty grid: a launch that does nothing still compiles the kernel before a graph is captured.
    num_rank_blocks = max(1, triton.cdiv(local_rank, tiles.block_n))
    num_blocks = tiles.split_k * triton.cdiv(num_rows, tiles.block_m) * num_rank_blocks
    shrink_kernel[(num_blocks, len(weights), groups.num_groups)](
        inputs,
        slice_table(weights, [0] * len(weights)),
        buffer,
        groups.slot_ranks,
        groups.sorted_rows,
        groups.group_rows,
        groups.group_first,
        groups.group_slots,
        scaling,
        num_rank_blocks,
        rank_offset,
        in_features,
        width,
        inputs.stride(0),
        slot_rows * in_features,
        buffer.stride(0),
        buffer.stride(1),
        weight_type=_triton_type(weights[0].dtype),
        step=rank_step(width),
        even_k=in_features % (tiles.block_k * tiles.split_k) == 0,
        block_m=tiles.block_m,
        block_n=tiles.block_n,
        block_k=tiles.block_k,
        split_k=tiles.split_k,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def expand(
    buffer: torch.Tensor,
    weights: Sequence[torch.Tensor],
    output: torch.Tensor,
    groups: Groups,
    *,
    first_column: int = 0,
    add_inputs: bool = True,
) -> None:
    """Adds to `output` (or writes, without `add_inputs`) the product for every row that has an adapter.

    buffer [slices, rows, width], weights per slice [slots, 1, out, max_rank], output [rows, columns] whose
    slices lie side by side from `first_column` on. Rows without an adapter, and those of an empty slot, are
    left as they are.
    """
    max_rank = weights[0].shape[-1]
    out_features = [weight.shape[-2] for weight in weights]
    num_rows = buffer.shape[1]
    width = min(max_rank, buffer.shape[-1])
    tiles = expand_tiles(num_rows, max_rank)
    aligned = all(value % _ALIGNMENT == 0 for value in (*out_features, first_column, output.stride(0)))
    num_blocks = triton.cdiv(num_rows, tiles.block_m) * triton.cdiv(max(out_features), tiles.block_n)
    expand_kernel[(num_blocks, len(weights), groups.num_groups)](
        buffer,
        slice_table(weights, out_features, first_column),
        output,
        groups.slot_ranks,
        groups.sorted_rows,
        groups.group_rows,
        groups.group_first,
        groups.group_slots,
        max(out_features),
        max_rank,
        width,
        buffer.stride(0),
        buffer.stride(1),
        output.stride(0),
        weight_type=_triton_type(weights[0].dtype),
        step=rank_step(width),
        out_step=_ALIGNMENT if aligned else 1,
        add_inputs=add_inputs,
        block_m=tiles.block_m,
        block_n=tiles.block_n,
        block_k=tiles.block_k,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def product(
    inputs: torch.Tensor,
    a_weights: Sequence[torch.Tensor],
    b_weights: Sequence[torch.Tensor],
    output: torch.Tensor,
    groups: Groups,
    *,
    highest_rank: int,
    scaling: float = 1.0,
    add_inputs: bool = True,
    one_pass: bool = False,
) -> None:
    """Shrink, then expand, with a buffer no wider than the batch needs."""
    shape = (len(a_weights), inputs.shape[0], buffer_width(highest_rank))
    buffer = torch.empty(shape, dtype=torch.float32, device=inputs.device)
    shrink(inputs, a_weights, buffer, groups, highest_rank=highest_rank, scaling=scaling, one_pass=one_pass)
    expand(buffer, b_weights, output, groups, add_inputs=add_inputs)


def compile_for(
    a_weights: Sequence[torch.Tensor], b_weights: Sequence[torch.Tensor], *, one_pass: bool = False
) -> None:
    """Run both kernels of a layer on rows without an adapter, with either set of tiles.

    So that nothing is compiled, and no table is copied, under a request or a graph's capture.
    """
    device, dtype = a_weights[0].device, a_weights[0].dtype
    nothing = torch.zeros(1, dtype=torch.int32, device=device)
    groups = Groups(
        sorted_rows=nothing,
        group_rows=nothing,
        group_first=nothing,
        group_slots=nothing - 1,
        num_groups=1,
        slot_ranks=nothing,
    )
    for num_rows in (1, DECODE_ROWS):
        inputs = torch.zeros((num_rows, a_weights[0].shape[-1]), dtype=dtype, device=device)
        columns = sum(weight.shape[-2] for weight in b_weights)
        output = torch.zeros((num_rows, columns), dtype=dtype, device=device)
        product(inputs, a_weights, b_weights, output, groups, highest_rank=1, one_pass=one_pass)
