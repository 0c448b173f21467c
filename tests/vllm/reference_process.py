"""Runs plain `vllm.LLM` in a process of its own and prints what it answers as JSON: the tests' reference.

One adapter at a time and never beside another; the base model in an engine that has no LoRA at all.
"""

import json
import os
import sys
from typing import Any


def main() -> None:
    """Read the work from standard input; write {adapter name, or '' for the base: [token ids per prompt]}."""
    work = json.load(sys.stdin)
    os.environ |= {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "TORCHDYNAMO_DISABLE": "1",
    }
    answers = {"": _answers(work, {})[""]} | _answers(work, work["adapters"])
    print("ANSWERS " + json.dumps(answers), flush=True)


def _answers(work: dict[str, Any], adapters: dict[str, str]) -> dict[str, list[list[int]]]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    lora = {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": 128} if adapters else {}
    engine = LLM(
        model=work["model"],
        dtype="float32",
        max_model_len=512,
        max_num_seqs=8,
        kv_cache_memory_bytes=64 * 1024**2,
        distributed_executor_backend="uni",
        enforce_eager=True,
        enable_prefix_caching=False,
        **lora,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=work["max_tokens"], ignore_eos=True)
    found = {}
    for number, (name, path) in enumerate(adapters.items() if adapters else {"": ""}.items(), start=1):
        request = LoRARequest(name, number, path) if path else None
        outputs = engine.generate(work["prompts"], sampling, lora_request=request, use_tqdm=False)
        found[name] = [list(output.outputs[0].token_ids) for output in outputs]
    del engine
    cleanup_dist_env_and_memory()
    return found


if __name__ == "__main__":
    main()
