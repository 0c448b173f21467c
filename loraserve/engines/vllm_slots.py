"""The adapters that a vLLM engine holds, one LoRA slot each."""

import asyncio
from collections import Counter
from collections.abc import Coroutine
from typing import Any

from loraserve.engines.base import AdapterFiles
from loraserve.errors import (
    AdapterRejectedError,
    EngineDeadError,
    LoraServeError,
    OverloadedError,
    StaleError,
    WorkFailedError,
)
from placement.types import VersionId

_CALL_TIMEOUT_S = 600.0
_LIVENESS_POLL_S = 0.5


class AdapterSlots:
    """Loads and unloads one version at a time, and believes what every worker rank lists, no status.

    A version gets an integer id and a name of its own, and no id is used twice in an engine's life: vLLM
    tells adapters apart by the one in some places and by the other elsewhere (its prefix cache). What was
    begun is finished although the caller has gone, so that this record and the engine never differ.
    """

    def __init__(self, client: Any, *, num_slots: int, max_lora_rank: int) -> None:
        self._client = client
        self._num_slots = num_slots
        self._max_lora_rank = max_lora_rank
        self._held: dict[VersionId, Any] = {}
        self._uses: Counter[VersionId] = Counter()
        self._last_id = 0
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def load(self, adapter: AdapterFiles) -> None:
        """Bring the version into a slot; one that is held already is no error.

        AdapterRejectedError if vLLM refuses it (nothing stays behind), OverloadedError without a free slot.
        """
        await self._finish(self._load(adapter))

    async def unload(self, version_id: VersionId) -> None:
        """Free the version's slot; StaleError while requests use it."""
        await self._finish(self._unload(version_id))

    async def resident(self) -> frozenset[VersionId]:
        """The versions that every rank holds."""
        ranks = await self._listed()
        everywhere = frozenset.intersection(*ranks)
        return frozenset(name for name, lora in self._held.items() if lora.lora_int_id in everywhere)

    def pin(self, version_id: VersionId) -> Any | None:
        """vLLM's name for the version, which cannot be unloaded until `unpin`; None if it is not held."""
        lora = self._held.get(version_id)
        if lora is not None:
            self._uses[version_id] += 1
        return lora

    def unpin(self, version_id: VersionId) -> None:
        """Give back one `pin`."""
        self._uses[version_id] -= 1
        if not self._uses[version_id]:
            del self._uses[version_id]

    async def _load(self, adapter: AdapterFiles) -> None:
        name = adapter.version_id
        async with self._lock:
            if name in self._held:
                return
            self._refuse_early(adapter)
            if len(self._held) >= self._num_slots:
                raise OverloadedError(f"adapter {name}: all {self._num_slots} adapter slots are in use")
            await self._remove_strays()
            self._held[name] = await self._add(adapter)

    async def _remove_strays(self) -> None:
        """Take out what the engine holds and this record does not, as a failed removal leaves it.

        With a stray beside them, the adapters held could reach the slot that has to stay empty.
        """
        held = {lora.lora_int_id for lora in self._held.values()}
        for stray in sorted(frozenset.union(*await self._listed()) - held):
            await self._remove(stray)

    def _refuse_early(self, adapter: AdapterFiles) -> None:
        if adapter.rank > self._max_lora_rank:
            raise AdapterRejectedError(
                f"adapter {adapter.version_id}: rank {adapter.rank} is above engine.max_lora_rank "
                f"{self._max_lora_rank}"
            )
        # vLLM takes a path that is no folder for the name of a repository and asks the network.
        if not adapter.directory.is_dir():
            raise AdapterRejectedError(f"adapter {adapter.version_id}: no folder {adapter.directory}")

    async def _add(self, adapter: AdapterFiles) -> Any:
        from vllm.lora.request import LoRARequest

        self._last_id += 1
        lora = LoRARequest(
            lora_name=str(adapter.version_id),
            lora_int_id=self._last_id,
            lora_path=str(adapter.directory.absolute()),
        )
        try:
            await self._call(self._client.add_lora(lora))
            missing = [rank for rank, ids in enumerate(await self._listed()) if lora.lora_int_id not in ids]
            if missing:
                raise WorkFailedError(f"worker ranks {missing} do not list it")
        except EngineDeadError:
            raise
        except Exception as error:  # vLLM sends what happened in its process as a bare Exception
            await self._remove(lora.lora_int_id)
            raise AdapterRejectedError(f"adapter {adapter.version_id}: vLLM refuses it: {error}") from error
        return lora

    async def _unload(self, version_id: VersionId) -> None:
        async with self._lock:
            lora = self._held.get(version_id)
            if lora is None:
                return
            if self._uses[version_id]:
                raise StaleError(f"adapter {version_id}: {self._uses[version_id]} requests still use it")
            del self._held[version_id]
            try:
                await self._remove(lora.lora_int_id)
            except LoraServeError:
                self._held[version_id] = lora
                raise

    async def _remove(self, lora_id: int) -> None:
        await self._call(self._client.remove_lora(lora_id))
        holding = [rank for rank, ids in enumerate(await self._listed()) if lora_id in ids]
        if holding:
            raise WorkFailedError(f"worker ranks {holding} did not unload adapter number {lora_id}")

    async def _listed(self) -> list[frozenset[int]]:
        ranks = await self._call(self._client.collective_rpc("list_loras"))
        return [frozenset(ids) for ids in ranks]

    async def _call(self, call: Coroutine[Any, Any, Any]) -> Any:
        """The call's result. vLLM never answers a call that its engine died under: watch that too."""
        task = asyncio.ensure_future(call)
        try:
            for _ in range(int(_CALL_TIMEOUT_S / _LIVENESS_POLL_S)):
                done, _ = await asyncio.wait({task}, timeout=_LIVENESS_POLL_S)
                if self._client.errored:
                    raise EngineDeadError("the vLLM engine process is gone")
                if done:
                    return task.result()
            raise WorkFailedError(f"vLLM did not answer within {_CALL_TIMEOUT_S:.0f} s")
        finally:
            task.cancel()

    async def _finish(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        await asyncio.shield(task)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen: its caller may have gone
