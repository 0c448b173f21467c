"""An engine's process lives as long as its replica, no longer, and its death is noticed."""

import asyncio
import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import pytest

from loraserve.config import EngineSection, LoraExecution, ModelSection
from loraserve.engines import vllm_arguments
from loraserve.engines.base import SlotMemory
from loraserve.engines.vllm import VllmEngine
from loraserve.engines.vllm_processes import engine_children
from loraserve.errors import ConfigError, EngineDeadError, OverloadedError
from loraserve.samples import SampleSet
from placement.types import VersionId
from tests.support.segments import holders, own_segments
from tests.support.vllm_bench import PROMPTS, Bench, files_left, running_pids

pytestmark = pytest.mark.asyncio(loop_scope="session")


PARENT = Path(__file__).parent / "parent_process.py"
EndsWithin = Callable[[int, float], Awaitable[bool]]


def small_engine(model: str, execution: LoraExecution = "rank-true", **extra: object) -> VllmEngine:
    """Two sequences, of one adapter at a time."""
    return VllmEngine(
        ModelSection(path=model, dtype="float32"),
        EngineSection(
            lora_execution=execution,
            max_lora_rank=16,
            adapter_slots=1,
            max_num_seqs=2,
            max_model_len_tokens=256,
            kv_cache_bytes=32 * 1024**2,
            extra=extra,
        ),
    )


