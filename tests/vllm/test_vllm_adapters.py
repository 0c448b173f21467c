"""Adapters come and go one version at a time, and a refused one leaves nothing behind."""

import asyncio
import contextlib
import dataclasses
import os
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from safetensors.numpy import load_file, save_file

from loraserve.adapters.segment import AdapterSegment, build_segment, map_segment
from loraserve.engines.base import AdapterFiles
from loraserve.errors import AdapterRejectedError, NotFoundError, OverloadedError, StaleError
from loraserve.request import GenerationRequest
from loraserve.samples import build_adapter
from placement.types import VersionId
from tests.support.segments import holders
from tests.support.vllm_bench import PROMPTS, Bench

pytestmark = pytest.mark.asyncio(loop_scope="session")


FREED = "rank-32"
BAD = VersionId("bad@0123456789abcdef")


@pytest_asyncio.fixture(loop_scope="session")
async def one_free(bench: Bench) -> AsyncIterator[Bench]:
    """The engine with one slot free; taken again afterwards."""
    await bench.engine.unload_adapter(bench.versions[FREED])
    yield bench
    await bench.engine.load_adapter(bench.files(FREED))


def bad(directory: Path, rank: int = 8) -> AdapterFiles:
    return AdapterFiles(version_id=BAD, directory=directory, rank=rank, size_bytes=1)


async def refused(bench: Bench, adapter: AdapterFiles, message: str) -> None:
    """Refused with this message, and the engine is as it was, its slot included."""
    before = await bench.engine.resident()
    with pytest.raises(AdapterRejectedError, match=message):
        await bench.engine.load_adapter(adapter)
    assert await bench.engine.resident() == before
    with pytest.raises(NotFoundError):
        await bench.answer(GenerationRequest(request_id="named", prompt="x", version_id=BAD))
    # The slot that the refused one was meant for still takes an adapter.
    await bench.engine.load_adapter(bench.files(FREED))
    assert (await bench.ask(adapter=FREED)).token_ids
    await bench.engine.unload_adapter(bench.versions[FREED])


async def test_a_folder_without_weights(one_free: Bench, tmp_path: Path) -> None:
    shutil.copy(one_free.samples.adapters["rank-8"] / "adapter_config.json", tmp_path)
    await refused(one_free, bad(tmp_path), "bad@0123456789abcdef: adapter_model.safetensors is missing")


async def test_truncated_weights(one_free: Bench, tmp_path: Path) -> None:
    copy = shutil.copytree(one_free.samples.adapters["rank-8"], tmp_path / "copy")
    weights = copy / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    await refused(one_free, bad(copy), "truncated: its tensors need")


async def test_a_tensor_too_large_for_its_module(one_free: Bench, tmp_path: Path) -> None:
    """The engine finds it out, for it alone knows the model's layers."""
    copy = shutil.copytree(one_free.samples.adapters["rank-8"], tmp_path / "copy")
    tensors = load_file(copy / "adapter_model.safetensors")
    name = max(name for name in tensors if name.endswith("lora_A.weight"))
    rank, width = tensors[name].shape
    save_file(tensors | {name: np.ones((rank, width + 1), np.float32)}, copy / "adapter_model.safetensors")
    await refused(one_free, bad(copy), r"module model.layers.1.self_attn.*: it changes a \(.*\) matrix")


async def test_memory_that_is_not_what_was_announced_never_reaches_a_slot(bench: Bench) -> None:
    """Asked of the engine's worker itself: it believes nobody."""
    client, number = bench.engine._running().client, 1_000_000
    name = f"mapped-{os.getpid()}@0"
    segment = build_segment(bench.samples.adapters["rank-8"], name=name, digest=None, max_lora_rank=8)
    ref = segment.ref

    async def worker(method: str, *arguments: object) -> Any:
        (answer,) = await client.collective_rpc(f"loraserve_{method}", args=(number, *arguments))
        return answer

    async def refusal(*announced: object) -> str:
        await worker("open", *announced, False)
        answer = ("preparing", "")
        async with asyncio.timeout(10.0):
            while answer[0] == "preparing":
                answer = await worker("advance", True, False)
        assert answer[0] == "failed"
        return str(answer[1])

    assert "it has" in await refusal(ref.pid, ref.fd, ref.size_bytes + 1, ref.head_sha256)
    assert "has no segment" in await refusal(ref.pid, 99_999, ref.size_bytes, ref.head_sha256)
    assert "its head hashes to" in await refusal(ref.pid, ref.fd, ref.size_bytes, "0" * 64)
    (report,) = await client.collective_rpc("loraserve_report")
    assert number not in report["pool"]
    await worker("close")
    assert (await worker("advance", True, False))[0] == "failed"
    assert holders(name) == {os.getpid()}
    segment.close()
    assert not holders(name)


