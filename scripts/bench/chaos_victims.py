"""Finds what `scripts/bench/chaos` kills, kills it, and measures how long it is missed."""

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

from chaos_account import Kind
from chaos_load import Load
from chaos_netns import ApartRouter

from loraserve.client import Client
from loraserve.client_types import ClusterStatus, ReplicaStatus
from loraserve.cluster.processes import parent_of, processes_of, titled
from loraserve.cluster.state import start_ticks
from loraserve.errors import LoraServeError

POLL_S = 0.2
RECOVER_TIMEOUT_S = 90.0
"""What has not come back by then will not: the run fails."""

PATIENCE_S = 4.0
"""The next kill does not wait longer than this for the last one to be over."""

BURST_SHARE = 0.25
"""How many kills are followed by the next one at once."""

CUT_S = (1.0, 12.0)
"""Shorter and longer than the silence after which a link counts as broken, and than what TCP bears."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """One kill: seconds until a request was answered that needed the victim, and until it was back."""

    kind: Kind
    what: str
    at_s: float
    served_s: float | None
    restored_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What a cluster consists of from outside: its run, its routers' addresses, clients of each."""

    run_id: str
    addresses: Sequence[str]
    admin: Client
    each: Sequence[Client]


class Watcher:
    """Asks for the status again and again; the last answer that the controller gave is kept."""

    def __init__(self, admin: Client) -> None:
        self._admin = admin
        self.status: ClusterStatus | None = None
        self._asked_s = 0.0
        self.news = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            with suppress(LoraServeError):
                asked_s = time.monotonic()
                status = await self._admin.status()
                if status.controller_reachable:
                    self.status, self._asked_s = status, asked_s
                    news, self.news = self.news, asyncio.Event()
                    news.set()
            await asyncio.sleep(POLL_S)

    async def until(self, condition: Callable[[ClusterStatus], bool], timeout_s: float) -> bool:
        """Wait for a status, asked for after now, for which the condition holds; False if none came."""
        begun_s = time.monotonic()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while True:
                    await self.news.wait()
                    if self.status is not None and self._asked_s >= begun_s and condition(self.status):
                        return True
        return False


