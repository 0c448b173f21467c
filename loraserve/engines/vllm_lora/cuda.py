"""Rank-true LoRA execution on NVIDIA GPUs: vLLM's wrapper with our kernels in the place of its own.

Engine processes on CUDA only. Owns the ranks of the slots, on the device and on the host; what a slot holds
is `cuda_slots`, what is computed `cuda_launch`. Layers of experts keep vLLM's kernels.

Not run on a GPU yet. On the CPU the whole path was run through Triton's interpreter, in float16 and with
vLLM's own metadata.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from vllm import envs
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU
from vllm.utils.torch_utils import direct_register_custom_op

from loraserve.engines.vllm_lora import cuda_launch as launch
from loraserve.engines.vllm_lora.cuda_slots import slot_memory, slot_pieces

__all__ = ["RankTrueCudaWrapper", "slot_memory", "slot_pieces"]


def _groups(
    sorted_rows: torch.Tensor,
    group_rows: torch.Tensor,
    group_first: torch.Tensor,
    group_slots: torch.Tensor,
    num_groups: torch.Tensor,
    slot_ranks: torch.Tensor,
) -> launch.Groups:
    return launch.Groups(
        sorted_rows=sorted_rows,
        group_rows=group_rows,
        group_first=group_first,
        group_slots=group_slots,
        num_groups=int(num_groups.item()),
        slot_ranks=slot_ranks,
    )


def _grid_rank(tensor: torch.Tensor, highest_rank: torch.Tensor, max_rank: int) -> int:
    """The rank that a launch must leave room for: the batch's highest, but any once it is captured."""
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        return max_rank
    return int(highest_rank.item())


def _lora_shrink(
    inputs: torch.Tensor,
    weights: list[torch.Tensor],
    buffer: torch.Tensor,
    sorted_rows: torch.Tensor,
    group_rows: torch.Tensor,
    group_first: torch.Tensor,
    group_slots: torch.Tensor,
    no_lora: torch.Tensor,
    num_groups: torch.Tensor,
    slot_ranks: torch.Tensor,
    highest_rank: torch.Tensor,
    scaling: float,
    max_rank: int,
    rank_offset: int,
) -> None:
    if no_lora.item():
        return
    launch.shrink(
        inputs,
        weights,
        buffer,
        _groups(sorted_rows, group_rows, group_first, group_slots, num_groups, slot_ranks),
        highest_rank=_grid_rank(inputs, highest_rank, max_rank),
        scaling=scaling,
        rank_offset=rank_offset,
        one_pass=bool(envs.VLLM_BATCH_INVARIANT),
    )


def _lora_expand(
    buffer: torch.Tensor,
    weights: list[torch.Tensor],
    output: torch.Tensor,
    sorted_rows: torch.Tensor,
    group_rows: torch.Tensor,
    group_first: torch.Tensor,
    group_slots: torch.Tensor,
    no_lora: torch.Tensor,
    num_groups: torch.Tensor,
    slot_ranks: torch.Tensor,
    first_column: int,
    add_inputs: bool,
) -> None:
    if no_lora.item():
        return
    groups = _groups(sorted_rows, group_rows, group_first, group_slots, num_groups, slot_ranks)
    launch.expand(buffer, weights, output, groups, first_column=first_column, add_inputs=add_inputs)


def _lora_product(
    inputs: torch.Tensor,
    a_weights: list[torch.Tensor],
    b_weights: list[torch.Tensor],
    output: torch.Tensor,
    sorted_rows: torch.Tensor,
    group_rows: torch.Tensor,
    group_first: torch.Tensor,
    group_slots: torch.Tensor,
    no_lora: torch.Tensor,
    num_groups: torch.Tensor,
    slot_ranks: torch.Tensor,
    highest_rank: torch.Tensor,
    scaling: float,
    add_inputs: bool,
) -> None:
    """Shrink and expand in one operator: the buffer between them need not be wider than the batch's rank."""
    if no_lora.item():
        return
    launch.product(
        inputs,
        a_weights,
        b_weights,
        output,
        _groups(sorted_rows, group_rows, group_first, group_slots, num_groups, slot_ranks),
        highest_rank=_grid_rank(inputs, highest_rank, b_weights[0].shape[-1]),
        scaling=scaling,
        add_inputs=add_inputs,
        one_pass=bool(envs.VLLM_BATCH_INVARIANT),
    )


def _fake(*_: Any) -> None:
    """All three operators write in place and return nothing."""


def _register_operators() -> None:
    """Make the operators known to torch, which then neither traces nor reorders what is inside."""
    if hasattr(torch.ops.vllm, "loraserve_product"):
        return
    for name, function, written in (
        ("loraserve_shrink", _lora_shrink, "buffer"),
        ("loraserve_expand", _lora_expand, "output"),
        ("loraserve_product", _lora_product, "output"),
    ):
        direct_register_custom_op(name, function, mutates_args=[written], fake_impl=_fake)


