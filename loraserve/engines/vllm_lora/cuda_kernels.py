"""Triton kernels that give every adapter of a batch the work of its own rank.

Two kernels: shrink (rows times A into a buffer) and expand (buffer times B onto the output). `cuda_launch`
chooses their tiles and launches them. Knows Triton only.

vLLM's own kernels compute all `max_lora_rank` rows for every adapter. Here `slot_ranks`, an int32 tensor on
the device with the true rank of each slot's adapter, is read by the kernels themselves: a shrink program
whose block of A's rows begins at or above the rank ends at once, and expand's loop over the rank stops
there. The ranks are data, never part of a launch, so a captured CUDA graph serves whatever is in its slots
at replay. Splitting a batch by classes of rank would add launches and take away nothing: a program's work
already depends on its own adapter alone, never on the batch's highest rank.

A rank is rounded up to `step` rows, the width of one 16-byte load of half-precision weights; what lies
between must be zero (`cuda_slots.slot_pieces` sees to it). Rows of A and columns of B above are never read,
nor is the buffer where it was not written.
"""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _rank_of(
    slot_ranks: tl.tensor, slot: tl.tensor, rank_offset: tl.tensor, width: tl.tensor, step: tl.constexpr
) -> tl.tensor:
    """A slot's rank within a shard that begins at `rank_offset`: a multiple of `step`, at most `width`."""
    rank = tl.load(slot_ranks + slot) - rank_offset
    rank = tl.maximum(tl.minimum(rank, width), 0)
    # The multiplication is what lets the compiler see that masks change every `step` elements only.
    return (rank + step - 1) // step * step