class Monkey:
    """Kills by plan. Guarantees that a replica is killed only while another one is ready."""

    def __init__(
        self, sight: Sight, watcher: Watcher, load: Load, apart: ApartRouter | None, rng: Random
    ) -> None:
        self._sight = sight
        self._watcher = watcher
        self._load = load
        self._apart = apart
        self._rng = rng
        self._recovering: set[asyncio.Task[None]] = set()
        self._busy: set[str] = set()
        self.recoveries: list[Recovery] = []
        self.by_kind: Counter[Kind] = Counter()
        self.last_holders = 0
        self.begun_s = time.monotonic()

    async def run(self, plan: Sequence[Kind], on_kill: Callable[[int], None]) -> None:
        """Kill all, then wait until everything has come back or was given up."""
        for number, kind in enumerate(plan):
            task = await self._strike(kind)
            on_kill(number + 1)
            if self._rng.random() < BURST_SHARE:
                await asyncio.sleep(self._rng.uniform(0.0, 0.3))
                continue
            await asyncio.wait({task}, timeout=PATIENCE_S)
            await asyncio.sleep(self._rng.uniform(0.0, 0.6))
        if self._recovering:
            await asyncio.gather(*self._recovering)

    async def _strike(self, kind: Kind) -> "asyncio.Task[None]":
        strike: dict[Kind, Callable[[], Awaitable[asyncio.Task[None]]]] = {
            Kind.REPLICA: lambda: self._strike_replica(engine=False),
            Kind.ENGINE: lambda: self._strike_replica(engine=True),
            Kind.CONTROLLER: self._strike_controller,
            Kind.ROUTER: self._strike_router,
            Kind.LINK: self._strike_link,
        }
        return await strike[kind]()

    # -- replicas --------------------------------------------------------------------------------

    async def _strike_replica(self, *, engine: bool) -> "asyncio.Task[None]":
        victim, adapter = await self._find_replica()
        pid = victim.pid
        if engine:
            pid = _engine_of(victim.pid, self._sight.run_id) or pid
        kind = Kind.ENGINE if engine and pid != victim.pid else Kind.REPLICA
        _kill(pid)
        return self._recover(
            kind,
            victim.replica_id,
            served=lambda: self._answers(self._sight.admin, adapter),
            restored=lambda: self._watcher.until(lambda status: _is_back(status, victim), RECOVER_TIMEOUT_S),
        )

    async def _find_replica(self) -> tuple[ReplicaStatus, str]:
        """A replica that may be killed and an adapter that it holds, every other time one that nobody
        else holds."""
        deadline_s = time.monotonic() + RECOVER_TIMEOUT_S
        while time.monotonic() < deadline_s:
            status = self._watcher.status
            ready = [] if status is None else _living(status, self._busy)
            if status is not None and len(ready) >= 2:
                alone = _alone(status, ready)
                if alone and self._rng.random() < 0.5:
                    self.last_holders += 1
                    return self._rng.choice(alone)
                victim = self._rng.choice(ready)
                return victim, _adapter_of(status, victim, self._rng)
            await asyncio.sleep(POLL_S / 2)
        raise SystemExit(f"chaos: fewer than two replicas are ready {RECOVER_TIMEOUT_S:g} s after a kill")

    # -- the others ------------------------------------------------------------------------------

    async def _strike_controller(self) -> "asyncio.Task[None]":
        _kill(await self._find(lambda: _controller(self._sight.run_id), "controller"))

        async def restored() -> bool:
            return await self._watcher.until(
                lambda status: all(one.state == "ready" for one in status.replicas), RECOVER_TIMEOUT_S
            )

        async def served() -> bool:
            return await self._watcher.until(lambda status: True, RECOVER_TIMEOUT_S)

        return self._recover(Kind.CONTROLLER, "controller", served=served, restored=restored)

    async def _strike_router(self) -> "asyncio.Task[None]":
        index = await self._free_router(range(len(self._sight.addresses)))
        address = self._sight.addresses[index]
        if self._apart is not None and address == self._apart.address:
            self._apart.kill()
            starting: Awaitable[None] = asyncio.to_thread(self._apart.start)
        else:
            port = int(address.rpartition(":")[2])
            _kill(await self._find(lambda: _listener(self._sight.run_id, port), f"router at {address}"))
            starting = asyncio.sleep(0)

        async def restored() -> bool:
            await starting
            return await self._reaches(self._sight.each[index])

        return self._recover(
            Kind.ROUTER,
            address,
            served=lambda: self._answers(self._sight.each[index], self._any_adapter()),
            restored=restored,
        )

    async def _strike_link(self) -> "asyncio.Task[None]":
        apart = self._apart
        assert apart is not None
        index = await self._free_router([len(self._sight.addresses) - 1])
        link = self._rng.choice((apart.CLIENTS, apart.CLUSTER))
        cut_s = self._rng.uniform(*CUT_S)
        apart.cut(link)

        async def restored() -> bool:
            return await self._reaches(self._sight.each[index])

        async def mend() -> None:
            await asyncio.sleep(cut_s)
            apart.restore(link)

        whose = "clients" if link == apart.CLIENTS else "cluster"
        return self._recover(
            Kind.LINK,
            f"{self._sight.addresses[index]} to {whose} for {cut_s:.1f} s",
            served=lambda: self._answers(self._sight.each[index], self._any_adapter()),
            restored=restored,
            busy=self._sight.addresses[index],
            before=mend,
        )

    async def _free_router(self, among: Sequence[int]) -> int:
        """One that is not recovering from a kill already."""
        deadline_s = time.monotonic() + RECOVER_TIMEOUT_S
        while time.monotonic() < deadline_s:
            free = [index for index in among if self._sight.addresses[index] not in self._busy]
            if free:
                return self._rng.choice(free)
            await asyncio.sleep(POLL_S / 2)
        raise SystemExit(f"chaos: no router is back {RECOVER_TIMEOUT_S:g} s after a kill")

    async def _find(self, find: Callable[[], int | None], what: str) -> int:
        """The process, as soon as there is one."""
        deadline_s = time.monotonic() + RECOVER_TIMEOUT_S
        while time.monotonic() < deadline_s:
            pid = find()
            if pid is not None:
                return pid
            await asyncio.sleep(POLL_S)
        raise SystemExit(f"chaos: no {what} {RECOVER_TIMEOUT_S:g} s after a kill")

    # -- recovery --------------------------------------------------------------------------------

    def _recover(
        self,
        kind: Kind,
        what: str,
        *,
        served: Callable[[], Awaitable[bool]],
        restored: Callable[[], Awaitable[bool]],
        busy: str = "",
        before: Callable[[], Awaitable[None]] | None = None,
    ) -> "asyncio.Task[None]":
        """Count the kill and measure in the background; what is killed stays busy until it is back."""
        self.by_kind[kind] += 1
        self._busy.add(busy or what)
        at_s = time.monotonic() - self.begun_s

        async def measure() -> None:
            if before is not None:
                await before()
            since_s = time.monotonic()

            async def timed(wait: Callable[[], Awaitable[bool]]) -> float | None:
                return time.monotonic() - since_s if await wait() else None

            served_s, restored_s = await asyncio.gather(timed(served), timed(restored))
            self._busy.discard(busy or what)
            self.recoveries.append(
                Recovery(kind=kind, what=what, at_s=at_s, served_s=served_s, restored_s=restored_s)
            )

        task = asyncio.create_task(measure())
        self._recovering.add(task)
        task.add_done_callback(self._recovering.discard)
        return task

    def _any_adapter(self) -> str:
        status = self._watcher.status
        return self._rng.choice([one.name for one in status.adapters]) if status else ""

    async def _answers(self, client: Client, adapter: str) -> bool:
        """Send requests, one after another, until one is answered."""
        deadline_s = time.monotonic() + RECOVER_TIMEOUT_S
        while time.monotonic() < deadline_s:
            if await self._load.probe(client, adapter):
                return True
            await asyncio.sleep(POLL_S / 2)
        return False

    async def _reaches(self, client: Client) -> bool:
        """Wait until this router serves and has the controller."""
        deadline_s = time.monotonic() + RECOVER_TIMEOUT_S
        while time.monotonic() < deadline_s:
            with suppress(LoraServeError, TimeoutError):
                async with asyncio.timeout(5.0):
                    await client.wait_ready(5.0)
                    if (await client.status()).controller_reachable:
                        return True
            await asyncio.sleep(POLL_S / 2)
        return False


