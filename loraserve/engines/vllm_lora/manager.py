"""vLLM's LoRA managers, changed in where adapters come from, what a slot holds and what is computed.

Engine processes only. vLLM's own caches never evict here: the replica makes room before a request needs it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.layers.linear import LinearBase
from vllm.platforms import current_platform

from loraserve.adapters.segment import MappedSegment
from loraserve.engines.vllm_lora.pool import Prepared, WorkerPool


class PooledAdapter(LoRAModel):  # type: ignore[misc]
    """What vLLM registers for an adapter of the pool: its id, its rank, and its prepared form."""

    def __init__(self, lora_id: int, rank: int, prepared: Prepared) -> None:
        super().__init__(lora_id, rank, {})
        self.prepared = prepared


class PooledModelManager(LRUCacheLoRAModelManager):  # type: ignore[misc]
    """Fills slots from the pool; subclasses say what a slot is.

    LoRA is applied to linear layers alone: the registry takes no adapter of embeddings or the output layer,
    and vLLM's slots for these are as large as the vocabulary.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Slots that are being filled, by adapter: they are taken, and not active yet.
        self._filling: dict[int, int] = {}
        super().__init__(*args, **kwargs)

    def prepare(self, segment: MappedSegment, rest: Callable[[], None]) -> Prepared:
        """The adapter in the form that fills a slot, by layer; runs beside the worker's loop, and calls
        `rest` after each piece of work."""
        raise NotImplementedError

    def fill_piece(self, adapter: PooledAdapter, index: int) -> bool:
        """Write one more piece of the adapter into the slot, which nobody uses yet; whether it is whole."""
        raise NotImplementedError

    def empty(self, index: int) -> None:
        """The slot's adapter has gone."""
        raise NotImplementedError

    def slot_memory(self) -> Mapping[str, int]:
        """allocated_bytes of the slots, used_bytes of them, and padded_bytes: all at the highest rank."""
        raise NotImplementedError

    def write_piece(self, lora_id: int) -> bool:
        """Write one more piece of a registered adapter; it becomes active with the last one."""
        if lora_id in self._active_adapters:
            return True
        if lora_id not in self._filling:
            taken = set(self._filling.values())
            free = [
                index
                for index, holder in enumerate(self.lora_index_to_id)
                if holder is None and index not in taken
            ]
            if not free:
                raise RuntimeError("no slot is free")
            self._filling[lora_id] = free[0]
        index = self._filling[lora_id]
        if not self.fill_piece(self._registered_adapters[lora_id], index):
            return False
        del self._filling[lora_id]
        self.lora_index_to_id[index] = lora_id
        self._active_adapters[lora_id] = None
        return True

    def activate_adapter(self, lora_id: int) -> bool:
        """All of `write_piece` at once: what vLLM calls inside a step, when it has not been done before."""
        if lora_id in self._active_adapters:
            self._active_adapters.touch(lora_id)
            return False
        if len(self._active_adapters) + len(self._filling) >= self.lora_slots:
            self._active_adapters.remove_oldest()
        while not self.write_piece(lora_id):
            pass
        return True

    def _deactivate_adapter(self, lora_id: int) -> None:
        self._abandon(lora_id)
        if lora_id in self.lora_index_to_id:
            index = self.lora_index_to_id.index(lora_id)
            self.lora_index_to_id[index] = None
            self.empty(index)

    def _abandon(self, lora_id: int) -> None:
        index = self._filling.pop(lora_id, None)
        if index is not None:
            self.empty(index)

    def remove_adapter(self, adapter_id: int) -> bool:
        """Take the adapter out of its slot, whether it is filled or being filled, and forget it."""
        self._abandon(adapter_id)
        removed: bool = super().remove_adapter(adapter_id)
        return removed

    def remove_all_adapters(self) -> None:
        """As `remove_adapter` for each."""
        self._filling.clear()
        for index in range(len(self.lora_index_to_id)):
            self.empty(index)
        super().remove_all_adapters()

    def _add_adapter(self, lora: LoRAModel) -> None:
        self._registered_adapters[lora.id] = lora

    def _match_target_modules(self, module_name: str, module: Any) -> bool:
        linear = isinstance(module, LinearBase | BaseLinearLayerWithLoRA)
        return linear and bool(super()._match_target_modules(module_name, module))


class PooledWorkerManager(LRUCacheWorkerLoRAManager):  # type: ignore[misc]
    """Loads adapters from the pool, never from a path: what vLLM has dropped is found again."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._manager_cls = _model_manager_class()
        self.pool = WorkerPool(lambda segment, rest: self._adapter_manager.prepare(segment, rest))

    @property
    def model_manager(self) -> PooledModelManager:
        """The slots."""
        manager: PooledModelManager = self._adapter_manager
        return manager

    def write_piece(self, lora_id: int) -> bool:
        """One more piece of a prepared adapter into a free slot; whether it is active."""
        manager = self.model_manager
        if lora_id not in manager.list_adapters():
            manager.add_adapter(self._pooled(lora_id))
        return manager.write_piece(lora_id)

    def deactivate(self, lora_id: int) -> None:
        """Free the adapter's slot; it stays in the pool."""
        self.model_manager.remove_adapter(lora_id)
        self.pool.forget_prepared(lora_id)

    def _load_adapter(self, lora_request: Any) -> LoRAModel:
        return self._pooled(lora_request.lora_int_id)

    def _pooled(self, lora_id: int) -> PooledAdapter:
        prepared = self.pool.prepared(lora_id)
        return PooledAdapter(lora_id, self.pool.rank(lora_id), prepared)


def _model_manager_class() -> type[PooledModelManager]:
    if current_platform.is_cpu():
        from loraserve.engines.vllm_lora.cpu_manager import CpuModelManager

        return CpuModelManager
    from loraserve.engines.vllm_lora.cuda_manager import CudaModelManager

    return CudaModelManager
