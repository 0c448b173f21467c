"""The rule that chooses an engine's sizes: never above the memory, at least one of each, monotone."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.engine_sizes import (
    MAX_POOL_ADAPTERS,
    RANK_STEPS,
    AdapterSize,
    SizeInputs,
    choose_sizes,
    slot_uses,
)

MIB = 2**20

SIZES = st.lists(
    st.builds(AdapterSize, rank=st.integers(1, 512), size_bytes=st.integers(1, 100 * MIB)), max_size=20
)
INPUTS = st.builds(
    SizeInputs,
    adapters=SIZES,
    bytes_per_rank=st.integers(0, 4 * MIB),
    slot_bytes=st.integers(1, 2**33),
    pool_bytes=st.integers(1, 2**33),
    max_num_seqs=st.integers(1, 64),
    is_padded=st.booleans(),
    num_spare_slots=st.integers(0, 1),
)


def _inputs(*ranks: int, is_padded: bool = True, slot_mib: int = 1024, **others: int) -> SizeInputs:
    values = {"bytes_per_rank": MIB, "pool_bytes": 1024 * MIB, "max_num_seqs": 64} | others
    adapters = [AdapterSize(rank=rank, size_bytes=rank * MIB // 2) for rank in ranks]
    return SizeInputs(adapters=adapters, slot_bytes=slot_mib * MIB, is_padded=is_padded, **values)


def _chosen(inputs: SizeInputs) -> tuple[int, int, int]:
    sizes = choose_sizes(inputs)
    return sizes.max_lora_rank, sizes.adapter_slots, sizes.pool_adapters


@given(inputs=INPUTS)
def test_slots_and_pool_stay_inside_their_memory_and_are_at_least_one(inputs: SizeInputs) -> None:
    sizes = choose_sizes(inputs)
    assert sizes.max_lora_rank in RANK_STEPS
    assert all(adapter.rank <= sizes.max_lora_rank for adapter in inputs.adapters)
    assert 1 <= sizes.adapter_slots <= min(inputs.max_num_seqs, sizes.pool_adapters)
    assert 1 <= sizes.pool_adapters <= MAX_POOL_ADAPTERS
    costliest = sorted((adapter.rank for adapter in inputs.adapters), reverse=True)
    costliest += [sizes.max_lora_rank] * (sizes.adapter_slots - len(costliest))
    uses = slot_uses(
        costliest[: sizes.adapter_slots],
        max_lora_rank=sizes.max_lora_rank,
        bytes_per_rank=inputs.bytes_per_rank,
        is_padded=inputs.is_padded,
    )
    spare_bytes = inputs.num_spare_slots * sizes.max_lora_rank * inputs.bytes_per_rank
    taken_bytes = spare_bytes + sum(use.allocated_bytes for use in uses)
    assert sizes.adapter_slots == 1 or taken_bytes <= inputs.slot_bytes
    if inputs.adapters and sizes.pool_adapters > 1:
        smallest = min(adapter.size_bytes for adapter in inputs.adapters)
        assert sizes.pool_adapters * smallest <= inputs.pool_bytes


@given(inputs=INPUTS, more_slot_bytes=st.integers(0, 2**33), more_pool_bytes=st.integers(0, 2**33))
def test_more_memory_never_gives_less(inputs: SizeInputs, more_slot_bytes: int, more_pool_bytes: int) -> None:
    more = replace(
        inputs,
        slot_bytes=inputs.slot_bytes + more_slot_bytes,
        pool_bytes=inputs.pool_bytes + more_pool_bytes,
    )
    assert all(after >= before for before, after in zip(_chosen(inputs), _chosen(more), strict=True))


@pytest.mark.parametrize(
    ("inputs", "chosen"),
    [
        # Nothing registered: 64 covers most; eight slots if they fit.
        (_inputs(), (64, 8, MAX_POOL_ADAPTERS)),
        (_inputs(slot_mib=200), (64, 3, MAX_POOL_ADAPTERS)),
        (_inputs(is_padded=False), (128, 8, MAX_POOL_ADAPTERS)),
        # The highest rank is everybody's cost where slots are padded, its own where they are not.
        (_inputs(*[8] * 20, slot_mib=160), (8, 20, 256)),
        (_inputs(*[8] * 20, 100, slot_mib=300), (128, 2, 256)),
        (_inputs(*[8] * 20, 100, slot_mib=300, is_padded=False), (128, 21, 256)),
        # A slot for an adapter that is not registered yet costs the highest rank.
        (_inputs(8, 8, slot_mib=272, is_padded=False), (128, 4, 256)),
        # Never more than the batch has sequences or the pool adapters; always one.
        (_inputs(*[8] * 20, max_num_seqs=5), (8, 5, 256)),
        (_inputs(*[8] * 20, pool_bytes=12 * MIB), (8, 3, 3)),
        (_inputs(512, slot_mib=100, pool_bytes=MIB), (512, 1, 1)),
        # vLLM's own execution keeps one slot empty on the CPU.
        (_inputs(*[8] * 20, slot_mib=32, num_spare_slots=1), (8, 3, 256)),
        # What is given is not chosen.
        (_inputs(*[8] * 20, max_lora_rank=64, slot_mib=160), (64, 2, 256)),
        (_inputs(*[8] * 20, adapter_slots=30, pool_adapters=40), (8, 30, 40)),
    ],
)
def test_the_rule_by_examples(inputs: SizeInputs, chosen: tuple[int, int, int]) -> None:
    assert _chosen(inputs) == chosen


def test_the_reason_names_what_was_looked_at() -> None:
    reason = choose_sizes(_inputs(8, 100, slot_mib=10)).reason
    assert "2 adapters registered, ranks up to 100; slots are padded" in reason
    assert "less than one slot needs" in reason
    assert "not known" in choose_sizes(_inputs(8, bytes_per_rank=0)).reason


def test_padding_is_what_a_slot_takes_beyond_its_adapters_own_rank() -> None:
    padded = slot_uses([8, 128], max_lora_rank=128, bytes_per_rank=10, is_padded=True)
    assert [(use.allocated_bytes, use.used_bytes, use.padding_bytes) for use in padded] == [
        (1280, 80, 1200),
        (1280, 1280, 0),
    ]
    own = slot_uses([8, 128], max_lora_rank=128, bytes_per_rank=10, is_padded=False)
    assert [use.padding_bytes for use in own] == [0, 0]
    with pytest.raises(ValueError, match="rank 129: expected 0 to max_lora_rank = 128"):
        slot_uses([129], max_lora_rank=128, bytes_per_rank=10, is_padded=True)
