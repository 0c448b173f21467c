"""The adapters of an engine with vLLM's own LoRA execution: loaded from files, one LoRA slot each."""

import asyncio
from collections import Counter
from typing import Any

from loraserve.engines.base import AdapterFiles, SlotMemory
from loraserve.engines.vllm_calls import EngineCalls
from loraserve.errors import (
    AdapterRejectedError,
    EngineDeadError,
    LoraServeError,
    OverloadedError,
    StaleError,
    WorkFailedError,
)
from placement.types import VersionId


class AdapterSlots:
    """Loads and unloads one version at a time, and believes what every worker rank lists, no status.

    A version gets an integer id and a name of its own, and no id is used twice in an engine's life: vLLM
    tells adapters apart by the one in some places and by the other elsewhere (its prefix cache). What was
    begun is finished although the caller has gone, so that this record and the engine never differ.
    """

    def __init__(self, client: Any, *, num_slots: int, max_lora_rank: int) -> None:
        self._calls = EngineCalls(client)
        self._client = client
        self._num_slots = num_slots
        self._max_lora_rank = max_lora_rank
        self._held: dict[VersionId, Any] = {}
        self._uses: Counter[VersionId] = Counter()
        self._last_id = 0
        self._lock = asyncio.Lock()

    async def load(self, adapter: AdapterFiles) -> None:
        """Bring the version into a slot; one that is held already is no error.

        AdapterRejectedError if vLLM refuses it (nothing stays behind), OverloadedError without a free slot.
        """
        await self._calls.finish(self._load(adapter))

    async def unload(self, version_id: VersionId) -> None:
        """Free the version's slot; StaleError while requests use it."""
        await self._calls.finish(self._unload(version_id))

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

    def is_active(self, version_id: VersionId) -> bool:
        """Whether a request would not wait for a slot: what is held has its own."""
        return version_id in self._held

    async def enter(self, version_id: VersionId, request_id: str) -> bool:
        """Whether a request may be given to vLLM: at once, for what is held has its slot."""
        return True

    def give_up(self, request_id: str) -> None:
        """End the wait of `enter`, which there is none of."""

    def leave(self, version_id: VersionId, request_id: str) -> None:
        """The request has ended."""

    @property
    def memory(self) -> SlotMemory:
        """Not known: vLLM does not say."""
        return SlotMemory()

    def close(self) -> None:
        """Let go of what the engine does not know of: nothing."""

    async def _load(self, adapter: AdapterFiles) -> None:
        name = adapter.version_id
        if not self._num_slots:
            raise AdapterRejectedError(f"adapter {name}: engine.lora_execution is off; expected another one")
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
            await self._calls.call(self._client.add_lora(lora))
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
        await self._calls.call(self._client.remove_lora(lora_id))
        holding = [rank for rank, ids in enumerate(await self._listed()) if lora_id in ids]
        if holding:
            raise WorkFailedError(f"worker ranks {holding} did not unload adapter number {lora_id}")

    async def _listed(self) -> list[frozenset[int]]:
        if not self._num_slots:
            return [frozenset()]
        ranks = await self._calls.call(self._client.collective_rpc("list_loras"))
        return [frozenset(ids) for ids in ranks]
