"""The adapters of an engine with rank-true execution: held in shared memory, active in slots as needed.

`placement.slots.machine` decides which version has a slot; this shell tells vLLM's workers where the
segments are and feeds back what they say. vLLM's own caches never have to evict: a request enters vLLM only
while its version is active.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from loraserve.adapters.safetensors_file import show
from loraserve.adapters.segment import AdapterSegment, SegmentError, SegmentRef, build_segment
from loraserve.engines.base import AdapterFiles, SlotMemory
from loraserve.engines.vllm_calls import CALL_TIMEOUT_S, EngineCalls
from loraserve.engines.vllm_lora.pool import go_last
from loraserve.engines.vllm_lora.worker import ACTIVE, FAILED, PREPARING, READY
from loraserve.errors import (
    AdapterRejectedError,
    EngineDeadError,
    LoraServeError,
    OverloadedError,
    StaleError,
    WorkFailedError,
)
from placement.slots.machine import SlotPhase, SlotTable
from placement.slots.messages import (
    Activate,
    Activated,
    ActivationFailed,
    Admit,
    Deactivate,
    Deactivated,
    Dropped,
    Ended,
    Event,
    Loaded,
    Refuse,
    Wanted,
)
from placement.types import VersionId

# A request may wait for what is polled for, and each poll is work between two steps.
_FIRST_POLL_S = 0.001
_LAST_POLL_S = 0.02
_POLLS_PER_WAIT = 4
_PREPARED_BYTES_PER_S = 2e9
"""Nothing is prepared faster: to ask before would only take time from it."""


class _Held:
    """A version in the pool: its memory, if it is the pool's own, and vLLM's name for it."""

    def __init__(self, own: AdapterSegment | None, lora: Any) -> None:
        self._own = own
        self.lora = lora

    @property
    def lora_id(self) -> int:
        number: int = self.lora.lora_int_id
        return number

    def give_back(self) -> None:
        """Close what the pool has built itself: a segment that was given is its giver's."""
        if self._own is not None:
            self._own.close()


