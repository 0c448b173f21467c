"""What the vLLM engine is started with, and what is refused before vLLM is even imported."""

import os
import pwd
from typing import Any

import pytest

from loraserve.config import EngineSection, ModelSection
from loraserve.engines.vllm import VllmEngine
from loraserve.engines.vllm_arguments import (
    check_known,
    engine_arguments,
    engine_environment,
    environment_set,
    few_rows_library,
)
from loraserve.errors import ConfigError

MODEL = ModelSection(path="/models/base", dtype="bfloat16")


@pytest.mark.parametrize(
    ("execution", "on_cpu", "slots"),
    [("rank-true", True, 5), ("padded", True, 5), ("stock", True, 6), ("stock", False, 5)],
)
def test_only_stock_execution_on_the_cpu_needs_a_slot_that_stays_empty(
    execution: str, on_cpu: bool, slots: int
) -> None:
    engine = EngineSection(adapter_slots=5)
    arguments = engine_arguments(MODEL, engine, on_cpu=on_cpu, execution=execution)
    assert (arguments["max_loras"], arguments["max_cpu_loras"]) == (slots, slots)
    assert ("worker_extension_cls" in arguments) == (execution != "stock")


def test_an_engine_without_adapters_knows_nothing_of_them() -> None:
    arguments = engine_arguments(MODEL, EngineSection(), on_cpu=True, execution="off")
    assert not [name for name in arguments if "lora" in name and arguments[name]]


@pytest.mark.parametrize(
    ("execution", "variable"),
    [("rank-true", "rank-true"), ("padded", "padded"), ("stock", None), ("off", None)],
)
def test_vllms_processes_are_told_how_adapters_are_computed(execution: str, variable: str | None) -> None:
    environment = engine_environment(EngineSection(), 1, on_cpu=True, execution=execution)
    assert environment["LORASERVE_LORA_EXECUTION"] == variable


@pytest.mark.parametrize(("tensor_parallel_size", "backend"), [(1, "uni"), (2, "mp")])
def test_one_gpu_needs_no_worker_process(tensor_parallel_size: int, backend: str) -> None:
    engine = EngineSection(tensor_parallel_size=tensor_parallel_size)
    assert (
        engine_arguments(MODEL, engine, on_cpu=False, execution="rank-true")["distributed_executor_backend"]
        == backend
    )


def test_extra_reaches_vllm_as_it_is() -> None:
    engine = EngineSection(extra={"enable_prefix_caching": False, "enforce_eager": False})
    arguments = engine_arguments(MODEL, engine, on_cpu=True, execution="rank-true")
    assert arguments["enable_prefix_caching"] is False
    assert arguments["enforce_eager"] is False


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size: LoRAServe cannot run pipeline parallelism"),
        ({"nnodes": 2}, "nnodes: LoRAServe cannot run an engine over several nodes"),
        ({"data_parallel_size": 2}, "data_parallel_size"),
        ({"data_parallel_address": "10.0.0.1"}, "data_parallel_address"),
        ({"speculative_config": {"method": "ngram"}}, "speculative_config: .* speculative decoding"),
        ({"runner": "pooling"}, "runner"),
        ({"skip_tokenizer_init": True}, "skip_tokenizer_init"),
        ({"max_loras": 9}, r"max_loras: LoRAServe sets this itself \(engine.adapter_slots\)"),
        ({"max_lora_rank": 16}, "engine.max_lora_rank"),
        ({"enable_lora": False}, "enable_lora"),
        ({"max_cpu_loras": 100}, "max_cpu_loras"),
        ({"model": "other"}, "model.path"),
        ({"kv_cache_memory_bytes": 1}, "engine.kv_cache_bytes"),
        ({"distributed_executor_backend": "ray"}, "distributed_executor_backend"),
    ],
)
def test_what_is_owned_or_cannot_run_is_refused_by_name(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"engine\.extra\..*{message}"):
        VllmEngine(MODEL, EngineSection(extra=extra))


@pytest.mark.parametrize(
    "extra",
    [{"pipeline_parallel_size": 1}, {"speculative_config": None}, {"nnodes": 1}, {"data_parallel_size": 1}],
)
def test_a_value_that_asks_for_nothing_is_allowed(extra: dict[str, Any]) -> None:
    VllmEngine(MODEL, EngineSection(extra=extra))


@pytest.mark.parametrize("execution", ["rank-true", "padded"])
def test_what_would_kill_the_engine_at_its_first_step_is_refused(execution: str) -> None:
    engine = EngineSection(extra={"fully_sharded_loras": True})
    with pytest.raises(ConfigError, match=f"extra.fully_sharded_loras: .* {execution}; remove it"):
        engine_arguments(MODEL, engine, on_cpu=True, execution=execution)
    for on_cpu, other in ((False, execution), (True, "stock")):
        assert engine_arguments(MODEL, engine, on_cpu=on_cpu, execution=other)["fully_sharded_loras"]


def test_a_user_without_a_home_folder_gets_no_kernel_and_no_crash(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for variable in ("LORASERVE_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)

    def unknown(uid: int) -> Any:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert few_rows_library() == ""
    assert "home directory" in caplog.text


def test_an_unknown_argument_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"engine\.extra\.blocksize: .*did you mean block_size\?"):
        check_known({"blocksize": 16}, {"block_size", "seed"})
    with pytest.raises(ConfigError, match=r"no such engine argument$"):
        check_known({"zzz": 1}, {"block_size", "seed"})


def test_a_model_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"model\.path"):
        VllmEngine(ModelSection(), EngineSection())


def test_the_environment_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-3")
    environment = engine_environment(EngineSection(), os.getpid(), on_cpu=True, execution="rank-true")
    assert environment["LORASERVE_PARENT_PID"] == str(os.getpid())
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "0-3"
    assert environment["VLLM_CPU_KVCACHE_SPACE"] is None
    assert environment["VLLM_NO_USAGE_STATS"] == "1"
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND")
    environment = engine_environment(EngineSection(), os.getpid(), on_cpu=True, execution="rank-true")
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_the_environment_on_a_gpu_leaves_the_cpu_out() -> None:
    environment = engine_environment(EngineSection(), os.getpid(), on_cpu=False, execution="rank-true")
    assert not [name for name in environment if "CPU" in name or "DYNAMO" in name]
    assert environment["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"


@pytest.mark.parametrize(("before", "after"), [("other", "other,loraserve"), ("", "loraserve")])
def test_a_list_of_allowed_plugins_gains_ours(
    monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", before)
    assert (
        engine_environment(EngineSection(), 1, on_cpu=False, execution="rank-true")["VLLM_PLUGINS"] == after
    )
    monkeypatch.setenv("VLLM_PLUGINS", "loraserve")
    assert "VLLM_PLUGINS" not in engine_environment(EngineSection(), 1, on_cpu=False, execution="rank-true")


def test_the_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASERVE_TEST_A", "old")
    monkeypatch.delenv("LORASERVE_TEST_B", raising=False)
    with environment_set({"LORASERVE_TEST_A": None, "LORASERVE_TEST_B": "new"}):
        assert "LORASERVE_TEST_A" not in os.environ
        assert os.environ["LORASERVE_TEST_B"] == "new"
    assert os.environ["LORASERVE_TEST_A"] == "old"
    assert "LORASERVE_TEST_B" not in os.environ
