"""`bench fetch` as a whole: two real processes, with adapters so small that it takes a second."""

import asyncio
import os
from pathlib import Path

import pytest

from loraserve.bench import fetch_run
from loraserve.bench.fetch_figures import Source
from loraserve.bench.fetch_processes import WorkerProcess, wanted_tree, worker
from loraserve.bench.fetch_run import FetchOptions, FetchProgress, run_fetch
from loraserve.bench.fetch_subject import made, shape_of_rank, shape_of_size
from loraserve.errors import WorkFailedError
from tests.support.adapter_maker import small_base

KIB = 1024


def folders_left(parent: Path) -> list[Path]:
    return [path for path in parent.iterdir() if path.is_dir()]


async def test_every_source_is_measured_and_nothing_is_left(tmp_path: Path) -> None:
    shapes = (shape_of_size(64 * KIB), shape_of_size(512 * KIB))
    sources: tuple[Source, ...] = ("tcp", "page_cache", "origin")
    progress = FetchProgress()
    told: list[float] = []
    progress.listeners.append(lambda now: told.append(now.share))
    result = await run_fetch(
        FetchOptions(shapes=shapes, sources=sources, repetitions=2, least=2), tmp_path, progress
    )
    assert [(row.label, row.source) for row in result.rows] == [
        (shape.label, source) for shape in shapes for source in sources
    ]
    assert all(row.resident.samples == 2 and row.active is None for row in result.rows)
    assert {(one["wanted_from"], one["source"]) for one in result.samples} == {
        ("tcp", "tcp"), ("page_cache", "origin"), ("origin", "origin"),
    }  # fmt: skip
    assert result.left_out == {}
    assert set(result.floors) == {"memcpy_bytes_per_s", "sha256_bytes_per_s"}
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert folders_left(tmp_path) == []


async def test_with_an_engine_an_adapter_is_timed_until_it_is_active(tmp_path: Path) -> None:
    options = FetchOptions(
        shapes=(shape_of_rank(small_base(), 8),),
        sources=("tcp",),
        repetitions=1,
        engine={"engine": {"kind": "emulated", "max_lora_rank": 8}},
    )
    (row,) = (await run_fetch(options, tmp_path, FetchProgress())).rows
    assert row.active is not None
    assert row.active.median_s > row.resident.median_s


async def test_a_source_that_cannot_be_had_is_left_out_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_run, "share_in_memory", lambda path: 1.0)
    options = FetchOptions(shapes=(shape_of_size(64 * KIB),), sources=("cold_disk", "origin"), repetitions=1)
    result = await run_fetch(options, tmp_path, FetchProgress())
    assert [row.source for row in result.rows] == ["origin"]
    assert "100% of a file stay in memory" in result.left_out["cold_disk"]


async def test_a_run_whose_sources_are_all_left_out_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_run, "share_in_memory", lambda path: 1.0)
    options = FetchOptions(shapes=(shape_of_size(64 * KIB),), sources=("cold_disk",), repetitions=1)
    with pytest.raises(WorkFailedError, match=r"^nothing was measured: cold_disk: 100% of a file stay"):
        await run_fetch(options, tmp_path, FetchProgress())
    assert folders_left(tmp_path) == []


async def test_an_adapter_that_memory_cannot_hold_is_refused_before_anything_starts(tmp_path: Path) -> None:
    shape = shape_of_size(64 * KIB)
    huge = type(shape)(label="huge", rank=512, modules=dict.fromkeys(shape.modules, (2**40, 2**40)))
    with pytest.raises(WorkFailedError, match=r"huge: needs .* of memory"):
        await run_fetch(FetchOptions(shapes=(huge,), sources=("tcp",)), tmp_path, FetchProgress())
    assert folders_left(tmp_path) == []


@pytest.fixture
def opened_with() -> dict[str, object]:
    return {"host": "127.0.0.1", "schemes": ["tcp"], "capacity_bytes": 2**26}


async def test_a_process_that_fails_says_why_and_goes_on(
    tmp_path: Path, opened_with: dict[str, object]
) -> None:
    async with worker("fetching process", tmp_path) as process:
        await process.ask("open", **opened_with)
        with made(shape_of_size(64 * KIB), tmp_path) as subject:
            with pytest.raises(WorkFailedError, match=r"the fetching process: .*no peer and no origin"):
                await process.ask("fetch", wanted=wanted_tree(subject))
            tree = wanted_tree(subject, directory=subject.stored)
            assert (await process.ask("fetch", wanted=tree))["source"] == "origin"
        pid = process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_process_that_is_killed_is_one_line(tmp_path: Path, opened_with: dict[str, object]) -> None:
    async with worker("fetching process", tmp_path) as process:
        await process.ask("open", **opened_with)
        os.kill(process.pid, 9)
        with pytest.raises(WorkFailedError, match="the fetching process has ended"):
            await process.ask("withdraw", key="x")


async def test_a_transport_alone_moves_what_a_process_publishes(
    tmp_path: Path, opened_with: dict[str, object]
) -> None:
    async with worker("holder", tmp_path) as holder, worker("fetcher", tmp_path) as fetcher:
        ends: list[WorkerProcess] = [holder, fetcher]
        opened, _ = await asyncio.gather(*(end.ask("open", **opened_with) for end in ends))
        await holder.ask("publish", key="region", size_bytes=3_000_000)
        address = opened["addresses"]["tcp"]
        asked = {"scheme": "tcp", "address": address, "key": "region", "size_bytes": 3_000_000, "times": 2}
        assert [one > 0 for one in (await fetcher.ask("read", **asked))["seconds"]] == [True, True]
        await holder.ask("withdraw", key="region")
        with pytest.raises(WorkFailedError, match="region is not published"):
            await fetcher.ask("read", **asked)
