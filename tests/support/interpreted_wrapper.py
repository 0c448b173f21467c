"""Runs the GPU wrapper with vLLM's own metadata on the CPU: TRITON_INTERPRET=1 must be set.

Prints one JSON line per check: its name, and what was wrong with it or ''.
"""

import json
import traceback

import torch
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
from vllm.lora.punica_wrapper import punica_gpu

from tests.support.wrapper_checks import WRAPPER_CHECKS, make_wrapper


def main() -> None:
    """Run them all."""
    torch.set_num_threads(1)
    # vLLM leaves the name out where it finds no GPU.
    punica_gpu.LoRAKernelMeta = LoRAKernelMeta
    for check in WRAPPER_CHECKS:
        wrong = ""
        try:
            check(make_wrapper("cpu"), "cpu")
        except Exception:
            wrong = traceback.format_exc()
        print(json.dumps({"check": check.__name__, "wrong": wrong}), flush=True)


if __name__ == "__main__":
    main()
