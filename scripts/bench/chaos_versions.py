"""Adapters whose weights are replaced while `scripts/bench/chaos` kills: which version may answer when."""

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from random import Random

from loraserve.client import Client
from loraserve.errors import LoraServeError

EVERY_S = 5.0
POLL_S = 0.3
SETTLE_S = 90.0
UNDONE_S = 8.0
"""How long a replacement whose answer was an error may still come to pass."""

LAG_S = 20.0
"""How long a router that is cut off may go on with the version before."""


class Versions:
    """The versions of each name over time; a request may be answered by any that served in its time."""

    def __init__(self, first: Mapping[str, str]) -> None:
        self._spans: dict[str, list[tuple[str, float, float]]] = {
            name: [(version, 0.0, float("inf"))] for name, version in first.items()
        }

    @property
    def names(self) -> list[str]:
        """All adapters."""
        return sorted(self._spans)

    def newest(self, name: str) -> str:
        """What was registered last."""
        return self._spans[name][-1][0]

    def all_newest(self) -> dict[str, str]:
        """The same for all names."""
        return {name: self.newest(name) for name in self._spans}

    def may_answer(self, name: str, sent_s: float, ended_s: float) -> set[str]:
        """The versions that a request sent and ended then may have been answered by."""
        return {
            version
            for version, from_s, until_s in self._spans[name]
            if from_s <= ended_s and sent_s <= until_s + LAG_S
        }

    def begin(self, name: str, version: str, now_s: float) -> None:
        """From now on this version may answer as well."""
        self._spans[name].append((version, now_s, float("inf")))

    def settle(self, name: str, version: str, now_s: float) -> None:
        """It is known that this version serves: the others end."""
        others = [
            (one, from_s, min(until_s, now_s)) for one, from_s, until_s in self._spans[name] if one != version
        ]
        from_s = max(from_s for one, from_s, _ in self._spans[name] if one == version)
        self._spans[name] = [*others, (version, from_s, float("inf"))]


class Replacer:
    """Gives one adapter after another the weights of another one, until stopped."""

    def __init__(self, admin: Client, versions: Versions, sources: Mapping[str, str], rng: Random) -> None:
        """`sources`: folders by the digest in the versions that they make."""
        self._admin = admin
        self._versions = versions
        self._sources = sources
        self._rng = rng
        self._stopping = asyncio.Event()
        self.replaced = 0
        self.undone = 0

    async def run(self) -> None:
        """Replace, then see which version it has become."""
        while not self._stopping.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(EVERY_S):
                    await self._stopping.wait()
                    return
            await self._replace(self._rng.choice(self._versions.names))

    def stop(self) -> None:
        """End after the present replacement."""
        self._stopping.set()

    async def _replace(self, name: str) -> None:
        before = self._versions.newest(name)
        digest = self._rng.choice(sorted(self._sources.keys() - {before.rpartition("@")[2]}))
        self._versions.begin(name, f"{name}@{digest}", time.monotonic())
        try:
            await self._admin.register_adapter(name, self._sources[digest], replace=True)
            patience_s = SETTLE_S
        except LoraServeError:
            # Refused and undone, or its answer was lost and it goes on: what it has become will show.
            patience_s = UNDONE_S
        now = await self._becomes(name, f"{name}@{digest}", patience_s)
        self._versions.settle(name, now, time.monotonic())
        self.replaced += now != before
        self.undone += now == before

    async def _becomes(self, name: str, wanted: str, patience_s: float) -> str:
        """The version that serves: the one wanted as soon as it does, any other one not before
        `patience_s` have passed."""
        begun_s = time.monotonic()
        while (waited_s := time.monotonic() - begun_s) < SETTLE_S:
            with suppress(LoraServeError):
                status = await self._admin.status()
                serving = [one.version for one in status.adapters if one.name == name and one.holders]
                is_known = serving == [wanted] or waited_s >= patience_s
                if status.controller_reachable and serving and is_known:
                    return serving[0]
            await asyncio.sleep(POLL_S)
        raise SystemExit(f"chaos: {name} is not {wanted} {SETTLE_S:g} s after its weights were replaced")
