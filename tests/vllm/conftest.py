"""One real vLLM engine for all tests of this folder, and what plain vLLM answers to the same prompts."""

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import pytest
import pytest_asyncio

from loraserve.config import EngineSection, ModelSection
from loraserve.engines.base import EngineLoad
from loraserve.engines.vllm import VllmEngine
from loraserve.samples import SampleSet, build_samples
from tests.support.vllm_bench import MAX_TOKENS, PROMPTS, Bench, files_left, running_pids

HERE = Path(__file__).parent
# Raised inside vLLM, torch and what they bring along; none is ours to mend.
FOREIGN_WARNINGS = (
    "ignore::DeprecationWarning",
    "ignore::PendingDeprecationWarning",
    "ignore::FutureWarning",
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore:.*(torch|CUDA|NUMA|pin_memory).*:UserWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark this folder's tests; without vLLM they are skipped, which is said once per test."""
    missing = importlib.util.find_spec("vllm") is None or importlib.util.find_spec("torch") is None
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.vllm)
        for rule in FOREIGN_WARNINGS:
            item.add_marker(pytest.mark.filterwarnings(rule))
        if missing:
            item.add_marker(
                pytest.mark.skip(reason="vllm is not installed here: ./scripts/setup installs it")
            )


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> SampleSet:
    """The sample checkpoint and its five adapters."""
    return build_samples(tmp_path_factory.mktemp("samples") / "set")


@pytest.fixture(scope="session")
def references(
    samples: SampleSet, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Sequence[list[int]]]:
    """Token ids per prompt from vLLM alone, by adapter name; '' is the base model."""
    work = {
        "model": str(samples.model),
        "adapters": {name: str(path) for name, path in samples.adapters.items()},
        "prompts": PROMPTS,
        "max_tokens": MAX_TOKENS,
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "reference_process.py")],
        input=json.dumps(work),
        # vLLM leaves a file there.
        env={**os.environ, "TMPDIR": str(tmp_path_factory.mktemp("t"))},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert lines, f"plain vLLM failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    answers: dict[str, list[list[int]]] = json.loads(lines[0].removeprefix("ANSWERS "))
    return answers


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def session_bench(samples: SampleSet) -> AsyncIterator[Bench]:
    """The one engine: five adapters, of which three have a slot at a time."""
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    engine = VllmEngine(
        ModelSection(path=str(samples.model), dtype="float32"),
        EngineSection(
            max_lora_rank=128,
            adapter_slots=3,
            pool_adapters=5,
            max_num_seqs=32,
            max_model_len_tokens=512,
            max_num_batched_tokens=512,
            kv_cache_bytes=64 * 1024**2,
        ),
    )
    info = await engine.start()
    bench = Bench(engine, samples, loop.time() - began_s)
    try:
        for name in samples.adapters:
            await engine.load_adapter(bench.files(name))
        yield bench
    finally:
        await engine.close()
        await engine.close()
        assert not running_pids(info.pids), "the engine left processes"
        assert not files_left(engine), "the engine left its files"


@pytest_asyncio.fixture(loop_scope="session")
async def bench(session_bench: Bench) -> AsyncIterator[Bench]:
    """The engine; each test must leave it idle, alive, and with exactly the five adapters."""
    yield session_bench
    engine = session_bench.engine
    assert engine.load() == EngineLoad(running=0, waiting=0, kv_cache_usage=0.0)
    assert await engine.resident() == frozenset(session_bench.versions.values())
    await engine.check()


@pytest.fixture
def ends_within() -> Callable[[int, float], Awaitable[bool]]:
    """Whether a process ends within so many seconds."""

    async def waits(pid: int, timeout_s: float) -> bool:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            return True
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(handle, ended.set)
        try:
            await asyncio.wait_for(ended.wait(), timeout_s)
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(handle)
            os.close(handle)
        return True

    return waits
