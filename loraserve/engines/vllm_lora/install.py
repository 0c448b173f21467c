"""Puts rank-true LoRA into a vLLM process: vLLM loads `install` as a general plugin in each of its processes.

Imports nothing heavy unless this process was started by a LoRAServe engine that asks for it.
"""

import os

from loraserve.engines.vllm_guard import PARENT_PID, watch_parent

EXECUTION = "LORASERVE_LORA_EXECUTION"
"""The variable that names the execution: rank-true or padded; absent: vLLM's own."""


def install() -> None:
    """Watch the parent, and let vLLM's workers make our LoRA manager if the variable asks for it.

    vLLM builds its manager by a name in one module, long before anything can be sent to a worker, and it
    captures CUDA graphs over it right after. So the name is replaced here, before any worker exists.
    """
    watch_parent()
    parent = os.environ.get(PARENT_PID, "")
    if not os.environ.get(EXECUTION) or not parent or parent == str(os.getpid()):
        return
    from vllm.v1.worker import lora_model_runner_mixin

    from loraserve.engines.vllm_lora.manager import PooledWorkerManager

    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = PooledWorkerManager