async def test_segments_that_are_given_answer_as_folders_do(
    bench: Bench, references: Mapping[str, Sequence[list[int]]]
) -> None:
    """Ranks mixed in one batch, more of them than slots, and nothing of a folder is read."""
    names = ("rank-8", "rank-16", "rank-64", "rank-128")
    given: dict[str, AdapterSegment] = {}
    usual = {name: bench.versions[name] for name in names}
    for name in names:
        await bench.engine.unload_adapter(usual[name])
        bench.versions[name] = version = VersionId(f"{name}@{os.getpid():016x}")
        given[name] = build_segment(
            bench.samples.adapters[name], name=version, digest=None, max_lora_rank=128
        )
        files = dataclasses.replace(bench.files(name), directory=Path("none"), segment=given[name])
        await bench.engine.load_adapter(files)
    asked = [(prompt, name) for prompt in range(len(PROMPTS)) for name in (*names, "", *names)]
    answers = await asyncio.gather(*(bench.ask(PROMPTS[prompt], name or None) for prompt, name in asked))
    for (prompt, name), answer in zip(asked, answers, strict=True):
        assert answer.token_ids == references[name][prompt]
    for name, segment in given.items():
        assert len(holders(bench.versions[name])) == 2
        await bench.engine.unload_adapter(bench.versions[name])
        # The worker has let go of it, and the engine has not closed it.
        assert holders(bench.versions[name]) == {os.getpid()}
        map_segment(segment.ref).verify()
        segment.close()
        bench.versions[name] = usual[name]
        await bench.engine.load_adapter(bench.files(name))


async def test_a_folder_that_is_not_there(one_free: Bench, tmp_path: Path) -> None:
    await refused(one_free, bad(tmp_path / "none"), "no folder")


async def test_a_rank_above_the_engines(one_free: Bench, tmp_path: Path) -> None:
    large = build_adapter(tmp_path / "large", one_free.samples.model, rank=256, seed=0)
    await refused(one_free, bad(large, rank=256), "rank 256 is above engine.max_lora_rank 128")
    # What the files say counts, also for a caller that believes otherwise.
    await refused(one_free, bad(large, rank=8), "rank 256")


async def test_no_more_adapters_than_the_pool_takes(bench: Bench) -> None:
    sixth = bench.files("rank-8", version="sixth@0123456789abcdef")
    with pytest.raises(OverloadedError, match="the pool holds 5 already"):
        await bench.engine.load_adapter(sixth)
    await bench.engine.unload_adapter(bench.versions[FREED])
    await bench.engine.load_adapter(sixth)
    assert sixth.version_id in await bench.engine.resident()
    await bench.engine.unload_adapter(sixth.version_id)
    await bench.engine.load_adapter(bench.files(FREED))


async def test_loading_and_unloading_twice_changes_nothing(bench: Bench) -> None:
    await bench.engine.load_adapter(bench.files(FREED))
    await bench.engine.unload_adapter(VersionId("unknown@0123456789abcdef"))


async def test_a_version_in_use_stays(bench: Bench) -> None:
    stream = bench.engine.generate(bench.request(adapter=FREED, max_tokens=400))
    async with contextlib.aclosing(stream):
        await anext(stream)
        with pytest.raises(StaleError, match="1 requests still use it"):
            await bench.engine.unload_adapter(bench.versions[FREED])
    await bench.engine.unload_adapter(bench.versions[FREED])
    with pytest.raises(NotFoundError, match="not loaded"):
        await bench.ask(adapter=FREED)
    await bench.engine.load_adapter(bench.files(FREED))


async def test_two_versions_of_one_name_answer_each_for_itself_in_one_batch(
    bench: Bench, references: Mapping[str, Sequence[list[int]]]
) -> None:
    """Neither the batch nor the prefix cache takes one for the other, nor for the base model."""
    gone = ("rank-32", "rank-64")
    weights = {"1111111111111111": "rank-8", "2222222222222222": "rank-128"}
    for name in gone:
        await bench.engine.unload_adapter(bench.versions[name])
    for digest, name in weights.items():
        bench.versions[digest] = VersionId(f"same@{digest}")
        await bench.engine.load_adapter(bench.files(name, version=bench.versions[digest]))
    asked = [(prompt, digest) for prompt in range(len(PROMPTS)) for digest in (*weights, "", *weights)]
    answers = await asyncio.gather(*(bench.ask(PROMPTS[prompt], digest or None) for prompt, digest in asked))
    for (prompt, digest), answer in zip(asked, answers, strict=True):
        assert answer.token_ids == references[weights.get(digest, "")][prompt]
    for digest in weights:
        await bench.engine.unload_adapter(bench.versions.pop(digest))
    for name in gone:
        await bench.engine.load_adapter(bench.files(name))


async def test_a_name_answers_with_the_weights_of_its_new_version(
    bench: Bench, references: Mapping[str, Sequence[list[int]]]
) -> None:
    assert [(await bench.ask(one, "rank-8")).token_ids for one in PROMPTS] == references["rank-8"]
    old = bench.versions["rank-8"]
    for digest, weights in (("1111111111111111", "rank-16"), ("2222222222222222", "rank-8")):
        await bench.engine.unload_adapter(bench.versions["rank-8"])
        bench.versions["rank-8"] = VersionId(f"rank-8@{digest}")
        await bench.engine.load_adapter(bench.files(weights, version=bench.versions["rank-8"]))
        assert [(await bench.ask(one, "rank-8")).token_ids for one in PROMPTS] == references[weights]
    await bench.engine.unload_adapter(bench.versions["rank-8"])
    bench.versions["rank-8"] = old
    await bench.engine.load_adapter(bench.files("rank-8"))
