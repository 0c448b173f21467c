"""vLLM's engine arguments and environment, from LoRAServe's configuration."""

import difflib
import logging
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from loraserve.config import EngineSection, LoraExecution, ModelSection
from loraserve.engines.vllm_guard import PARENT_PID, PARENT_START, process_start
from loraserve.engines.vllm_lora import few_rows
from loraserve.engines.vllm_lora.install import EXECUTION
from loraserve.engines.vllm_lora.support import untested, vllm_version
from loraserve.errors import ConfigError
from loraserve.folders import cache_dir

logger = logging.getLogger(__name__)

_PLUGIN = "loraserve"
_EXTENSION = "loraserve.engines.vllm_lora.worker.WorkerExtension"

# vLLM's name: where the value comes from instead.
_OWNED = {
    "model": "model.path",
    "dtype": "model.dtype",
    "enable_lora": "engine.lora_execution",
    "max_loras": "engine.adapter_slots",
    "max_cpu_loras": "engine.adapter_slots",
    "max_lora_rank": "engine.max_lora_rank",
    "max_num_seqs": "engine.max_num_seqs",
    "max_model_len": "engine.max_model_len_tokens",
    "max_num_batched_tokens": "engine.max_num_batched_tokens",
    "kv_cache_memory_bytes": "engine.kv_cache_bytes",
    "tensor_parallel_size": "engine.tensor_parallel_size",
    "distributed_executor_backend": "chosen by LoRAServe",
    "disable_log_stats": "chosen by LoRAServe",
    "worker_extension_cls": "chosen by LoRAServe",
}
# vLLM's name: the one value that is no request for what LoRAServe cannot run, and what that is.
_REFUSED: dict[str, tuple[object, str]] = {
    "pipeline_parallel_size": (1, "pipeline parallelism"),
    "nnodes": (1, "an engine over several nodes"),
    "node_rank": (0, "an engine over several nodes"),
    "data_parallel_size": (1, "data parallelism inside an engine; use more replicas"),
    "speculative_config": (None, "speculative decoding"),
    "spec_method": (None, "speculative decoding"),
    "spec_model": (None, "speculative decoding"),
    "spec_tokens": (None, "speculative decoding"),
    "runner": ("generate", "a model that does not generate"),
    "convert": ("none", "a model that does not generate"),
    "skip_tokenizer_init": (False, "an engine without a tokenizer"),
    "enable_elastic_ep": (False, "an engine that changes its size"),
}


def check_extra(extra: Mapping[str, Any]) -> None:
    """ConfigError, naming the key, for what LoRAServe owns or cannot run."""
    for key, value in extra.items():
        if key in _OWNED:
            raise ConfigError(f"engine.extra.{key}: LoRAServe sets this itself ({_OWNED[key]}); remove it")
        allowed, what = _REFUSED.get(key, (value, ""))
        if value != allowed:
            raise ConfigError(f"engine.extra.{key}: LoRAServe cannot run {what}; remove it")
        if key not in _REFUSED and key.startswith("data_parallel_"):
            raise ConfigError(f"engine.extra.{key}: LoRAServe cannot run data parallelism inside an engine")


def check_known(extra: Mapping[str, Any], known: Collection[str]) -> None:
    """ConfigError for a key that this vLLM does not have."""
    for key in extra:
        if key not in known or key.startswith("_"):
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"engine.extra.{key}: this vLLM has no such engine argument{hint}")


def lora_execution(engine: EngineSection) -> LoraExecution:
    """The configured execution, or vLLM's own where ours was not tested; then the log says so."""
    if engine.lora_execution in ("stock", "off"):
        return engine.lora_execution
    reason = untested(vllm_version())
    if reason:
        logger.warning("%s", reason)
        return "stock"
    return engine.lora_execution


def few_rows_library() -> str:
    """The compiled kernel for a few rows per adapter, built upon first use; '' without a compiler."""
    try:
        return str(few_rows.build(cache_dir() / "kernels"))
    except (few_rows.BuildError, RuntimeError) as error:  # RuntimeError: a user without a home folder
        logger.warning("LoRA for a few rows runs without its compiled kernel, slower: %s", error)
        return ""