class RankTrueCudaWrapper(PunicaWrapperGPU):  # type: ignore[misc]
    """Computes each row at the rank of its own adapter; the interface is vLLM's.

    A slot's rank is 0 until `set_slot_rank`; rows that use such a slot are left as the base model made them.
    """

    def __init__(
        self,
        max_num_batched_tokens: int,
        max_batches: int,
        device: torch.device | str,
        *,
        lora_config: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, lora_config=lora_config, **kwargs)
        _register_operators()
        self.slot_ranks = torch.zeros(self.max_loras, dtype=torch.int32, device=device)
        self.host_ranks = [0] * self.max_loras
        # A tensor, as vLLM's own metadata: torch.compile would take a number for a constant.
        self._highest_rank = torch.zeros(1, dtype=torch.int32)
        self._batch_slots: Sequence[int] = ()

    def set_slot_rank(self, slot: int, rank: int) -> None:
        """Say which rank the kernels compute for the slot from the next launch on; 0 for an empty one.

        The rank is the highest that the adapter has in any layer. Queued on the current stream.
        """
        if not 0 <= rank <= self.lora_config.max_lora_rank:
            raise ValueError(f"rank {rank}: slots hold ranks from 0 to {self.lora_config.max_lora_rank}")
        self.host_ranks[slot] = rank
        # The value travels with the launch: no host memory that a later call could change under the copy.
        self.slot_ranks[slot : slot + 1].fill_(rank)
        self._find_highest_rank()

    def warm_up(self, layers: Iterable[Any]) -> None:
        """Compile the kernels for these LoRA layers: a first request would wait seconds for that."""
        for layer in layers:
            launch.compile_for(
                layer.lora_a_stacked, layer.lora_b_stacked, one_pass=bool(envs.VLLM_BATCH_INVARIANT)
            )

    def update_metadata(
        self,
        mapping: Any,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        """As vLLM's; also notes which slots the batch uses."""
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        used = set(mapping.index_mapping) | set(mapping.prompt_mapping)
        self._batch_slots = [slot for slot, lora_id in enumerate(lora_index_to_id) if lora_id in used]
        self._find_highest_rank()

    def _find_highest_rank(self) -> None:
        self._highest_rank[0] = max((self.host_ranks[slot] for slot in self._batch_slots), default=0)

    def _groups(self, meta: Any, num_rows: int) -> tuple[torch.Tensor, ...]:
        # The first tensor maps rows to slots, which the sorted rows say already.
        _, *rest = meta.meta_args(num_rows, self.lora_config.specialize_active_lora)
        return (*rest, self.slot_ranks)

    def add_shrink(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        """y[slice, row, :rank] = x[row] @ A.T * scale; y is float32 [slices, rows, rank rows of A]."""
        x = x.view(-1, x.shape[-1])
        max_rank, shard = self.lora_config.max_lora_rank, lora_a_stacked[0].shape[-2]
        torch.ops.vllm.loraserve_shrink(
            x,
            list(lora_a_stacked),
            y,
            *self._groups(self.token_mapping_meta, x.shape[0]),
            self._highest_rank,
            scale,
            max_rank,
            _first_rank_row(shard) if shard < max_rank else 0,
        )

    def add_expand(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_b_stacked: tuple[torch.Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """y[row, slice] += x[slice, row, :rank] @ B.T, or = without `add_inputs`."""
        torch.ops.vllm.loraserve_expand(
            x,
            list(lora_b_stacked),
            y.view(-1, y.shape[-1]),
            *self._groups(self.token_mapping_meta, x.shape[1]),
            offset_start,
            add_inputs,
        )

    def add_lora_embedding(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """y += x @ B.T, where x holds the rows of the embedding's A."""
        self.add_expand(y, x.unsqueeze(0), (lora_b_stacked,), (y.shape[-1],), add_inputs=add_inputs)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: torch.Tensor | None = None,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """y += x @ A.T @ B.T * scale for each slice, or = without `add_inputs` (base on another stream)."""
        groups = self._groups(self.token_mapping_meta, x.shape[0])
        self._product(y, x, lora_a_stacked, lora_b_stacked, scale, groups, add_inputs)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """y += x @ A.T @ B.T * scale, one row per sampled token."""
        x = x.view(-1, x.shape[-1])
        groups = self._groups(self.prompt_mapping_meta, x.shape[0])
        self._product(y, x, (lora_a_stacked,), (lora_b_stacked,), scale, groups, True)

    def _product(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        a_stacked: tuple[torch.Tensor, ...],
        b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        groups: tuple[torch.Tensor, ...],
        add_inputs: bool,
    ) -> None:
        torch.ops.vllm.loraserve_product(
            x,
            list(a_stacked),
            list(b_stacked),
            y.view(-1, y.shape[-1]),
            *groups,
            self._highest_rank,
            scale,
            add_inputs,
        )


def _first_rank_row(shard: int) -> int:
    """Where this worker's rows of A begin when A is split by rank (vLLM's `fully_sharded_loras`)."""
    from vllm.distributed import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank()) * shard