@triton.jit(do_not_specialize=["num_rank_blocks", "rank_offset"])  # type: ignore[untyped-decorator, unused-ignore]
def shrink_kernel(
    inputs: tl.tensor,
    table: tl.tensor,
    buffer: tl.tensor,
    slot_ranks: tl.tensor,
    sorted_rows: tl.tensor,
    group_rows: tl.tensor,
    group_first: tl.tensor,
    group_slots: tl.tensor,
    scaling: tl.tensor,
    num_rank_blocks: tl.tensor,
    rank_offset: tl.tensor,
    in_features: tl.tensor,
    width: tl.tensor,
    inputs_stride: tl.tensor,
    slot_stride: tl.tensor,
    buffer_slice_stride: tl.tensor,
    buffer_row_stride: tl.tensor,
    weight_type: tl.constexpr,
    step: tl.constexpr,
    even_k: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    split_k: tl.constexpr,
) -> None:
    """buffer[slice, row, :rank] = inputs[row] @ A[slice, slot, :rank].T * scaling.

    Grid: (split_k * row blocks * rank blocks, slices, groups). With `split_k` above one the partial sums are
    added to the buffer, which must be zero before.
    """
    slot = tl.load(group_slots + tl.program_id(2))
    if slot < 0:
        return
    program = tl.program_id(0)
    part = program % split_k
    first_n = program // split_k % num_rank_blocks * block_n
    first_m = program // split_k // num_rank_blocks * block_m
    rank = _rank_of(slot_ranks, slot, rank_offset, width, step)
    if first_n >= rank:
        return
    num_rows = tl.load(group_rows + tl.program_id(2))
    if first_m >= num_rows:
        return

    m = first_m + tl.arange(0, block_m)
    n = first_n + tl.arange(0, block_n)
    k = part * block_k + tl.arange(0, block_k)
    # Rows past the group's end compute row 0 and are dropped at the store: no mask in the loop.
    first = tl.load(group_first + tl.program_id(2))
    rows = tl.load(sorted_rows + first + m, mask=m < num_rows, other=0).to(tl.int64)
    slice_id = tl.program_id(1)
    weights = tl.multiple_of(tl.load(table + 3 * slice_id).to(tl.pointer_type(weight_type)), 16)
    left = inputs + rows[:, None] * inputs_stride + k[None, :]
    right = weights + slot.to(tl.int64) * slot_stride + n[None, :] * in_features + k[:, None]
    inside_rank = n[None, :] < rank

    product = tl.zeros((block_m, block_n), dtype=tl.float32)
    for done in range(0, in_features, block_k * split_k):
        if even_k:
            left_tile = tl.load(left)
            right_tile = tl.load(right, mask=inside_rank, other=0.0)
        else:
            left_tile = tl.load(left, mask=done + k[None, :] < in_features, other=0.0)
            right_tile = tl.load(right, mask=inside_rank & (done + k[:, None] < in_features), other=0.0)
        product = tl.dot(left_tile, right_tile, product, input_precision="ieee")
        left += block_k * split_k
        right += block_k * split_k

    target = buffer + slice_id * buffer_slice_stride + rows[:, None] * buffer_row_stride + n[None, :]
    inside = (m[:, None] < num_rows) & inside_rank
    if split_k == 1:
        tl.store(target, product * scaling, mask=inside)
    else:
        tl.atomic_add(target, product * scaling, mask=inside, sem="relaxed")


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def expand_kernel(
    buffer: tl.tensor,
    table: tl.tensor,
    output: tl.tensor,
    slot_ranks: tl.tensor,
    sorted_rows: tl.tensor,
    group_rows: tl.tensor,
    group_first: tl.tensor,
    group_slots: tl.tensor,
    max_out: tl.tensor,
    max_rank: tl.tensor,
    width: tl.tensor,
    buffer_slice_stride: tl.tensor,
    buffer_row_stride: tl.tensor,
    output_stride: tl.tensor,
    weight_type: tl.constexpr,
    step: tl.constexpr,
    out_step: tl.constexpr,
    add_inputs: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
) -> None:
    """output[row, columns of slice] (+)= buffer[slice, row, :rank] @ B[slice, slot, :, :rank].T.

    Grid: (row blocks * column blocks, slices, groups).
    """
    slot = tl.load(group_slots + tl.program_id(2))
    if slot < 0:
        return
    # Neighbouring programs share a block of B, not of rows: B is the larger of the two.
    num_row_blocks = tl.num_programs(0) // tl.cdiv(max_out, block_n)
    first_m = tl.program_id(0) % num_row_blocks * block_m
    first_n = tl.program_id(0) // num_row_blocks * block_n
    num_rows = tl.load(group_rows + tl.program_id(2))
    if first_m >= num_rows:
        return
    slice_id = tl.program_id(1)
    out_features = tl.multiple_of(tl.load(table + 3 * slice_id + 2), out_step)
    rank = _rank_of(slot_ranks, slot, 0, width, step)
    if (first_n >= out_features) | (rank == 0):
        return

    m = first_m + tl.arange(0, block_m)
    n = first_n + tl.arange(0, block_n)
    k = tl.arange(0, block_k)
    first = tl.load(group_first + tl.program_id(2))
    rows = tl.load(sorted_rows + first + m, mask=m < num_rows, other=0).to(tl.int64)
    weights = tl.multiple_of(tl.load(table + 3 * slice_id).to(tl.pointer_type(weight_type)), 16)
    left = buffer + slice_id * buffer_slice_stride + rows[:, None] * buffer_row_stride + k[None, :]
    slot_stride = out_features * max_rank
    right = weights + slot * slot_stride + n[None, :] * max_rank + k[:, None]
    inside_rows = m[:, None] < num_rows
    inside_columns = n[None, :] < out_features

    product = tl.zeros((block_m, block_n), dtype=tl.float32)
    for done in range(0, rank, block_k):
        # Both sides are masked: what is above the rank may be NaN, and so may 0 times it.
        left_tile = tl.load(left, mask=inside_rows & (done + k[None, :] < rank), other=0.0)
        right_tile = tl.load(right, mask=inside_columns & (done + k[:, None] < rank), other=0.0)
        product = tl.dot(left_tile.to(weight_type), right_tile, product, input_precision="ieee")
        left += block_k
        right += block_k

    out_first = tl.multiple_of(tl.load(table + 3 * slice_id + 1), out_step)
    target = output + rows[:, None] * output_stride + out_first + n[None, :]
    inside = inside_rows & inside_columns
    if add_inputs:
        product += tl.load(target, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, product.to(output.dtype.element_ty), mask=inside)
