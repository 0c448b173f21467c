"""Slots on the CPU: references to matrices of exactly the adapter's rank. Engine processes only."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from vllm.config import VllmConfig

from loraserve.adapters.segment import MappedSegment
from loraserve.engines.vllm_lora.cpu import CpuStep, LayerExecution, LayerWeights, prepare_layer
from loraserve.engines.vllm_lora.install import EXECUTION
from loraserve.engines.vllm_lora.manager import PooledAdapter, PooledModelManager
from loraserve.engines.vllm_lora.pool import Prepared
from loraserve.engines.vllm_lora.room import Room, Spare
from loraserve.engines.vllm_lora.transpose import load_transpose
from loraserve.engines.vllm_lora.weights import layer_sources


class CpuModelManager(PooledModelManager):
    """Filling a slot sets references: what they refer to was prepared beside the loop."""

    _creating = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._spare = Spare()
        super().__init__(*args, **kwargs)

    @property
    def lora_slots(self) -> int:
        """None while layers are made: vLLM then allocates no memory for padded slots, only their shapes."""
        return 0 if self._creating else int(self.lora_config.max_loras)

    def prepare(self, segment: MappedSegment, rest: Callable[[], None]) -> Prepared:
        """Matrices per layer at their true rank, or padded where that is asked for."""
        padded = self.lora_config.max_lora_rank if os.environ.get(EXECUTION) == "padded" else 0
        dtype = self.lora_config.lora_dtype
        room, transpose = Room(segment.size_bytes, self._spare), load_transpose()
        sources, prepared = layer_sources(segment, self), {}
        for name, source in sources.items():
            rest()
            slices = self.modules[name].output_slices
            prepared[name] = prepare_layer(source, slices, dtype, padded, room=room, transpose=transpose)
        return prepared

    def fill_piece(self, adapter: PooledAdapter, index: int) -> bool:
        """References are set at once."""
        # vLLM's own dummy adapters for warming up have no prepared form: their slot stays empty.
        prepared: Mapping[str, LayerWeights] = getattr(adapter, "prepared", {})
        for name, weights in prepared.items():
            self.modules[name].punica_wrapper.fill(index, weights)
        return True

    def empty(self, index: int) -> None:
        """Drop the references."""
        for module in self.modules.values():
            module.punica_wrapper.fill(index, None)

    def slot_memory(self) -> Mapping[str, int]:
        """Nothing is padded: allocated and used are the same unless padding was asked for."""
        held = [
            weights
            for module in self.modules.values()
            for weights in module.punica_wrapper.slots
            if weights is not None
        ]
        used = sum(weights.size_bytes for weights in held)
        slot_bytes = sum(
            tensor.element_size() * tensor.shape[-1] * tensor.shape[-2]
            for module in self.modules.values()
            for tensor in (*module.lora_a_stacked, *module.lora_b_stacked)
        )
        return {"allocated_bytes": used, "used_bytes": used, "padded_bytes": slot_bytes * self.lora_slots}

    def _init_punica_wrapper(self, max_num_batched_tokens: int, vllm_config: VllmConfig) -> None:
        super()._init_punica_wrapper(max_num_batched_tokens, vllm_config)
        steps: dict[int, CpuStep] = {}
        for prefix, wrapper in self.punica_wrapper_mapping.items():
            self.punica_wrapper_mapping[prefix] = steps.setdefault(
                id(wrapper), CpuStep(self.lora_config.lora_dtype)
            )

    def _create_lora_modules(self) -> None:
        self._creating = True
        try:
            super()._create_lora_modules()
        finally:
            self._creating = False
        for module in self.modules.values():
            module.set_mapping(LayerExecution(module.punica_wrapper, self.lora_slots))

    def _get_lora_layer_weights(self, *_: Any) -> None:
        """vLLM never copies weights by itself here."""
        return
