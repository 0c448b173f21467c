"""Batches for the rank-true kernels, and what plain float32 products make of them.

Needs torch and Triton; runs on any device that the kernels run on. Everything that the kernels must not read
holds NaN, so that a product which touches it cannot be right.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loraserve.engines.vllm_lora import cuda_launch
from loraserve.engines.vllm_lora.cuda_slots import readable_rank

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCase:
    """One layer and one batch: a slot per row, -1 for the base model; a slot of rank 0 is empty."""

    slot_ranks: tuple[int, ...]
    row_slots: tuple[int, ...]
    max_rank: int
    in_features: int
    out_features: tuple[int, ...]
    dtype: str = "float32"
    scaling: float = 1.0
    add_inputs: bool = True
    one_pass: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A case's tensors on a device."""

    a: tuple[torch.Tensor, ...]
    b: tuple[torch.Tensor, ...]
    inputs: torch.Tensor
    output: torch.Tensor
    groups: cuda_launch.Groups


def fill_slot(layer: Layer, slot: int, rank: int, generator: torch.Generator) -> None:
    """Put random weights of a rank into a slot: zeros up to where the kernels read, NaN above."""
    for a, b in zip(layer.a, layer.b, strict=True):
        readable = readable_rank(rank, b.shape[-1])
        a[slot], b[slot] = float("nan"), float("nan")
        a[slot, 0, :readable], b[slot, 0, :, :readable] = 0.0, 0.0
        new_a = torch.randn(rank, a.shape[-1], generator=generator) / a.shape[-1] ** 0.5
        new_b = torch.randn(b.shape[-2], rank, generator=generator) / max(1, rank) ** 0.5
        a[slot, 0, :rank], b[slot, 0, :, :rank] = new_a.to(a), new_b.to(b)
    layer.groups.slot_ranks[slot] = rank


def group_rows(
    row_slots: Sequence[int], slot_ranks: Sequence[int], device: torch.device | str
) -> cuda_launch.Groups:
    """What vLLM's metadata says about such a batch: groups in the slots' order, then slots of -1."""
    slots = torch.tensor(row_slots, dtype=torch.int32)
    ids, counts = torch.unique(slots, sorted=True, return_counts=True)
    num_groups = len(slot_ranks) + 1
    group_slots = torch.full((num_groups,), -1, dtype=torch.int32)
    group_slots[: len(ids)] = ids
    sizes = torch.zeros(num_groups, dtype=torch.int32)
    sizes[: len(ids)] = counts
    first = torch.zeros(num_groups + 1, dtype=torch.int32)
    first[1:] = torch.cumsum(sizes, 0)
    return cuda_launch.Groups(
        sorted_rows=torch.sort(slots, stable=True).indices.to(device, torch.int32),
        group_rows=sizes.to(device),
        group_first=first.to(device),
        group_slots=group_slots.to(device),
        num_groups=num_groups,
        slot_ranks=torch.tensor(slot_ranks, dtype=torch.int32, device=device),
    )


def build(case: KernelCase, device: torch.device | str = "cpu", seed: int = 0) -> Layer:
    """The case's tensors, filled."""
    generator = torch.Generator().manual_seed(seed)
    dtype, slots, rows = DTYPES[case.dtype], len(case.slot_ranks), len(case.row_slots)
    layer = Layer(
        a=tuple(
            torch.empty(slots, 1, case.max_rank, case.in_features, dtype=dtype, device=device)
            for _ in case.out_features
        ),
        b=tuple(
            torch.empty(slots, 1, out, case.max_rank, dtype=dtype, device=device) for out in case.out_features
        ),
        inputs=torch.randn(rows, case.in_features, generator=generator).to(device, dtype),
        output=torch.randn(rows, sum(case.out_features), generator=generator).to(device, dtype),
        groups=group_rows(case.row_slots, case.slot_ranks, device),
    )
    for slot, rank in enumerate(case.slot_ranks):
        fill_slot(layer, slot, rank, generator)
    return layer


