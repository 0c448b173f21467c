"""A real cluster for tests, driven through the command line as a user would."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraserve.client import Client, Completion
from loraserve.client_types import ClusterStatus
from loraserve.cluster.processes import processes_of, titled
from loraserve.cluster.state import RunningCluster, read_running, start_ticks
from loraserve.request import SamplingParams

COMMAND_TIMEOUT_S = 240.0
POLL_S = 0.05
GREEDY = SamplingParams(temperature=0.0, max_tokens=16)


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveCluster:
    """One cluster with a cache folder of its own; `environment` is added to the commands'."""

    cache: Path
    name: str = "test"
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where the cluster keeps its files."""
        return self.cache / "clusters" / self.name

    def run(
        self, *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S
    ) -> "subprocess.CompletedProcess[str]":
        """Run one `loraserve` command to its end, whatever its exit code."""
        return subprocess.run(
            [sys.executable, "-m", "loraserve.cli.main", *arguments],
            env={**os.environ, **self.environment, "LORASERVE_CACHE_DIR": str(self.cache)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def call(self, *arguments: str) -> Any:
        """Run one command of this cluster with --json and parse its answer; it must succeed."""
        done = self.run(*arguments, "--cluster", self.name, "--json")
        assert done.returncode == 0, f"{arguments} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        return json.loads(done.stdout)

    def up(self, *arguments: str) -> Any:
        """Start the cluster on a free port."""
        return self.call("up", "--port", "0", *arguments)

    def down(self) -> None:
        """End it, and prove that nothing of it is left."""
        running = self.running()
        self.call("down")
        assert processes_of(running.run_id) == []
        assert not Path(running.temp_dir).exists()
        assert not (self.folder / "cluster.json").exists()

    def running(self) -> RunningCluster:
        """The running cluster's addresses and pids."""
        running = read_running(self.folder)
        assert running is not None
        return running

    def client(self, *, look_aside: bool | None = None) -> Client:
        """A client of all routers."""
        return Client(self.running().router_addresses, look_aside=look_aside)

    def log(self, name: str) -> str:
        """One process's log."""
        return (self.folder / "logs" / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def pids(self, title: str) -> list[int]:
        """This cluster's processes whose command line begins with `title`."""
        return titled(self.running().run_id, title)


async def wait_status(client: Client, condition: Any, timeout_s: float, what: str) -> ClusterStatus:
    """Ask for the status until the condition holds for it; AssertionError with `what` and the last one."""
    status: ClusterStatus | None = None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            while True:
                status = await client.status()
                if condition(status):
                    return status
                await asyncio.sleep(POLL_S)
    raise AssertionError(f"not so after {timeout_s:g} s: {what}; the last status: {status}")


async def wait_gone(pids: Sequence[int], timeout_s: float) -> None:
    """Wait until all these processes have ended; TimeoutError if one has not."""
    deadline_s = time.monotonic() + timeout_s
    while left := [pid for pid in pids if start_ticks(pid) is not None]:
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"processes {left} live {timeout_s} s later")
        await asyncio.sleep(POLL_S)


def kill(pid: int) -> None:
    """SIGKILL: no goodbye. Never 0, which is this process's own group."""
    assert pid > 0
    os.kill(pid, signal.SIGKILL)


async def completions(client: Client, adapters: Sequence[str], prompt: str) -> list[Completion]:
    """The same greedy prompt for each adapter, all at once; '' is the base model."""
    return await asyncio.gather(
        *(client.complete(prompt, adapter=name, sampling=GREEDY) for name in adapters)
    )