class EnginePool:
    """Loads and unloads one version at a time, and believes what every worker rank reports, no status.

    A version gets an integer id and a name of its own, and no id is used twice in an engine's life: vLLM
    tells adapters apart by the one in some places and by the other elsewhere (its prefix cache).
    """

    def __init__(
        self,
        client: Any,
        *,
        num_slots: int,
        num_adapters: int,
        max_lora_rank: int,
        num_requests: Callable[[], int],
    ) -> None:
        self._calls = EngineCalls(client)
        self._num_requests = num_requests
        self._num_adapters = num_adapters
        self._max_lora_rank = max_lora_rank
        self._table = SlotTable(num_slots=num_slots)
        self._held: dict[VersionId, _Held] = {}
        self._dropped: dict[VersionId, _Held] = {}
        """At most one version that is being unloaded: it may still be in its slot."""
        self._uses: Counter[VersionId] = Counter()
        self._waiting: dict[str, asyncio.Future[bool]] = {}
        self._changed = asyncio.Event()
        self._last_id = 0
        self._changing = asyncio.Lock()
        self._writing = asyncio.Lock()
        self._dead = ""
        # Copying and hashing goes after serving: the engine may share these processors.
        self._builder = ThreadPoolExecutor(1, "loraserve-build", initializer=go_last)
        self.memory = SlotMemory()

    async def load(self, adapter: AdapterFiles) -> None:
        """Have every worker map and check the version; one that is held is no error.

        A segment that comes with it is in use until `unload` has returned, or this has failed.
        AdapterRejectedError for what cannot be served (nothing stays behind), OverloadedError without room.
        """
        await self._calls.finish(self._load(adapter))

    async def unload(self, version_id: VersionId) -> None:
        """Free the version's slot and memory; StaleError while requests use it."""
        await self._calls.finish(self._unload(version_id))

    async def resident(self) -> frozenset[VersionId]:
        """The versions that every rank holds."""
        everywhere = frozenset.intersection(*await self._pooled())
        return frozenset(name for name, held in self._held.items() if held.lora_id in everywhere)

    def pin(self, version_id: VersionId) -> Any | None:
        """vLLM's name for the version, which cannot be unloaded until `unpin`; None if it is not held."""
        held = self._held.get(version_id)
        if held is None:
            return None
        self._uses[version_id] += 1
        return held.lora

    def unpin(self, version_id: VersionId) -> None:
        """Give back one `pin`."""
        self._uses[version_id] -= 1
        if not self._uses[version_id]:
            del self._uses[version_id]

    def is_active(self, version_id: VersionId) -> bool:
        """Whether a request would not wait in `enter`."""
        return self._table.phase(version_id) is SlotPhase.ACTIVE

    async def enter(self, version_id: VersionId, request_id: str) -> bool:
        """Wait until the version is active in a slot; False if `give_up` came first.

        WorkFailedError if it cannot be made active, EngineDeadError if the engine has died.
        """
        if self._dead:
            raise EngineDeadError(self._dead)
        waiting = self._waiting[request_id] = asyncio.get_running_loop().create_future()
        self._handle(Wanted(version_id=version_id, request_id=request_id))
        try:
            admitted: bool = await waiting
            return admitted
        finally:
            del self._waiting[request_id]

    def give_up(self, request_id: str) -> None:
        """End the request's wait in `enter`, if it is in one."""
        waiting = self._waiting.get(request_id)
        if waiting is not None and not waiting.done():
            waiting.set_result(False)

    def leave(self, version_id: VersionId, request_id: str) -> None:
        """The request has ended, wherever it was."""
        self._handle(Ended(version_id=version_id, request_id=request_id))

    def close(self) -> None:
        """Give all memory back: the engine's processes have ended, and nobody waits for them any more."""
        self._dead = self._dead or "the vLLM engine is closed"
        for request in self._waiting:
            self._answer(request, EngineDeadError(self._dead))
        self._builder.shutdown(wait=False)
        for held in self._held.values():
            held.give_back()

    # -- pool ----------------------------------------------------------------------------------

    async def _load(self, adapter: AdapterFiles) -> None:
        name = adapter.version_id
        async with self._changing:
            if self._dead:
                raise EngineDeadError(self._dead)
            if name in self._held:
                return
            if adapter.rank > self._max_lora_rank:
                raise AdapterRejectedError(
                    f"adapter {name}: rank {adapter.rank} is above engine.max_lora_rank {self._max_lora_rank}"
                )
            if len(self._held) >= self._num_adapters:
                raise OverloadedError(f"adapter {name}: the pool holds {self._num_adapters} already")
            given = adapter.segment
            segment = given or await self._build(adapter)
            try:
                lora = await self._open(name, self._checked(name, segment))
            except BaseException:
                if given is None:
                    segment.close()
                raise
            self._held[name] = _Held(None if given else segment, lora)
        self._handle(Loaded(version_id=name))
        await self._set_aside(name)

    async def _build(self, adapter: AdapterFiles) -> AdapterSegment:
        name = adapter.version_id
        if not adapter.directory.is_dir():
            raise AdapterRejectedError(f"adapter {name}: no folder {adapter.directory}")
        copy = partial(
            build_segment,
            adapter.directory,
            name=name,
            digest=adapter.digest or None,
            max_lora_rank=self._max_lora_rank,
        )
        try:
            return await asyncio.get_running_loop().run_in_executor(self._builder, copy)
        except OSError as error:  # no memory, or too many open files: each segment is one
            raise WorkFailedError(f"adapter {name}: it cannot be put into shared memory: {error}") from error

    async def _set_aside(self, version_id: VersionId) -> None:
        """Checking a version has prepared it; free that if no slot takes it, or it would stay for ever."""
        async with self._writing:
            held = self._held.get(version_id)
            if held is not None and self._table.phase(version_id) is None:
                # If that fails, the version is there all the same.
                with contextlib.suppress(WorkFailedError):
                    await self._calls.workers("loraserve_deactivate", held.lora_id)

    def _checked(self, name: VersionId, segment: AdapterSegment) -> SegmentRef:
        """Where the segment is; AdapterRejectedError for another version's, or a rank above the engine's."""
        found, rank = segment.decoded.name, segment.rank
        if found != name:
            raise AdapterRejectedError(f"adapter {name}: its segment is that of {show(found)}")
        if rank > self._max_lora_rank:
            raise AdapterRejectedError(
                f"adapter {name}: its rank {rank} is above engine.max_lora_rank {self._max_lora_rank}"
            )
        try:
            return segment.ref
        except SegmentError as error:
            raise WorkFailedError(f"adapter {name}: {error}") from error

    async def _open(self, name: VersionId, ref: SegmentRef) -> Any:
        """vLLM's name for the version: every rank has mapped and checked the segment, or none keeps it."""
        from vllm.lora.request import LoRARequest

        self._last_id += 1
        number = self._last_id
        # vLLM wants a path; ours names no file.
        lora = LoRARequest(lora_name=str(name), lora_int_id=number, lora_path=f"memory:{name}")
        try:
            await self._calls.workers(
                "loraserve_open", number, ref.pid, ref.fd, ref.size_bytes, ref.head_sha256, self._is_busy
            )
            await asyncio.sleep(ref.size_bytes / _PREPARED_BYTES_PER_S)
            if wrong := await self._advance(number, activate=False):
                raise AdapterRejectedError(f"adapter {name}: the engine refuses it: {wrong}")
        except EngineDeadError:
            raise
        except LoraServeError:
            await self._calls.workers("loraserve_close", number)
            raise
        return lora

    async def _unload(self, version_id: VersionId) -> None:
        async with self._changing:
            held = self._held.get(version_id)
            if held is None:
                return
            if self._uses[version_id]:
                raise StaleError(f"adapter {version_id}: {self._uses[version_id]} requests still use it")
            self._dropped[version_id] = self._held.pop(version_id)
            try:
                await self._close(version_id, held)
            finally:
                del self._dropped[version_id]
                held.give_back()

    async def _close(self, version_id: VersionId, held: _Held) -> None:
        self._handle(Dropped(version_id=version_id))
        while self._table.phase(version_id) is not None:
            self._changed.clear()
            await self._changed.wait()
        await self._calls.workers("loraserve_close", held.lora_id)
        holding = [rank for rank, ids in enumerate(await self._pooled()) if held.lora_id in ids]
        if holding:
            raise WorkFailedError(f"adapter {version_id}: worker ranks {holding} did not let go of it")

    async def _pooled(self) -> list[frozenset[int]]:
        return [frozenset(int(number) for number in answer["pool"]) for answer in await self._reports()]

    async def _reports(self) -> list[dict[str, Any]]:
        """What every worker rank holds; the first one's slots are noted."""
        answers = await self._calls.workers("loraserve_report")
        first = answers[0]
        self.memory = SlotMemory(
            active=len(first["active"]),
            allocated_bytes=first["allocated_bytes"],
            used_bytes=first["used_bytes"],
            padded_bytes=first["padded_bytes"],
        )
        return answers

    # -- slots ---------------------------------------------------------------------------------

    def _handle(self, event: Event) -> None:
        for command in self._table.handle(event):
            match command:
                case Activate(version_id=version):
                    self._calls.start(self._activate(version))
                case Deactivate(version_id=version):
                    self._calls.start(self._deactivate(version))
                case Admit(request_id=request):
                    self._answer(request, None)
                case Refuse(request_id=request, reason=reason):
                    dead = EngineDeadError(self._dead) if self._dead else None
                    self._answer(request, dead or WorkFailedError(f"request {request}: {reason}"))
        self._changed.set()

    def _answer(self, request: str, error: LoraServeError | None) -> None:
        waiting = self._waiting.get(request)
        if waiting is None or waiting.done():
            return
        if error is None:
            waiting.set_result(True)
        else:
            waiting.set_exception(error)

    async def _activate(self, version: VersionId) -> None:
        try:
            async with self._writing:
                held = self._held.get(version)
                wrong = "it was dropped" if held is None else await self._write(held.lora_id)
        except LoraServeError as error:
            self._note(error)
            wrong = str(error)
        if wrong:
            self._handle(ActivationFailed(version_id=version, reason=f"adapter {version}: {wrong}"))
            return
        self._handle(Activated(version_id=version))
        await self._look_at_memory()

    async def _write(self, lora_id: int) -> str:
        """Activate the adapter on every rank or on none; '' or what is wrong."""
        try:
            wrong = await self._advance(lora_id, activate=True)
        except WorkFailedError as error:
            wrong = str(error)
        if wrong:
            await self._calls.workers("loraserve_deactivate", lora_id)
        return wrong

    async def _deactivate(self, version: VersionId) -> None:
        held = self._held.get(version) or self._dropped[version]
        try:
            async with self._writing:
                await self._calls.workers("loraserve_deactivate", held.lora_id)
        except LoraServeError as error:
            self._note(error)
        self._handle(Deactivated(version_id=version))
        await self._look_at_memory()

    async def _look_at_memory(self) -> None:
        """Have the workers tell what slots take, when no request waits for it."""
        try:
            await self._reports()
        except LoraServeError as error:
            self._note(error)

    async def _advance(self, lora_id: int, *, activate: bool) -> str:
        """Advance the adapter on every rank until it is checked, or active; '' or what is wrong with it."""
        wanted = ACTIVE if activate else READY
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        while (waited_s := loop.time() - began_s) < CALL_TIMEOUT_S:
            answers = await self._calls.workers("loraserve_advance", lora_id, activate, self._is_busy)
            for state, reason in answers:
                if state == FAILED:
                    return str(reason)
            if all(state == wanted for state, _ in answers):
                return ""
            if any(state == PREPARING for state, _ in answers):
                await asyncio.sleep(min(max(waited_s / _POLLS_PER_WAIT, _FIRST_POLL_S), _LAST_POLL_S))
        return f"it was not ready within {CALL_TIMEOUT_S:.0f} s"

    @property
    def _is_busy(self) -> bool:
        """Whether a request runs, rather than waits for a version to be active."""
        return self._num_requests() > len(self._waiting)

    def _note(self, error: LoraServeError) -> None:
        if isinstance(error, EngineDeadError):
            self._dead = str(error)