def expected(case: KernelCase, layer: Layer) -> torch.Tensor:
    """The output by plain products, one slot at a time, from the layer as it is now; float32, on the CPU."""
    result = layer.output.float().cpu()
    row_slots = torch.tensor(case.row_slots)
    for slot, rank in enumerate(layer.groups.slot_ranks.tolist()):
        rows = torch.nonzero(row_slots == slot).flatten()
        if rank == 0 or not len(rows):
            continue
        inputs = layer.inputs.float().cpu()[rows]
        parts = []
        for a, b in zip(layer.a, layer.b, strict=True):
            inner = inputs @ a[slot, 0, :rank].float().cpu().T * case.scaling
            # The kernels hand the inner product to the matrix units in the weights' type.
            inner = inner.to(a.dtype).float()
            parts.append(inner @ b[slot, 0, :, :rank].float().cpu().T)
        product = torch.cat(parts, dim=1)
        result[rows] = result[rows] + product if case.add_inputs else product
    return result


def compute(case: KernelCase, layer: Layer, output: torch.Tensor, highest_rank: int) -> None:
    """Run the kernels, with a grid for `highest_rank`."""
    cuda_launch.product(
        layer.inputs,
        layer.a,
        layer.b,
        output,
        layer.groups,
        highest_rank=highest_rank,
        scaling=case.scaling,
        add_inputs=case.add_inputs,
        one_pass=case.one_pass,
    )


def check(case: KernelCase, layer: Layer, output: torch.Tensor) -> None:
    """Compare an output with what is expected; rows without an adapter must be the very same."""
    wanted = expected(case, layer)
    untouched = [
        row
        for row, slot in enumerate(case.row_slots)
        if slot < 0 or layer.groups.slot_ranks.tolist()[slot] == 0
    ]
    assert torch.equal(output[untouched], layer.output[untouched]), f"a base row changed in {case}"
    tolerance = max(1e-5, 16 * torch.finfo(output.dtype).eps)
    torch.testing.assert_close(
        output.float().cpu(), wanted, rtol=tolerance, atol=tolerance, msg=lambda text: f"{case}\n{text}"
    )


def check_case(case: KernelCase, device: torch.device | str = "cpu", seed: int = 0) -> None:
    """Build, run at the batch's highest rank and at the largest grid, and compare both."""
    layer = build(case, device, seed)
    in_batch = [case.slot_ranks[slot] for slot in case.row_slots if slot >= 0]
    for highest_rank in (max(in_batch, default=0), case.max_rank):
        output = layer.output.clone()
        compute(case, layer, output, highest_rank)
        check(case, layer, output)


MANY_ROWS = cuda_launch.DECODE_ROWS + 2
CASES = {
    "one adapter": KernelCase(
        slot_ranks=(8,), row_slots=(0,), max_rank=16, in_features=64, out_features=(48,)
    ),
    "base model alone": KernelCase(
        slot_ranks=(8, 16), row_slots=(-1, -1, -1), max_rank=16, in_features=64, out_features=(48,)
    ),
    "every rank, base rows between": KernelCase(
        slot_ranks=(1, 8, 17, 64, 0, 33),
        row_slots=(0, -1, 3, 1, 1, 5, -1, 2, 4, 0),
        max_rank=64,
        in_features=96,
        out_features=(64, 32, 32),
        scaling=0.5,
    ),
    "all slots full": KernelCase(
        slot_ranks=(16, 4, 32, 8), row_slots=(3, 2, 1, 0), max_rank=32, in_features=64, out_features=(32, 32)
    ),
    "sizes that fit no block": KernelCase(
        slot_ranks=(5, 13), row_slots=(0, 1, -1), max_rank=13, in_features=37, out_features=(19, 7, 3)
    ),
    "slots of rank one": KernelCase(
        slot_ranks=(1, 0), row_slots=(0, 1, -1), max_rank=1, in_features=40, out_features=(24,)
    ),
    "prefill": KernelCase(
        slot_ranks=(8, 32),
        row_slots=(0,) * 70 + (-1,) * 10 + (1,) * (MANY_ROWS - 80),
        max_rank=32,
        in_features=192,
        out_features=(80,),
    ),
    "output written, not added": KernelCase(
        slot_ranks=(8, 3),
        row_slots=(1, -1, 0),
        max_rank=8,
        in_features=64,
        out_features=(48, 16),
        add_inputs=False,
    ),
    "split over many programs": KernelCase(
        slot_ranks=(24, 8), row_slots=(0, 1, 1), max_rank=32, in_features=2000, out_features=(32,)
    ),
    "one pass, in half precision": KernelCase(
        slot_ranks=(24, 8, 0),
        row_slots=(0, 1, 1, 2, -1),
        max_rank=32,
        in_features=600,
        out_features=(32, 16),
        dtype="float16",
        one_pass=True,
    ),
}
