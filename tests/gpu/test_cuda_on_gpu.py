"""The rank-true kernels on a real GPU: against plain float32 products, and inside captured CUDA graphs."""

import dataclasses
from types import SimpleNamespace

import pytest


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_kernels_agree_with_plain_products_at_every_mix_of_ranks(dtype: str) -> None:
    from tests.support.kernel_cases import CASES, check_case

    for seed, case in enumerate(CASES.values()):
        check_case(dataclasses.replace(case, dtype=dtype), "cuda", seed)


@pytest.mark.parametrize("num_rows", [1, 8, 127, 128, 1000])
def test_kernels_agree_on_layers_of_a_real_models_size(num_rows: int) -> None:
    from tests.support.kernel_cases import KernelCase, check_case

    ranks = (8, 16, 64, 128, 0, 5, 32, 100)
    case = KernelCase(
        slot_ranks=ranks,
        row_slots=tuple(row * 7 % 9 - 1 for row in range(num_rows)),
        max_rank=128,
        in_features=4096,
        out_features=(4096, 1024, 1024),
        dtype="bfloat16",
    )
    check_case(case, "cuda")


def test_the_wrapper_computes_every_kind_of_layer_at_the_slots_ranks() -> None:
    from tests.support.wrapper_checks import WRAPPER_CHECKS, make_wrapper

    for check in WRAPPER_CHECKS:
        check(make_wrapper("cuda"), "cuda")


def test_a_captured_graph_follows_ranks_and_batches_that_change_between_replays() -> None:
    import torch

    from tests.support import wrapper_checks as kit

    wrapper = kit.make_wrapper("cuda")
    a, b = kit.weights(kit.SLICES, "cuda")
    inputs = kit.random_rows(6, kit.IN, "cuda")
    base = kit.random_rows(6, sum(kit.SLICES), "cuda", 2)
    output = torch.empty_like(base)
    wrapper.warm_up([SimpleNamespace(lora_a_stacked=a, lora_b_stacked=b)])
    # As in vLLM, which captures over adapters that are not there yet.
    for slot in range(kit.SLOTS):
        wrapper.set_slot_rank(slot, 0)
    kit.use(wrapper, kit.TOKENS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output.copy_(base)
        wrapper.add_lora_linear(output, inputs, a, b, 1.0, kit.SLICES)
    for ranks, tokens in (
        ((0, 0, 0), kit.TOKENS),
        (kit.RANKS, kit.TOKENS),
        ((8, 0, 5), kit.TOKENS),
        (kit.RANKS, (0, 11, 22, 0, 0, 11)),
        ((0, 0, 5), (11, 11, 22, 22, 0, 0)),
    ):
        for slot, rank in enumerate(ranks):
            wrapper.set_slot_rank(slot, rank)
        kit.use(wrapper, tokens)
        graph.replay()
        kit.close(output, kit.wanted(tokens, base, inputs, a, b, ranks))


def test_slots_are_filled_from_host_memory_without_waiting_for_the_device() -> None:
    import torch

    from loraserve.engines.vllm_lora.cuda_slots import slot_pieces
    from loraserve.engines.vllm_lora.weights import SliceSource

    a = torch.full((2, 1, 16, 256), float("nan"), dtype=torch.bfloat16, device="cuda")
    b = torch.full((2, 1, 128, 16), float("nan"), dtype=torch.bfloat16, device="cuda")
    layer = SimpleNamespace(lora_a_stacked=(a,), lora_b_stacked=(b,), tp_rank=0)
    part = SliceSource(a=torch.randn(5, 256), b=torch.randn(128, 5), scaling=1.5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        list(slot_pieces(layer, 1, (part,), 1024, rank=9))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(a[1, 0, :5].cpu(), part.a.bfloat16())
    assert torch.equal(b[1, 0, :, :5].cpu(), (part.b * 1.5).bfloat16())
    assert not a[1, 0, 5:].any()
    assert not b[1, 0, :, 5:].any()
    assert a[0].isnan().all()
