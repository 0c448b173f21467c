"""vLLM's workers as the adapter pool of a replica meets them: their RPCs, in this process, without a model.

Public, so that whoever builds on `EnginePool` can test it without an engine. Each rank really maps and checks
the segments and has a fixed number of slots; a test says which call fails, waits, or is never answered.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from loraserve.adapters.segment import MappedSegment, SegmentError, SegmentRef, map_segment

Fault = Callable[[int], Any]
"""Called with an adapter's number instead of the RPC: its answer, or what it raises."""


class FakeRank:
    """One worker rank: the adapters it has mapped, and those in its slots."""

    def __init__(self, num_slots: int) -> None:
        self.pool: dict[int, MappedSegment] = {}
        self.is_busy: bool | None = None
        self._opened: dict[int, SegmentRef] = {}
        self.active: set[int] = set()
        self._num_slots = num_slots
        self.faults: dict[str, Fault] = {}

    def call(self, method: str, *args: Any) -> Any:
        """Answer one RPC as the real worker does."""
        if method in self.faults:
            return self.faults[method](args[0] if args else 0)
        return getattr(self, method)(*args)

    def loraserve_open(
        self, lora_id: int, pid: int, fd: int, size_bytes: int, head_sha256: str, is_busy: bool
    ) -> None:
        """Take note of the segment."""
        self.is_busy = is_busy
        self._opened[lora_id] = SegmentRef(pid=pid, fd=fd, size_bytes=size_bytes, head_sha256=head_sha256)

    def loraserve_advance(self, lora_id: int, activate: bool, is_busy: bool) -> tuple[str, str]:
        """Map the adapter and check it, then put it into a slot."""
        self.is_busy = is_busy
        try:
            if lora_id not in self.pool:
                self.pool[lora_id] = map_segment(self._opened[lora_id])
            self.pool[lora_id].verify()
        except (SegmentError, KeyError) as error:
            return "failed", str(error)
        if not activate:
            return "ready", ""
        if lora_id not in self.active and len(self.active) == self._num_slots:
            return "failed", "no slot is free"
        self.active.add(lora_id)
        return "active", ""

    def loraserve_deactivate(self, lora_id: int) -> None:
        """Free the slot."""
        self.active.discard(lora_id)

    def loraserve_close(self, lora_id: int) -> None:
        """Free the slot and the mapping."""
        self.active.discard(lora_id)
        self._opened.pop(lora_id, None)
        self.pool.pop(lora_id, None)

    def loraserve_report(self) -> dict[str, Any]:
        """What is here."""
        sizes = dict.fromkeys(("allocated_bytes", "used_bytes", "padded_bytes"), 0)
        return {
            "pool": {lora_id: segment.size_bytes for lora_id, segment in self.pool.items()},
            "active": dict.fromkeys(self.active, 0),
            **sizes,
        }


class FakeWorkers:
    """Stands where the pool has vLLM's client: calls are answered in their order, one after the other."""

    def __init__(self, *, num_ranks: int, num_slots: int) -> None:
        self.ranks = [FakeRank(num_slots) for _ in range(num_ranks)]
        self.errored = False
        self.asked: list[str] = []
        self._gates: dict[str, asyncio.Event] = {}
        self._reached: dict[str, asyncio.Event] = {}
        self._line = asyncio.Lock()

    def hold(self, method: str) -> asyncio.Event:
        """Keep calls of the method, and all behind them, waiting until the event is set."""
        self._gates[method] = asyncio.Event()
        self._reached[method] = asyncio.Event()
        return self._gates[method]

    async def reached(self, method: str) -> None:
        """Wait until a call of the method that was held has come."""
        await self._reached[method].wait()

    def die(self) -> None:
        """As an engine that is killed: what it was asked is never answered."""
        self.errored = True

    def end(self) -> None:
        """As processes that have ended: all that they had mapped is free."""
        for rank in self.ranks:
            rank.pool.clear()

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        """One answer per rank; what a rank raises arrives as vLLM sends it, as a bare Exception."""
        async with self._line:
            self.asked.append(method)
            gate = self._gates.get(method)
            if gate is not None:
                self._reached[method].set()
                await gate.wait()
            await asyncio.sleep(0)
            if self.errored:
                await asyncio.Event().wait()
            try:
                return [rank.call(method, *args) for rank in self.ranks]
            except Exception as error:
                raise Exception(f"Call to collective_rpc method failed: {error}") from error
