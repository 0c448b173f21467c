"""Adapters that another process gave, in a real engine: the tokens are those of adapters from disk."""

import asyncio
import gc
import hashlib
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from loraserve.adapters.segment import build_segment
from loraserve.engines.base import AdapterFiles
from loraserve.fabric.fabric import Fabric
from loraserve.fabric.wanted import Wanted
from loraserve.replica.loading import Copies
from loraserve.replica.pool import AdapterPool
from loraserve.transport.registry import open_transports
from placement.types import ReplicaId, VersionId
from tests.support.fabric_process import other_process
from tests.support.segments import holders, own_segments
from tests.support.vllm_bench import PROMPTS, Bench

pytestmark = pytest.mark.asyncio(loop_scope="session")

MAX_LORA_RANK = 128
PLENTY = 2**30


def wanted_of(bench: Bench, name: str, version: str) -> Wanted:
    """A sample adapter under a version of its own, as the control plane knows it."""
    folder = bench.samples.adapters[name]
    segment = build_segment(folder, name=version, digest=None, max_lora_rank=MAX_LORA_RANK)
    try:
        return Wanted(
            version_id=VersionId(version),
            digest=segment.decoded.digest,
            rank=segment.rank,
            size_bytes=segment.size_bytes,
            head_sha256=hashlib.sha256(segment.head).hexdigest(),
            directory=folder,
        )
    finally:
        segment.close()


def files_of(wanted: Wanted) -> AdapterFiles:
    """What a replica is told of it; there is no folder that could be read instead."""
    return AdapterFiles(
        version_id=wanted.version_id,
        directory=Path("none"),
        rank=wanted.rank,
        size_bytes=wanted.size_bytes,
        digest=wanted.digest,
        head_sha256=wanted.head_sha256,
    )


@asynccontextmanager
async def empty(bench: Bench) -> AsyncIterator[None]:
    """The engine without adapters; with its usual ones again afterwards."""
    usual = dict(bench.versions)
    for version in usual.values():
        await bench.engine.unload_adapter(version)
    try:
        yield
    finally:
        bench.versions = usual
        for version in await bench.engine.resident():
            await bench.engine.unload_adapter(version)
        for name in usual:
            await bench.engine.load_adapter(bench.files(name))


async def check_answers(bench: Bench, references: Mapping[str, Sequence[list[int]]]) -> None:
    """All ranks and the base model mixed in one batch."""
    asked = [(prompt, name) for prompt in range(len(PROMPTS)) for name in ("", *bench.versions)]
    answers = await asyncio.gather(*(bench.ask(PROMPTS[prompt], name or None) for prompt, name in asked))
    for (prompt, name), answer in zip(asked, answers, strict=True):
        assert answer.token_ids == references[name][prompt], f"{name} with prompt {prompt}"


@pytest.mark.parametrize("scheme", ["tcp", "ucx"])
async def test_adapters_that_a_peer_gave_answer_as_those_from_disk_also_after_eviction_and_fetch(
    bench: Bench, references: Mapping[str, Sequence[list[int]]], scheme: str
) -> None:
    if scheme == "ucx":
        pytest.importorskip("ucxx", reason="ucxx is not installed here")
    # The same weights twice, so that the one half has to go when the other comes; under versions that no
    # other test gives other weights to.
    one, other = (
        {name: wanted_of(bench, name, f"{name}@{digit * 16}") for name in bench.versions} for digit in "ef"
    )
    room_bytes = sum(wanted.size_bytes for wanted in one.values()) + min(
        wanted.size_bytes // 2 for wanted in one.values()
    )
    before = own_segments()
    opened = open_transports([scheme], host="127.0.0.1")
    fabric = Fabric(opened.transports, capacity_bytes=room_bytes)
    copies = copies_of(bench, fabric)
    try:
        with other_process(*one.values(), *other.values(), scheme=scheme) as giver:
            async with empty(bench):
                for turn in (one, other, one):
                    loads = (copies.load(files_of(wanted), (giver.peer,)) for wanted in turn.values())
                    for fetched in await asyncio.gather(*loads):
                        assert fetched is not None
                        assert (fetched.source, fetched.peer) == (scheme, giver.peer.replica_id)
                    bench.versions = {name: wanted.version_id for name, wanted in turn.items()}
                    await check_answers(bench, references)
                    for version in bench.versions.values():
                        assert len(holders(version)) == 3, "the giver, the engine's worker, and we"
                        await copies.unload(version)
                        assert holders(version) == {giver.process.pid, os.getpid()}, "kept for the next"
        counts = fabric.counts()
        assert counts.loads == {scheme: 15}
        assert counts.evictions == 10
        assert not counts.failures
        fabric.check_invariants(idle=True)
    finally:
        await copies.stop()
        await fabric.close()
    gc.collect()
    assert own_segments() == before


def copies_of(bench: Bench, fabric: Fabric) -> Copies:
    async def end_running(requests: object) -> None:
        raise AssertionError(f"nothing is dropped while requests run: {requests}")

    return Copies(
        ReplicaId("replica"),
        pool=AdapterPool(max_adapters=5, capacity_bytes=PLENTY),
        engine=bench.engine,
        fabric=fabric,
        max_lora_rank=MAX_LORA_RANK,
        max_bytes=PLENTY,
        drain_timeout_s=5.0,
        end_running=end_running,
    )
