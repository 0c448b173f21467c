"""Loading and dropping on a live replica: at once, twice, halfway, under running requests."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import grpc
import pytest

from loraserve.engines.description import Fetched
from loraserve.errors import (
    AdapterRejectedError,
    AlreadyExistsError,
    EngineDeadError,
    OverloadedError,
    WorkFailedError,
)
from loraserve.replica.pool import Residency
from placement.types import VersionId
from tests.support.engine_kit import adapter
from tests.support.replica_bench import MakeBench, ReplicaBench, eventually, status_of_call

CODE = grpc.StatusCode
A = VersionId("a@0")


async def begun_load(bench: ReplicaBench, name: str = "a") -> "asyncio.Task[Fetched | None]":
    """A load that has reached the engine and is held there."""
    await bench.engine.allow(loads=0)
    before = bench.engine.loads_begun
    task = asyncio.create_task(bench.server.load_adapter(adapter(name)))
    await eventually(lambda: bench.engine.loads_begun > before)
    return task


async def begun_drop(bench: ReplicaBench) -> "asyncio.Task[None]":
    """A drop that has begun to drain."""
    task = asyncio.create_task(bench.server.unload_adapter(A))
    await eventually(lambda: bench.server.pool.residency(A) is Residency.DRAINING)
    return task


async def test_the_same_load_twice_at_once_is_one_load(bench: ReplicaBench) -> None:
    first = await begun_load(bench)
    second = asyncio.create_task(bench.server.load_adapter(adapter("a")))
    await asyncio.sleep(0)
    await bench.engine.allow()
    await asyncio.gather(first, second)
    await bench.server.load_adapter(adapter("a"))
    assert bench.engine.loads_begun == 1
    assert bench.server.describe().resident == (A,)


async def test_a_version_serves_nobody_before_it_is_acknowledged(bench: ReplicaBench) -> None:
    load = await begun_load(bench)
    code, details = await status_of_call(bench.execute(version=A))
    assert code is CODE.FAILED_PRECONDITION
    assert details.startswith("a@0 is loading")
    await bench.engine.allow()
    await load
    assert await status_of_call(bench.execute(version=A, max_tokens=1)) == (CODE.OK, "")


async def test_a_replica_says_what_it_is_loading_and_dropping(bench: ReplicaBench) -> None:
    def said() -> tuple[tuple[VersionId, ...], ...]:
        description = bench.server.describe()
        return description.resident, description.loading, description.dropping

    load = await begun_load(bench)
    assert said() == ((), (A,), ())
    await bench.engine.allow()
    await load
    assert said() == ((A,), (), ())
    running = await bench.running(version=A)
    drop = await begun_drop(bench)
    assert said() == ((), (), (A,))
    await bench.engine.allow()
    assert await status_of_call(running) == (CODE.OK, "")
    await drop
    assert said() == ((), (), ())


async def test_what_has_no_room_is_refused_before_the_engine_hears_of_it(bench: ReplicaBench) -> None:
    with pytest.raises(OverloadedError, match="needs 20000 bytes, the pool has 10000 left"):
        await bench.server.load_adapter(adapter("big", size_bytes=20_000))
    for name in "ab":
        await bench.server.load_adapter(adapter(name))
    with pytest.raises(OverloadedError, match="c@0: the replica holds 2 adapters already, its most"):
        await bench.server.load_adapter(adapter("c"))
    assert bench.engine.loads_begun == 2
    assert bench.server.describe().resident == (A, "b@0")
    assert bench.server.pool.used_bytes == 2000


async def test_what_the_engine_refuses_leaves_no_trace(bench: ReplicaBench) -> None:
    with pytest.raises(AdapterRejectedError, match="rank 512 is above"):
        await bench.server.load_adapter(adapter("a", rank=512))
    assert bench.server.pool.used_bytes == 0
    assert bench.server.pool.residency(A) is None
    await bench.server.load_adapter(adapter("a"))


@pytest.mark.parametrize("finishes", [False, True])
async def test_a_cancelled_load_leaves_no_trace(bench: ReplicaBench, finishes: bool) -> None:
    bench.engine.finishes_cancelled_loads = finishes
    load = await begun_load(bench)
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load
    assert bench.server.pool.residency(A) is None
    assert bench.server.pool.used_bytes == 0
    assert await bench.engine.resident() == frozenset()
    await bench.engine.allow()
    await bench.server.load_adapter(adapter("a"))
    assert await bench.engine.resident() == {A}


async def test_a_load_behind_a_cancelled_one_goes_on(bench: ReplicaBench) -> None:
    first = await begun_load(bench)
    second = asyncio.create_task(bench.server.load_adapter(adapter("a")))
    await asyncio.sleep(0)
    first.cancel()
    await bench.engine.allow()
    await second
    assert bench.server.describe().resident == (A,)
    assert first.cancelled()


async def test_a_drop_during_the_load_comes_after_it(bench: ReplicaBench) -> None:
    load = await begun_load(bench)
    drop = asyncio.create_task(bench.server.unload_adapter(A))
    await asyncio.sleep(0)
    assert not drop.done()
    await bench.engine.allow()
    await asyncio.gather(load, drop)
    assert bench.server.describe().resident == ()
    assert await bench.engine.resident() == frozenset()


async def test_a_version_that_is_not_here_is_dropped_without_a_word(bench: ReplicaBench) -> None:
    await bench.server.unload_adapter(A)
    assert bench.engine.unloads_begun == 0


async def test_a_drop_waits_for_running_requests_and_refuses_new_ones(bench: ReplicaBench) -> None:
    await bench.server.load_adapter(adapter("a"))
    running = await bench.running(version=A)
    drop = await begun_drop(bench)
    code, details = await status_of_call(bench.execute("late", version=A))
    assert code is CODE.FAILED_PRECONDITION
    assert details.startswith("a@0 is draining")
    with pytest.raises(AlreadyExistsError, match="a@0 is draining; try again later"):
        await bench.server.load_adapter(adapter("a"))
    assert not drop.done()
    assert await bench.engine.resident() == {A}
    await bench.engine.allow()
    assert await status_of_call(running) == (CODE.OK, "")
    await drop
    assert await bench.engine.resident() == frozenset()
    await bench.server.load_adapter(adapter("a"))


async def test_a_request_that_outlasts_the_drain_is_ended_and_the_copy_goes(make_bench: MakeBench) -> None:
    bench = await make_bench(replica={"drain_timeout_s": 0.05})
    await bench.server.load_adapter(adapter("a"))
    running = await bench.running(version=A)
    other = await bench.running("other")
    await bench.server.unload_adapter(A)
    code, details = await status_of_call(running)
    assert code is CODE.UNAVAILABLE
    assert details == "request q was ended by replica r0 while draining"
    assert await bench.engine.resident() == frozenset()
    await bench.engine.allow()
    assert await status_of_call(other) == (CODE.OK, "")


async def test_two_drops_at_once_are_one(bench: ReplicaBench) -> None:
    await bench.server.load_adapter(adapter("a"))
    running = await bench.running(version=A)
    drops = [await begun_drop(bench) for _ in range(2)]
    await bench.engine.allow()
    assert await status_of_call(running) == (CODE.OK, "")
    await asyncio.gather(*drops)
    assert bench.engine.unloads_begun == 1
    assert bench.server.describe().resident == ()


async def test_a_load_after_a_drop_does_not_fall_to_a_second_drop(bench: ReplicaBench) -> None:
    await bench.server.load_adapter(adapter("a"))
    bench.engine.may_unload.clear()
    calls: list[asyncio.Task[Any]] = [asyncio.create_task(bench.server.unload_adapter(A))]
    await eventually(lambda: bench.engine.unloads_begun == 1)
    again: tuple[Coroutine[Any, Any, Any], ...] = (
        bench.server.load_adapter(adapter("a")),
        bench.server.unload_adapter(A),
    )
    for one in again:
        calls.append(asyncio.create_task(one))
        await asyncio.sleep(0)
    bench.engine.may_unload.set()
    await asyncio.gather(*calls)
    assert bench.server.describe().resident == (A,)
    assert await bench.engine.resident() == {A}


async def test_a_drop_goes_on_when_its_caller_goes_away(bench: ReplicaBench) -> None:
    await bench.server.load_adapter(adapter("a"))
    running = await bench.running(version=A)
    drop = await begun_drop(bench)
    drop.cancel()
    with pytest.raises(asyncio.CancelledError):
        await drop
    await bench.engine.allow()
    assert await status_of_call(running) == (CODE.OK, "")
    await eventually(lambda: bench.server.pool.residency(A) is None)
    assert await bench.engine.resident() == frozenset()


async def test_a_request_that_no_abort_ends_keeps_its_copy_until_it_ends(make_bench: MakeBench) -> None:
    bench = await make_bench(replica={"drain_timeout_s": 0.02})
    await bench.server.load_adapter(adapter("a"))
    running = await bench.running(version=A)
    bench.engine.deaf = True
    for _ in range(2):
        with pytest.raises(WorkFailedError, match=r"a@0 is still on replica r0 after 0\.04 s"):
            await bench.server.unload_adapter(A)
    assert bench.server.pool.residency(A) is Residency.DRAINING
    assert await bench.engine.resident() == {A}
    bench.server.check_invariants()
    later = asyncio.create_task(bench.server.unload_adapter(A))
    running.cancel()
    await later
    assert bench.server.pool.residency(A) is None
    assert await bench.engine.resident() == frozenset()


async def test_a_drop_that_the_engine_fails_is_told_and_can_be_asked_for_again(bench: ReplicaBench) -> None:
    await bench.server.load_adapter(adapter("a"))
    bench.engine.failing_unloads = 1
    with pytest.raises(WorkFailedError, match="not now"):
        await bench.server.unload_adapter(A)
    assert bench.server.pool.residency(A) is Residency.DRAINING
    await bench.server.unload_adapter(A)
    assert bench.server.pool.residency(A) is None


async def test_a_load_on_a_dead_engine_leaves_no_trace(bench: ReplicaBench) -> None:
    bench.engine.crash("gone")
    with pytest.raises(EngineDeadError, match="gone"):
        await bench.server.load_adapter(adapter("a"))
    assert bench.server.pool.used_bytes == 0
    with pytest.raises(EngineDeadError, match="gone"):
        await bench.server.report()


async def test_stopping_ends_a_drop_that_still_waits(make_bench: MakeBench) -> None:
    bench = await make_bench()
    await bench.server.load_adapter(adapter("a"))
    running = await bench.running(version=A)
    drop = await begun_drop(bench)
    await bench.server.stop(0.0)
    await asyncio.wait({drop}, timeout=5.0)
    assert drop.done()
    assert (await status_of_call(running))[0] is not CODE.OK
