"""An engine's process lives as long as its replica, no longer, and its death is noticed."""

import asyncio
import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from loraserve.config import EngineSection, ModelSection
from loraserve.engines.base import AdapterFiles
from loraserve.engines.vllm import VllmEngine
from loraserve.engines.vllm_processes import engine_children
from loraserve.errors import ConfigError, EngineDeadError
from loraserve.request import GenerationRequest, SamplingParams
from loraserve.samples import SampleSet
from placement.types import VersionId
from tests.support.vllm_bench import Bench, files_left, running_pids

pytestmark = pytest.mark.asyncio(loop_scope="session")


PARENT = Path(__file__).parent / "parent_process.py"
EndsWithin = Callable[[int, float], Awaitable[bool]]


def small_engine(model: str, **extra: object) -> VllmEngine:
    return VllmEngine(
        ModelSection(path=model, dtype="float32"),
        EngineSection(
            max_lora_rank=8,
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
        parent.kill()
        ended = await asyncio.gather(*(ends_within(pid, 5.0) for pid in pids))
        assert all(ended), f"{pids} outlived their parent"
    finally:
        with contextlib.suppress(ProcessLookupError):
            parent.kill()
        await parent.wait()


async def _reported(lines: asyncio.StreamReader) -> list[int]:
    async for line in lines:
        if line.startswith(b"PIDS "):
            return [int(pid) for pid in line.split()[1:]]
    raise AssertionError("the parent ended before it had an engine")


async def test_a_killed_engine_is_noticed_everywhere(samples: SampleSet) -> None:
    engine = small_engine(str(samples.model))
    info = await engine.start()
    assert info.pids
    adapter = AdapterFiles(
        version_id=VersionId("rank-8@0123456789abcdef"),
        directory=samples.adapters["rank-8"],
        rank=8,
        size_bytes=1,
    )
    # More than run at once, one of them resumed.
    asked = [
        GenerationRequest(
            request_id=f"request {number}",
            prompt="morning " * 30,
            sampling=SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True, stop=("never €",)),
            resumed_token_ids=(70, 71) if number == 1 else (),
        )
        for number in range(4)
    ]
    streams = [engine.generate(one) for one in asked]
    firsts = [asyncio.create_task(anext(stream)) for stream in streams]
    await asyncio.gather(*firsts[:2])
    await engine.check()
    os.kill(info.pids[0], signal.SIGKILL)
    late = asyncio.create_task(_drained(engine.generate(dataclasses.replace(asked[0], request_id="late"))))
    ends = await asyncio.wait_for(
        asyncio.gather(
            *firsts[2:], *(_drained(stream) for stream in streams[:2]), late, return_exceptions=True
        ),
        10,
    )
    assert [type(end) for end in ends] == [EngineDeadError] * 5
    with pytest.raises(EngineDeadError):
        await engine.check()
    with pytest.raises(EngineDeadError):
        await asyncio.wait_for(engine.load_adapter(adapter), 10)
    with pytest.raises(EngineDeadError):
        await anext(engine.generate(GenerationRequest(request_id="two", prompt="x")))
    assert engine.load().running + engine.load().waiting == 0
    await engine.close()
    await engine.close()
    with pytest.raises(EngineDeadError, match="closed"):
        await engine.check()


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
