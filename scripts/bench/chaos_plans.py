"""Plans that move adapters about all the time while `scripts/bench/chaos` kills."""

import asyncio
import time
from contextlib import suppress
from random import Random
from types import MappingProxyType

from loraserve.client import Client
from loraserve.client_types import ClusterStatus
from loraserve.errors import LoraServeError, StaleError
from placement.types import Holder, Placement, ReplicaId, VersionId


class Rebalancer:
    """Applies another plan every `every_s` through `admin` until stopped, then lets the policy plan again."""

    def __init__(self, admin: Client, every_s: float, rng: Random) -> None:
        self._admin = admin
        self._every_s = every_s
        self._rng = rng
        self._stopping = asyncio.Event()
        self.applied = 0
        self.refused = 0
        self.unanswered = 0
        self.bytes_moved = 0

    async def run(self) -> None:
        """Draw, apply, count."""
        while not self._stopping.is_set():
            next_s = time.monotonic() + self._every_s
            await self._apply()
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, next_s - time.monotonic())):
                    await self._stopping.wait()
        with suppress(LoraServeError):
            await self._admin.freeze_plan(frozen=False)

    def stop(self) -> None:
        """End after the present plan."""
        self._stopping.set()

    async def _apply(self) -> None:
        try:
            plan = drawn_plan(await self._admin.status(), self._rng)
            if plan is not None:
                change = await self._admin.apply_plan(plan)
                self.applied += 1
                self.bytes_moved += change.diff.bytes_to_move
        except StaleError:
            # A replica died, or weights were replaced, since the status.
            self.refused += 1
        except LoraServeError:
            self.unanswered += 1


def drawn_plan(status: ClusterStatus, rng: Random) -> Placement | None:
    """A plan at random that the ready replicas have room for, with at least one place for each adapter; None
    if not all could be placed."""
    left = {one.replica_id: one.pool_adapters for one in status.replicas if one.state == "ready"}
    ranks = {one.replica_id: one.max_lora_rank for one in status.replicas}
    adapters = sorted(status.adapters, key=lambda one: one.name)
    rng.shuffle(adapters)
    chosen: dict[str, list[str]] = {one.version: [] for one in adapters}
    # A place for each first, then more of them until all replicas are full.
    for adapter in [*adapters, *rng.choices(adapters, k=sum(left.values()))]:
        places = [
            replica
            for replica, number in left.items()
            if number > 0 and adapter.rank <= ranks[replica] and replica not in chosen[adapter.version]
        ]
        if places:
            place = rng.choice(places)
            chosen[adapter.version].append(place)
            left[place] -= 1
    if not all(chosen.values()):
        return None
    return Placement(
        MappingProxyType(
            {
                VersionId(version): tuple(
                    Holder(replica_id=ReplicaId(one), share=1 / len(places)) for one in places
                )
                for version, places in chosen.items()
            }
        )
    )
