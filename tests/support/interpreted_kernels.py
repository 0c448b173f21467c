"""Runs the rank-true kernels on the CPU through Triton's interpreter: TRITON_INTERPRET=1 must be set.

Prints one JSON line per check: its name, and what was wrong with it or ''.
"""

import json
import traceback
from collections.abc import Callable, Iterator
from functools import partial

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraserve.engines.vllm_lora import cuda_launch
from tests.support.kernel_cases import CASES, KernelCase, build, check, check_case, fill_slot


@st.composite
def kernel_cases(draw: st.DrawFn) -> KernelCase:
    """Any mix of ranks, slots and base rows over a small layer."""
    max_rank = draw(st.sampled_from([1, 8, 16, 64]))
    ranks = draw(st.lists(st.integers(0, max_rank), min_size=1, max_size=4))
    return KernelCase(
        slot_ranks=tuple(ranks),
        row_slots=tuple(draw(st.lists(st.integers(-1, len(ranks) - 1), min_size=1, max_size=8))),
        max_rank=max_rank,
        in_features=draw(st.sampled_from([16, 45, 300])),
        out_features=tuple(draw(st.lists(st.sampled_from([16, 33, 150]), min_size=1, max_size=3))),
        dtype=draw(st.sampled_from(["float32", "float16"])),
        add_inputs=draw(st.booleans()),
    )


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=kernel_cases())
def any_mix(case: KernelCase) -> None:
    """Every mix of ranks gives what plain products give."""
    check_case(case)


def split_by_rank() -> None:
    """A split by rank over two workers: each computes its rows, side by side they are the whole."""
    case = KernelCase(
        slot_ranks=(5, 12, 32, 0),
        row_slots=(0, 1, 2, 3, -1, 1),
        max_rank=32,
        in_features=64,
        out_features=(32, 16),
    )
    layer = build(case)
    halves = []
    for first in (0, 16):
        shards = [a[:, :, first : first + 16].contiguous() for a in layer.a]
        # vLLM zeroes the buffers of this path, then gathers them.
        half = torch.zeros(len(shards), len(case.row_slots), 16)
        cuda_launch.shrink(layer.inputs, shards, half, layer.groups, highest_rank=32, rank_offset=first)
        # A's rows above a rank hold NaN: a worker whose part lies above it has nothing to compute.
        assert half.isfinite().all()
        halves.append(half)
    output = layer.output.clone()
    cuda_launch.expand(torch.cat(halves, dim=-1), layer.b, output, layer.groups)
    check(case, layer, output)


def nothing_computed_above_a_rank() -> None:
    """Shrink leaves the buffer alone above each row's rank, and in rows without an adapter."""
    case = KernelCase(
        slot_ranks=(3, 40, 0), row_slots=(0, 1, 2, -1), max_rank=64, in_features=48, out_features=(32, 16)
    )
    layer = build(case)
    buffer = torch.full((2, 4, 64), 7.0)
    cuda_launch.shrink(layer.inputs, layer.a, buffer, layer.groups, highest_rank=64, one_pass=True)
    for row, readable in enumerate((8, 40, 0, 0)):
        assert (buffer[:, row, readable:] == 7.0).all()
        assert (buffer[:, row, :readable] != 7.0).all()


def replayed_with_other_ranks() -> None:
    """A launch sized for any rank follows the ranks that the slots hold when it runs."""
    case = KernelCase(
        slot_ranks=(8, 64, 0), row_slots=(0, 1, 2, -1), max_rank=64, in_features=48, out_features=(32,)
    )
    layer, generator = build(case), torch.Generator().manual_seed(1)
    for ranks in ((8, 64, 0), (64, 3, 16), (0, 0, 64)):
        for slot, rank in enumerate(ranks):
            fill_slot(layer, slot, rank, generator)
        output = layer.output.clone()
        cuda_launch.product(layer.inputs, layer.a, layer.b, output, layer.groups, highest_rank=64)
        check(case, layer, output)


def one_compilation_covers_all() -> None:
    """Compiling ahead leaves no trace, and takes layers of any number of slices."""
    layer = build(CASES["every rank, base rows between"])
    before = [weight.clone() for weight in (*layer.a, *layer.b)]
    cuda_launch.compile_for(layer.a, layer.b)
    for old, new in zip(before, (*layer.a, *layer.b), strict=True):
        assert torch.equal(old.nan_to_num(7.0), new.nan_to_num(7.0))


CHECKS = (
    any_mix,
    split_by_rank,
    nothing_computed_above_a_rank,
    replayed_with_other_ranks,
    one_compilation_covers_all,
)


def checks() -> Iterator[tuple[str, Callable[[], None]]]:
    """Every check by name."""
    for name, case in CASES.items():
        yield name, partial(check_case, case)
    for function in CHECKS:
        yield function.__name__, function


def main() -> None:
    """Run them all."""
    torch.set_num_threads(1)
    for name, function in checks():
        wrong = ""
        try:
            function()
        except Exception:
            wrong = traceback.format_exc()
        print(json.dumps({"check": name, "wrong": wrong}), flush=True)


if __name__ == "__main__":
    main()