def engine_arguments(
    model: ModelSection, engine: EngineSection, *, on_cpu: bool, execution: str
) -> dict[str, Any]:
    """The keyword arguments of vLLM's AsyncEngineArgs, given the LoRA execution that it really gets."""
    arguments: dict[str, Any] = {
        "model": model.path,
        "dtype": model.dtype,
        "max_num_seqs": engine.max_num_seqs,
        "max_model_len": engine.max_model_len_tokens,
        "max_num_batched_tokens": engine.max_num_batched_tokens,
        "kv_cache_memory_bytes": engine.kv_cache_bytes,
        "tensor_parallel_size": engine.tensor_parallel_size,
        "distributed_executor_backend": "uni" if engine.tensor_parallel_size == 1 else "mp",
        "disable_log_stats": True,
    }
    if on_cpu:
        arguments["enforce_eager"] = True
    return arguments | _lora_arguments(engine, on_cpu=on_cpu, execution=execution) | engine.extra


def _lora_arguments(engine: EngineSection, *, on_cpu: bool, execution: str) -> dict[str, Any]:
    """With vLLM's own execution on the CPU there is one slot more than adapters are ever loaded.

    vLLM fills the first free slot, so the last one stays zero; a base-model row of a mixed batch reads
    exactly that slot (index -1) and would otherwise get another request's adapter.
    """
    if execution == "off":
        return {"enable_lora": False}
    if on_cpu and execution != "stock" and engine.extra.get("fully_sharded_loras"):
        raise ConfigError(
            "engine.extra.fully_sharded_loras: on the CPU only with engine.lora_execution stock, "
            f"not {execution}; remove it"
        )
    slots = engine.adapter_slots + (1 if execution == "stock" and on_cpu else 0)
    arguments: dict[str, Any] = {
        "enable_lora": True,
        "max_loras": slots,
        # Enough: an adapter is in a slot before a request names it, and what holds it is our pool.
        "max_cpu_loras": slots,
        "max_lora_rank": engine.max_lora_rank,
    }
    if execution != "stock":
        arguments["worker_extension_cls"] = _EXTENSION
    return arguments


def engine_environment(
    engine: EngineSection, parent_pid: int, *, on_cpu: bool, execution: str, library: str = ""
) -> dict[str, str | None]:
    """The variables that vLLM's processes start with; None removes one.

    `library` is the path of the compiled kernel, '' if there is none.
    """
    environment: dict[str, str | None] = {
        PARENT_PID: str(parent_pid),
        PARENT_START: process_start(parent_pid),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # A replica runs gRPC's threads, which do not survive a fork.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        few_rows.LIBRARY: library or None,
        EXECUTION: execution if execution in ("rank-true", "padded") else None,
    }
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and _PLUGIN not in plugins.split(","):
        environment["VLLM_PLUGINS"] = ",".join(filter(None, (plugins, _PLUGIN)))
    if on_cpu:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        # vLLM compiles no model with LoRA on the CPU, but two sampling helpers, upon first use: that
        # needs a compiler and stops all requests for many seconds, for a gain that is not measurable.
        environment["TORCHDYNAMO_DISABLE"] = os.environ.get("TORCHDYNAMO_DISABLE", "1")
        # It would override engine.kv_cache_bytes, and '' stops vLLM.
        environment["VLLM_CPU_KVCACHE_SPACE"] = None
        if engine.tensor_parallel_size == 1:
            # Else vLLM on the CPU turns the "uni" executor into a worker process of its own.
            environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return environment


@contextmanager
def environment_set(changes: Mapping[str, str | None]) -> Iterator[None]:
    """Hold the variables at these values, for the processes started meanwhile."""
    before = {name: os.environ.get(name) for name in changes}
    _apply(changes)
    try:
        yield
    finally:
        _apply(before)


def _apply(changes: Mapping[str, str | None]) -> None:
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