def _living(status: ClusterStatus, busy: set[str]) -> list[ReplicaStatus]:
    return [
        one
        for one in status.replicas
        if one.state == "ready" and one.replica_id not in busy and start_ticks(one.pid) is not None
    ]


def _alone(status: ClusterStatus, ready: Sequence[ReplicaStatus]) -> list[tuple[ReplicaStatus, str]]:
    """The replicas that hold an adapter alone, each with the adapter."""
    by_id = {one.replica_id: one for one in ready}
    return [
        (by_id[adapter.holders[0].replica_id], adapter.name)
        for adapter in status.adapters
        if len(adapter.holders) == 1 and adapter.holders[0].replica_id in by_id
    ]


def _adapter_of(status: ClusterStatus, victim: ReplicaStatus, rng: Random) -> str:
    held = [
        adapter.name
        for adapter in status.adapters
        if any(holder.replica_id == victim.replica_id for holder in adapter.holders)
    ]
    return rng.choice(held or [adapter.name for adapter in status.adapters])


def _is_back(status: ClusterStatus, victim: ReplicaStatus) -> bool:
    return any(
        one.replica_id == victim.replica_id and one.state == "ready" and one.pid not in (0, victim.pid)
        for one in status.replicas
    )


def _controller(run_id: str) -> int | None:
    return next(iter(titled(run_id, "ray::ControllerActor")), None)


def _engine_of(replica: int, run_id: str) -> int | None:
    """The process that stands for a replica's engine."""
    for pid in titled(run_id, "cat"):
        with suppress(OSError):
            if parent_of(pid) == replica:
                return pid
    return None


def _listener(run_id: str, port: int) -> int | None:
    """The process of the run that listens at the port."""
    inodes = _listening_inodes(port)
    for pid in processes_of(run_id):
        with suppress(OSError):
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    if os.readlink(entry) in inodes:
                        return pid
    return None


def _listening_inodes(port: int) -> set[str]:
    inodes = set()
    # gRPC listens with sockets for both versions of IP.
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
            fields = line.split()
            # 0A is LISTEN.
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    return inodes


def _kill(pid: int) -> None:
    """SIGKILL: no goodbye. Never 0, which is this process's own group."""
    assert pid > 0
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
