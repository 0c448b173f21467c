"""The emulated engine lives and dies with its process, if it is given one."""

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest

from loraserve.clock import WallClock
from loraserve.config import EmulatedSection, EngineSection, ModelSection
from loraserve.engines.emulated import EmulatedEngine
from loraserve.errors import EngineDeadError
from tests.support.engine_kit import collect, request

PARENT = """
import asyncio
from loraserve.engines.emulated_process import StandInProcess

async def main():
    process = await StandInProcess.start(print)
    print(process.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""
WAIT_S = 20.0


@pytest.fixture
async def engine() -> AsyncIterator[EmulatedEngine]:
    engine = EmulatedEngine(
        EngineSection(kind="emulated", max_num_seqs=2),
        EmulatedSection(engine_process=True),
        ModelSection(),
        clock=WallClock(),
    )
    yield engine
    await engine.close()
    await engine.close()


async def test_a_kill_of_the_process_fails_everything_at_once(engine: EmulatedEngine) -> None:
    (pid,) = (await engine.start()).pids
    begun = asyncio.Event()

    async def read(number: int) -> None:
        async for _ in engine.generate(request(str(number), max_tokens=2000)):
            begun.set()

    readers = [asyncio.create_task(read(number)) for number in range(4)]
    await asyncio.wait_for(begun.wait(), WAIT_S)
    load = engine.load()
    assert load.running > 0
    assert load.waiting > 0
    os.kill(pid, signal.SIGKILL)
    ends = await asyncio.wait_for(asyncio.gather(*readers, return_exceptions=True), WAIT_S)
    assert [type(end) for end in ends] == [EngineDeadError] * 4
    with pytest.raises(EngineDeadError, match=f"process {pid} has ended"):
        await engine.check()
    with pytest.raises(EngineDeadError):
        await collect(engine, request("late"))
    engine.check_invariants()


async def test_close_ends_the_process(engine: EmulatedEngine) -> None:
    (pid,) = (await engine.start()).pids
    await engine.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_process_ends_with_a_killed_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            pid = int(parent.stdout.readline())
            handle = os.pidfd_open(pid)
        finally:
            parent.kill()
    try:
        poller = select.poll()
        poller.register(handle, select.POLLIN)
        assert poller.poll(WAIT_S * 1e3), f"process {pid} outlived its parent"
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)
