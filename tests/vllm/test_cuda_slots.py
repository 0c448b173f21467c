"""Filling vLLM's stacked tensors at an adapter's own rank: on CPU tensors, with no engine."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

IN, OUT, SLOTS = 12, 10, 3


@dataclasses.dataclass(kw_only=True)
class StackedLayer:
    """What slot writing uses of vLLM's LoRA layers."""

    lora_a_stacked: tuple[Any, ...]
    lora_b_stacked: tuple[Any, ...]
    tp_rank: int = 0


def stacked_layer(
    max_rank: int, num_slices: int, dtype: Any, *, a_rows: int = 0, tp_rank: int = 0
) -> StackedLayer:
    """A layer whose slots hold what earlier adapters left: NaN, which nothing may be computed from."""
    import torch

    return StackedLayer(
        lora_a_stacked=tuple(
            torch.full((SLOTS, 1, a_rows or max_rank, IN), float("nan"), dtype=dtype)
            for _ in range(num_slices)
        ),
        lora_b_stacked=tuple(
            torch.full((SLOTS, 1, OUT, max_rank), float("nan"), dtype=dtype) for _ in range(num_slices)
        ),
        tp_rank=tp_rank,
    )


def source_of(ranks: Sequence[int | None], dtype: Any, scaling: float = 1.0) -> Any:
    """One random part per slice, None where the adapter leaves the slice alone."""
    import torch

    from loraserve.engines.vllm_lora.weights import SliceSource

    generator = torch.Generator().manual_seed(0)
    return tuple(
        None
        if rank is None
        else SliceSource(
            a=torch.randn(rank, IN, generator=generator).to(dtype),
            b=torch.randn(OUT, rank, generator=generator).to(dtype),
            scaling=scaling,
        )
        for rank in ranks
    )


@settings(max_examples=60, deadline=None)
@given(
    max_rank=st.sampled_from([1, 8, 16, 64]),
    slice_ranks=st.lists(st.none() | st.integers(1, 64), min_size=1, max_size=3),
    highest=st.integers(0, 64),
    scaling=st.sampled_from([1.0, 0.5, 3.7]),
    source_type=st.sampled_from(["float32", "float16", "bfloat16"]),
    slot_type=st.sampled_from(["float32", "float16", "bfloat16"]),
    piece_bytes=st.integers(1, 4096),
)
def test_a_slot_holds_the_scaled_adapter_then_zeros_then_what_it_held(
    max_rank: int,
    slice_ranks: list[int | None],
    highest: int,
    scaling: float,
    source_type: str,
    slot_type: str,
    piece_bytes: int,
) -> None:
    import torch

    from loraserve.engines.vllm_lora.cuda_slots import readable_rank, slot_pieces

    ranks = [None if rank is None else min(rank, max_rank) for rank in slice_ranks]
    rank = min(max_rank, max([highest, *(rank or 0 for rank in ranks)]))
    dtype = getattr(torch, slot_type)
    layer = stacked_layer(max_rank, len(ranks), dtype)
    source = source_of(ranks, getattr(torch, source_type), scaling)
    before = [(part.a.clone(), part.b.clone()) for part in source if part]

    written = list(slot_pieces(layer, 1, source, piece_bytes, rank=rank))

    readable = readable_rank(rank, max_rank)
    item_bytes = torch.empty(0, dtype=dtype).element_size()
    assert sum(written) == len(ranks) * readable * (IN + OUT) * item_bytes
    assert all(piece <= max(piece_bytes, IN * item_bytes, readable * item_bytes) for piece in written)
    for part, own, a, b in zip(source, ranks, layer.lora_a_stacked, layer.lora_b_stacked, strict=True):
        own = own or 0
        if part is not None:
            assert torch.equal(a[1, 0, :own], part.a.to(dtype))
            assert torch.equal(b[1, 0, :, :own], (part.b.float() * scaling).to(dtype))
        assert not a[1, 0, own:readable].any()
        assert not b[1, 0, :, own:readable].any()
        assert a[1, 0, readable:].isnan().all()
        assert b[1, 0, :, readable:].isnan().all()
        assert a[[0, 2]].isnan().all()
        assert b[[0, 2]].isnan().all()
    for (a, b), part in zip(before, (part for part in source if part), strict=True):
        assert torch.equal(a, part.a), "the source changed"
        assert torch.equal(b, part.b), "the source changed"


def test_a_layer_that_the_adapter_leaves_alone_is_zero_as_far_as_the_kernels_read() -> None:
    import torch

    from loraserve.engines.vllm_lora.cuda_slots import slot_pieces

    layer = stacked_layer(16, 2, torch.float32)
    assert sum(slot_pieces(layer, 0, None, 1 << 20, rank=3)) == 2 * 8 * (IN + OUT) * 4
    for a, b in zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True):
        assert not a[0, 0, :8].any()
        assert not b[0, 0, :, :8].any()
        assert a[0, 0, 8:].isnan().all()


def test_nothing_is_written_before_it_is_asked_for() -> None:
    import torch

    from loraserve.engines.vllm_lora.cuda_slots import slot_pieces

    layer = stacked_layer(8, 1, torch.float32)
    pieces = slot_pieces(layer, 0, source_of([8], torch.float32), 2 * IN * 4, rank=8)
    assert layer.lora_a_stacked[0].isnan().all()
    assert next(pieces) == 2 * IN * 4
    assert not layer.lora_a_stacked[0][0, 0, :2].isnan().any()
    assert layer.lora_a_stacked[0][0, 0, 2:].isnan().all()


@pytest.mark.parametrize(("tp_rank", "own_rows"), [(0, 8), (1, 4), (2, 0)])
def test_a_worker_that_holds_part_of_the_ranks_clears_only_its_own(tp_rank: int, own_rows: int) -> None:
    import torch

    from loraserve.engines.vllm_lora.cuda_slots import slot_memory, slot_pieces

    layer = stacked_layer(32, 1, torch.float32, a_rows=8, tp_rank=tp_rank)
    [whole] = source_of([12], torch.float32)
    part = dataclasses.replace(whole, a=whole.a[tp_rank * 8 : tp_rank * 8 + 8])
    list(slot_pieces(layer, 0, (part,), 1 << 20, rank=12))
    a, b = layer.lora_a_stacked[0][0, 0], layer.lora_b_stacked[0][0, 0]
    assert torch.equal(a[:own_rows], part.a)
    # 4 rows of this worker are read as 8.
    assert not a[own_rows : -(-own_rows // 8) * 8].any()
    assert torch.equal(b[:, :12], whole.b)
    _, used = slot_memory({"layer": layer}, [12, 0, 0])
    assert used == (own_rows * IN + 12 * OUT) * 4


def test_an_adapter_above_the_slots_rank_is_refused() -> None:
    import torch

    from loraserve.engines.vllm_lora.cuda_slots import slot_pieces

    with pytest.raises(ValueError, match="rank 9 does not fit slots of rank 8"):
        next(slot_pieces(stacked_layer(8, 1, torch.float32), 0, None, 1024, rank=9))


def test_memory_counts_each_layer_once_and_each_slot_at_its_true_rank() -> None:
    import torch

    from loraserve.engines.vllm_lora.cuda_slots import slot_memory

    one, two = stacked_layer(16, 2, torch.bfloat16), stacked_layer(16, 1, torch.bfloat16)
    allocated, used = slot_memory({"one": one, "alias": one, "two": two}, [16, 3, 0])
    assert allocated == 3 * SLOTS * 16 * (IN + OUT) * 2
    assert used == 3 * (16 + 3) * (IN + OUT) * 2