@pytest.mark.parametrize("when", ["starting", "running"])
async def test_the_engine_ends_with_its_killed_parent(
    samples: SampleSet,
    ends_within: EndsWithin,
    when: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    # A socket's path may have 107 characters, which leaves no room for the test's name.
    temporary = tmp_path_factory.mktemp("t")
    parent = await asyncio.create_subprocess_exec(
        sys.executable,
        str(PARENT),
        str(samples.model),
        when,
        str(samples.adapters["rank-8"]),
        # Its sockets stay when it is killed: let them go with the test.
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        assert parent.stdout is not None
        pids = await asyncio.wait_for(_reported(parent.stdout), 120)
        assert pids
        assert running_pids(pids) == pids
        assert holders(f"killed-{parent.pid}@0") == ({parent.pid, *pids} if when == "running" else set())
        parent.kill()
        ended = await asyncio.gather(*(ends_within(pid, 5.0) for pid in pids))
        assert all(ended), f"{pids} outlived their parent"
        await parent.wait()
        assert not holders(f"killed-{parent.pid}@0"), "the adapter's memory outlived its processes"
    finally:
        with contextlib.suppress(ProcessLookupError):
            parent.kill()
        await parent.wait()


async def _reported(lines: asyncio.StreamReader) -> list[int]:
    async for line in lines:
        if line.startswith(b"PIDS "):
            return [int(pid) for pid in line.split()[1:]]
    raise AssertionError("the parent ended before it had an engine")


async def small_bench(samples: SampleSet) -> Bench:
    """A small engine that pads its adapters: rank-16, and rank-8 by the name of `second`."""
    engine = small_engine(str(samples.model), "padded")
    bench = Bench(engine, samples, 0.0)
    bench.versions["second"] = VersionId(f"second-{os.getpid()}@0")
    await engine.start()
    await engine.load_adapter(bench.files("rank-16"))
    await engine.load_adapter(bench.files("rank-8", version=bench.versions["second"]))
    return bench


async def check_padded(bench: Bench, references: Mapping[str, Sequence[list[int]]]) -> None:
    """Padding costs memory and changes no token."""
    for asked, weights in (("", ""), ("second", "rank-8"), ("rank-16", "rank-16")):
        answers = await asyncio.gather(*(bench.ask(prompt, asked or None) for prompt in PROMPTS))
        assert [answer.token_ids for answer in answers] == references[weights]
    memory = bench.engine.slot_memory()
    assert memory.used_bytes == memory.padded_bytes > 0


async def check_dead(bench: Bench) -> None:
    """Nothing is taken any more, and nothing is waited for."""
    engine = bench.engine
    with pytest.raises(EngineDeadError):
        await engine.check()
    with pytest.raises(EngineDeadError):
        await asyncio.wait_for(engine.load_adapter(bench.files("rank-8")), 10)
    with pytest.raises(EngineDeadError):
        await asyncio.wait_for(engine.unload_adapter(bench.versions["second"]), 10)
    for adapter in (None, "rank-16"):
        with pytest.raises(EngineDeadError):
            await anext(engine.generate(bench.request(adapter=adapter)))
    assert engine.load().running + engine.load().waiting == 0


async def test_a_killed_engine_is_noticed_everywhere(
    samples: SampleSet, references: Mapping[str, Sequence[list[int]]]
) -> None:
    segments = own_segments()
    bench = await small_bench(samples)
    engine, pids = bench.engine, bench.engine._running().info.pids
    await check_padded(bench, references)
    assert holders(bench.versions["second"]) == {os.getpid(), *pids}
    # More than run at once. One is resumed, one waits for the slot of another one's adapter.
    asked = [
        dataclasses.replace(
            bench.request("morning " * 30, adapter, max_tokens=200, stop=("never €",)),
            resumed_token_ids=(70, 71) if number == 1 else (),
        )
        for number, adapter in enumerate(("rank-16", None, None, None, "second"))
    ]
    streams = [engine.generate(one) for one in asked]
    firsts = [asyncio.create_task(anext(stream)) for stream in streams]
    await asyncio.gather(*firsts[:2])
    await engine.check()
    assert bench.slots.waiting == {bench.versions["second"]: 1}
    os.kill(pids[0], signal.SIGKILL)
    late = asyncio.create_task(_drained(engine.generate(bench.request())))
    ended = [*firsts[2:], *(_drained(stream) for stream in streams[:2]), late]
    ends = await asyncio.wait_for(asyncio.gather(*ended, return_exceptions=True), 10)
    assert [type(end) for end in ends] == [EngineDeadError] * 6
    await check_dead(bench)
    await engine.close()
    await engine.close()
    assert not holders(bench.versions["second"])
    assert own_segments() == segments
    with pytest.raises(EngineDeadError, match="closed"):
        await engine.check()


@pytest.mark.slow
async def test_an_untested_vllm_serves_adapters_as_it_does_itself(
    samples: SampleSet,
    references: Mapping[str, Sequence[list[int]]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(vllm_arguments, "vllm_version", lambda: "0.0.1")
    engine = small_engine(str(samples.model))
    try:
        info = await engine.start()
        assert [line for line in caplog.messages if "vLLM 0.0.1: rank-true LoRA execution was tested" in line]
        assert (info.adapter_slots, info.pool_adapters) == (1, 1)
        bench = Bench(engine, samples, 0.0)
        for name in ("rank-8", "rank-16"):
            await engine.load_adapter(bench.files(name))
            assert await engine.resident() == {bench.versions[name]}
            answers = await asyncio.gather(
                *(bench.ask(prompt, one) for prompt in PROMPTS for one in (name, None))
            )
            found = [answer.token_ids for answer in answers]
            assert found[::2] == references[name]
            assert found[1::2] == references[""]
            with pytest.raises(OverloadedError, match="all 1 adapter slots are in use"):
                await engine.load_adapter(bench.files("rank-8", version="second@0"))
            await engine.unload_adapter(bench.versions[name])
        assert engine.slot_memory() == SlotMemory()
    finally:
        await engine.close()


async def _drained(stream: AsyncIterator[object]) -> None:
    async for _ in stream:
        pass


async def test_a_cancelled_start_leaves_no_process(samples: SampleSet, ends_within: EndsWithin) -> None:
    before = engine_children()
    engine = small_engine(str(samples.model))
    start = asyncio.create_task(engine.start())
    while not (children := engine_children() - before):
        assert not start.done()
        await asyncio.wait({start}, timeout=0.01)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert not files_left(engine)
    assert all(await asyncio.gather(*(ends_within(pid, 5.0) for pid in children)))
    assert engine_children() == before


async def test_a_start_that_fails_says_why(tmp_path: Path, samples: SampleSet) -> None:
    with pytest.raises(ConfigError, match="model"):
        await small_engine(str(tmp_path)).start()
    with pytest.raises(
        ConfigError, match=r"engine\.extra\.enable_prefix_cachin: .*did you mean enable_prefix"
    ):
        await small_engine(str(samples.model), enable_prefix_cachin=True).start()


async def test_an_engine_before_its_start_takes_nothing(samples: SampleSet) -> None:
    engine = small_engine(str(samples.model))
    with pytest.raises(EngineDeadError, match="not started"):
        await engine.check()
    await engine.close()


async def test_what_a_started_engine_says_of_itself(bench: Bench) -> None:
    import json

    config = json.loads((bench.samples.model / "config.json").read_text())
    info = bench.engine._running().info
    assert (info.kind, info.max_lora_rank, info.adapter_slots) == ("vllm", 128, 3)
    assert (info.max_model_len_tokens, info.vocab_size) == (512, config["vocab_size"])
    assert running_pids(info.pids) == list(info.pids)
    assert info.pids
