"""Rank-true execution of one layer on the CPU against the plain product, with the kernel and without it."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.engines.vllm_lora import few_rows

WIDTH, OUTPUTS = 33, (20, 7, 40)
RANKS = st.sampled_from([1, 3, 8, 16])


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """What the engine is told about the kernel, where there is one and where there is none."""
    try:
        return {True: str(few_rows.build(tmp_path_factory.mktemp("kernels"))), False: ""}
    except few_rows.BuildError as error:
        pytest.skip(f"no kernel to compare with: {error}")


def source_of(ranks: tuple[int | None, ...], seed: int) -> Any:
    """One adapter's slices, float16 as adapters often are, scaled by 3 / rank."""
    import torch

    from loraserve.engines.vllm_lora.weights import SliceSource

    generator = torch.Generator().manual_seed(seed)
    return tuple(
        None
        if rank is None
        else SliceSource(
            a=torch.randn(rank, WIDTH, generator=generator).half(),
            b=torch.randn(out, rank, generator=generator).half(),
            scaling=3 / rank,
        )
        for rank, out in zip(ranks, OUTPUTS, strict=True)
    )


@settings(max_examples=40, deadline=None)
@given(
    runs=st.lists(
        st.tuples(st.sampled_from([0, 5, 6, 7]), st.sampled_from([1, 2, 31, 32, 33, 70])),
        min_size=1,
        max_size=6,
    ),
    ranks=st.lists(st.tuples(RANKS, RANKS | st.none(), RANKS), min_size=3, max_size=3),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    padded=st.booleans(),
    compiled=st.booleans(),
)
def test_every_row_gets_its_adapters_share_and_base_rows_keep_their_bits(
    libraries: dict[bool, str],
    runs: list[tuple[int, int]],
    ranks: list[tuple[int, int | None, int]],
    dtype: str,
    padded: bool,
    compiled: bool,
) -> None:
    import torch

    from loraserve.engines.vllm_lora.cpu import CpuStep, LayerExecution, prepare_layer
    from loraserve.engines.vllm_lora.room import Room, Spare

    number = getattr(torch, dtype)
    sources = {adapter: source_of(own, adapter) for adapter, own in zip((5, 6), ranks, strict=False)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(few_rows.LIBRARY, libraries[compiled])
        step = CpuStep(number)
    layer = LayerExecution(step, num_slots=3)
    # What was in memory before is not to be seen.
    spare = Spare()
    room = Room(8 * 1024**2, spare)
    room.take(4 * 1024**2, dtype=torch.bfloat16).fill_(torch.nan)
    room = Room(8 * 1024**2, spare)
    # Adapter 7 leaves this layer alone, in the slot where another one was.
    layer.fill(1, prepare_layer(source_of(ranks[2], 7), OUTPUTS, number))
    layer.fill(1, None)
    for slot, adapter in ((0, 6), (2, 5)):
        layer.fill(slot, prepare_layer(sources[adapter], OUTPUTS, number, 24 if padded else 0, room=room))
    ids = [adapter for adapter, length in runs for _ in range(length)]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(ids), WIDTH, generator=generator).to(number)
    y = torch.randn(len(ids), sum(OUTPUTS), generator=generator).to(number)
    expected = y.double()
    for adapter, source in sources.items():
        rows = torch.tensor([one == adapter for one in ids])
        left = 0
        for part, out in zip(source, OUTPUTS, strict=True):
            if part is not None:
                share = x[rows].double() @ part.a.double().t() @ part.b.double().t() * part.scaling
                expected[rows, left : left + out] += share
            left += out
    before = y.clone()

    step.update_metadata(SimpleNamespace(index_mapping=tuple(ids)), [6, 7, 5])
    layer.add_lora_linear(y, x)

    tolerance = 1e-4 if dtype == "float32" else 0.3
    torch.testing.assert_close(y.double(), expected, rtol=tolerance / 4, atol=tolerance)
    untouched = torch.tensor([adapter in (0, 7) for adapter in ids])
    assert torch.equal(y[untouched], before[untouched])


@settings(max_examples=60, deadline=None)
@given(
    rank=st.sampled_from([1, 3, 8, 16, 17, 48]),
    rows=st.sampled_from([1, 15, 16, 33, 64]),
    given_as=st.sampled_from(["float32", "float16", "bfloat16"]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    scaling=st.floats(0.01, 8.0),
    compiled=st.booleans(),
)
def test_b_is_scaled_in_float32_and_rounded_once_and_its_source_stays(
    libraries: dict[bool, str],
    rank: int,
    rows: int,
    given_as: str,
    dtype: str,
    scaling: float,
    compiled: bool,
) -> None:
    """The source may lie in a sealed segment, where a write ends the process."""
    import torch

    from loraserve.engines.vllm_lora.cpu import prepare_layer
    from loraserve.engines.vllm_lora.room import Room
    from loraserve.engines.vllm_lora.transpose import load_transpose
    from loraserve.engines.vllm_lora.weights import SliceSource

    generator = torch.Generator().manual_seed(rank)
    a, b = (
        torch.randn(*shape, generator=generator).to(getattr(torch, given_as))
        for shape in ((rank, WIDTH), (rows, rank))
    )
    before = b.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(few_rows.LIBRARY, libraries[compiled])
        transpose = load_transpose()
    prepared = prepare_layer(
        (SliceSource(a=a, b=b, scaling=scaling),),
        (rows,),
        getattr(torch, dtype),
        room=Room(0),
        transpose=transpose,
    )
    assert torch.equal(prepared.slices[0].b, (before.float() * scaling).to(getattr(torch, dtype)).t())
    assert torch.equal(b, before)


def test_memory_is_used_again_when_all_matrices_in_it_are_gone_and_is_zero_again() -> None:
    import torch

    from loraserve.engines.vllm_lora.room import Room, Spare

    spare, size_bytes = Spare(), 16 * 1024**2

    def fill() -> list[Any]:
        room = Room(size_bytes, spare)
        taken = [room.take(1024, 1024, dtype=torch.bfloat16) for _ in range(8)]
        assert not any(one.any() for one in taken)
        for one in taken:
            one.fill_(1)
        return taken

    first = fill()
    where = first[0].data_ptr()
    view = first[-1][3:5]
    second = fill()
    assert second[0].data_ptr() != where
    del first
    assert spare.size_bytes == 0, "a view is left"
    del view
    assert spare.size_bytes == size_bytes
    assert fill()[0].data_ptr() == where
    # Small ones take nothing of it, and what is kept is bounded.
    Room(1000, spare).take(10, dtype=torch.bfloat16)
    assert spare.size_bytes == size_bytes
    many = [fill() for _ in range(10)]
    del many, second
    assert spare.size_bytes == 128 * 1024**2


def test_what_is_taken_from_one_room_is_apart_and_zero_and_outlives_it() -> None:
    import torch

    from loraserve.engines.vllm_lora.room import Room

    room = Room(64 * 1024**2)
    shapes = [(1, 1), (3, 5), (1000, 4001), (4096, 4096), (2, 2)]
    taken = [room.take(*shape, dtype=torch.bfloat16) for shape in shapes]
    del room
    assert not any(one.any() for one in taken)
    for number, one in enumerate(taken):
        assert one.data_ptr() % 64 == 0
        one.fill_(number + 1)
    assert [(tuple(one.shape), one.unique().tolist()) for one in taken] == [
        (shape, [number + 1.0]) for number, shape in enumerate(shapes)
    ]
