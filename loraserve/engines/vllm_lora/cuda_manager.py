"""Slots on NVIDIA GPUs: vLLM's stacked tensors, filled at the adapter's own rank, piece by piece.

Engine processes on CUDA only.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

from vllm.config import VllmConfig

from loraserve.adapters.segment import MappedSegment
from loraserve.engines.vllm_lora.cuda import RankTrueCudaWrapper
from loraserve.engines.vllm_lora.cuda_slots import slot_memory, slot_pieces
from loraserve.engines.vllm_lora.manager import PooledAdapter, PooledModelManager
from loraserve.engines.vllm_lora.pool import Prepared
from loraserve.engines.vllm_lora.weights import layer_sources

PIECE_BYTES = 8 * 1024**2
"""What is written between two steps: half a millisecond of PCIe."""


class CudaModelManager(PooledModelManager):
    """A slot's rank is 0 while it is filled, so that the kernels read nothing of it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._pieces: dict[int, Iterator[int]] = {}
        super().__init__(*args, **kwargs)
        for wrapper in self._wrappers():
            wrapper.warm_up(layer for layer in self.modules.values() if layer.punica_wrapper is wrapper)

    def prepare(self, segment: MappedSegment, rest: Callable[[], None]) -> Prepared:
        """The matrices as they lie in the segment: scaling and dtype change on the way into the slot."""
        return layer_sources(segment, self)

    def fill_piece(self, adapter: PooledAdapter, index: int) -> bool:
        """Queue the copy of the next PIECE_BYTES or so; the slot's rank comes with the last."""
        pieces = self._pieces.get(index)
        if pieces is None:
            # vLLM's own dummy adapters for warming up have no prepared form: their slot holds zeros.
            prepared: Prepared = getattr(adapter, "prepared", {})
            pieces = self._pieces[index] = chain.from_iterable(
                slot_pieces(layer, index, prepared.get(name), PIECE_BYTES, rank=adapter.rank)
                for name, layer in self.modules.items()
            )
        written = 0
        for piece_bytes in pieces:
            written += piece_bytes
            if written >= PIECE_BYTES:
                return False
        del self._pieces[index]
        self._set_rank(index, adapter.rank)
        return True

    def empty(self, index: int) -> None:
        """Nothing of the slot is read any more."""
        self._pieces.pop(index, None)
        self._set_rank(index, 0)

    def slot_memory(self) -> Mapping[str, int]:
        """vLLM allocates all slots at the highest rank: allocated is padded."""
        wrappers = self._wrappers()
        allocated, used = slot_memory(self.modules, wrappers[0].host_ranks if wrappers else [])
        return {"allocated_bytes": allocated, "used_bytes": used, "padded_bytes": allocated}

    def _set_rank(self, index: int, rank: int) -> None:
        for wrapper in self._wrappers():
            wrapper.set_slot_rank(index, rank)

    def _wrappers(self) -> list[RankTrueCudaWrapper]:
        distinct = {id(wrapper): wrapper for wrapper in self.punica_wrapper_mapping.values()}
        return [wrapper for wrapper in distinct.values() if isinstance(wrapper, RankTrueCudaWrapper)]

    def _init_punica_wrapper(self, max_num_batched_tokens: int, vllm_config: VllmConfig) -> None:
        super()._init_punica_wrapper(max_num_batched_tokens, vllm_config)
        ours: dict[int, RankTrueCudaWrapper] = {}
        for prefix, theirs in self.punica_wrapper_mapping.items():
            if id(theirs) not in ours:
                ours[id(theirs)] = RankTrueCudaWrapper(
                    theirs._token_lora_indices.shape[0],
                    theirs._seq_lengths.shape[0],
                    theirs.device,
                    lora_config=self.lora_config,
                )
            self.punica_wrapper_mapping[prefix] = ours[id(theirs)]
