"""`python -m loraserve.router`: a process by itself, ended by a signal, refusing bad input in a line."""

import asyncio
import json
import signal
import sys

import pytest

from loraserve.router.testing import FakeController, FakeReplica, table_of
from loraserve.rpc.server import make_channel
from tests.support.router_bench import Bench, ask


async def run(*arguments: str) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "loraserve.router", *arguments, stdout=pipe, stderr=pipe
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_router_process_serves_until_a_signal(number: signal.Signals) -> None:
    controller, replica = FakeController(), FakeReplica("r0")
    await controller.start()
    await replica.start()
    await controller.publish(table_of(1, {"r0": replica.address}, {"one": ("r0",)}))
    process = await run("--controller", controller.address, "--port", "0", "--router-id", "alone")
    try:
        assert process.stdout is not None
        started = json.loads(await asyncio.wait_for(process.stdout.readline(), 20))
        assert started["router_id"] == "alone"
        channel = make_channel(f"127.0.0.1:{started['port']}")
        bench = Bench(
            controller=controller,
            replicas={"r0": replica},
            router=None,  # type: ignore[arg-type]
            port=started["port"],
            channel=channel,
        )
        async with asyncio.timeout(10):
            while await bench.health() != "SERVING":  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert (await bench.inference.Complete(ask("one"))).text == "abc"
        await channel.close()
        process.send_signal(number)
        assert await asyncio.wait_for(process.wait(), 10) == 0
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
        await replica.stop()
        await controller.stop()


async def test_bad_input_is_one_line_and_exit_code_2() -> None:
    process = await run("--controller", "127.0.0.1:1", "--port", "0", "--host", "0.0.0.0")
    _, errors = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 2
    assert errors.decode().strip().splitlines()[-1].startswith("loraserve.router: host: 0.0.0.0")
