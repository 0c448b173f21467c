"""Compiles the rank-true kernels for NVIDIA GPUs on a machine without one, to see what they become.

Prints one JSON line per kernel: its name, compute capability, type, set of tiles, and PTX.
"""

import json
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loraserve.engines.vllm_lora import cuda_launch
from loraserve.engines.vllm_lora.cuda_kernels import expand_kernel, shrink_kernel

MAX_RANK, FEATURES = 128, 4096
TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16}
# What Triton finds divisible by 16 in a launch over such a layer: all but these.
UNALIGNED = {"scaling", "num_rank_blocks", "rank_offset"}


def ptx_of(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int) -> str:
    """The kernel for a compute capability, with arguments of the given types, or integers."""
    signature = {
        param.name: "constexpr" if param.name in constants else types.get(param.name, "i32")
        for param in kernel.params
    }
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(signature.items())
        if kind != "constexpr" and name not in UNALIGNED
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": 4, "num_stages": 2})
    assert compiled.asm["cubin"]
    return str(compiled.asm["ptx"])


def main() -> None:
    """Compile every combination."""
    metadata = dict.fromkeys(
        ("slot_ranks", "sorted_rows", "group_rows", "group_first", "group_slots"), "*i32"
    )
    shared = {**metadata, "table": "*i64", "buffer": "*fp32", "scaling": "fp32"}
    for capability, dtype, rows in ((80, "bf16", 1), (80, "fp16", 512), (90, "bf16", 1), (90, "bf16", 512)):
        weights = {"weight_type": TYPES[dtype], "step": 8}
        tiles = cuda_launch.shrink_tiles(rows, FEATURES, one_pass=False)
        blocks = {"block_m": tiles.block_m, "block_n": tiles.block_n, "block_k": tiles.block_k}
        ptx = ptx_of(
            shrink_kernel,
            {**shared, "inputs": f"*{dtype}"},
            {**weights, **blocks, "even_k": True, "split_k": tiles.split_k},
            capability,
        )
        print(json.dumps({"kernel": "shrink", "on": f"{capability} {dtype} {rows}", "ptx": ptx}))
        tiles = cuda_launch.expand_tiles(rows, MAX_RANK)
        blocks = {"block_m": tiles.block_m, "block_n": tiles.block_n, "block_k": tiles.block_k}
        ptx = ptx_of(
            expand_kernel,
            {**shared, "output": f"*{dtype}"},
            {**weights, **blocks, "out_step": 16, "add_inputs": True},
            capability,
        )
        print(json.dumps({"kernel": "expand", "on": f"{capability} {dtype} {rows}", "ptx": ptx}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
