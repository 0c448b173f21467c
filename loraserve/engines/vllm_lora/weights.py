"""Finds an adapter's matrices for each LoRA layer of the model vLLM runs, from a mapped segment.

Engine processes only. Nothing here changes the segment: what vLLM's layers need differently is a copy.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from vllm.lora.layers.column_parallel_linear import MergedColumnParallelLinearWithLoRA
from vllm.lora.utils import parse_fine_tuned_lora_name

from loraserve.adapters.safetensors_file import TensorInfo
from loraserve.adapters.segment import MappedSegment, SegmentError

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceSource:
    """One slice of a layer (q of qkv, say): A [rank, in], B [out, rank], and what B·A is multiplied by."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """The slice's true rank."""
        return int(self.a.shape[0])


LayerSource = tuple[SliceSource | None, ...]
"""A layer's slices in their order; None where the adapter leaves the slice alone."""


def layer_sources(segment: MappedSegment, manager: Any) -> Mapping[str, LayerSource]:
    """The slices of every layer that the adapter changes, by the layer's name in vLLM.

    Tensors lie in the segment where that is possible, cut to this worker's part under tensor parallelism.
    SegmentError for a module that no layer takes, or a shape that does not fit its layer.
    """
    model = manager.model
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    renames = mapper.get_rename_mapper() if mapper is not None else None
    found: dict[str, SliceSource] = {}
    for module, place in segment.modules.items():
        name, _ = parse_fine_tuned_lora_name(f"base_model.model.{module}.lora_A.weight", renames)
        found[name] = SliceSource(a=_view(segment, place.a), b=_view(segment, place.b), scaling=place.scaling)
    sources: dict[str, LayerSource] = {}
    for name, layer in manager.modules.items():
        members = manager.packed_modules.get(name, [name])
        parts = [found.pop(member, None) for member in members]
        if any(part is not None for part in parts):
            sources[name] = _fitted(name, layer, parts)
    if found:
        raise SegmentError(f"module {min(found)}: this engine has no LoRA layer for it")
    return sources


def _view(segment: MappedSegment, tensor: TensorInfo) -> torch.Tensor:
    dtype = _DTYPES[tensor.dtype]
    with warnings.catch_warnings():
        # That it cannot be written is the point.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        flat = torch.frombuffer(
            segment.memory,
            dtype=dtype,
            count=tensor.shape[0] * tensor.shape[1],
            offset=segment.data_start + tensor.begin,
        )
    return flat.view(tensor.shape)


def _fitted(name: str, layer: Any, parts: list[SliceSource | None]) -> LayerSource:
    parts = _split(layer, parts)
    if layer.tp_size > 1:
        parts = _own_part(layer, parts)
    for part, a_slots, b_slots in zip(parts, layer.lora_a_stacked, layer.lora_b_stacked, strict=True):
        if part is None:
            continue
        shape, expected = (part.b.shape[0], part.a.shape[1]), (b_slots.shape[-2], a_slots.shape[-1])
        if shape != expected:
            raise SegmentError(f"module {name}: it changes a {shape} matrix, the layer's is {expected}")
    return tuple(parts)


def _split(layer: Any, parts: list[SliceSource | None]) -> list[SliceSource | None]:
    """One part per slice of the layer, also where the adapter has one module for several slices."""
    if len(parts) == layer.n_slices:
        return parts
    if len(parts) == 1 and parts[0] is not None:
        whole = parts[0]
        pieces = whole.b.split(list(layer.base_layer.output_sizes))
        return [SliceSource(a=whole.a, b=piece, scaling=whole.scaling) for piece in pieces]
    raise SegmentError(f"{len(parts)} modules do not fit the {layer.n_slices} slices of a layer")


def _own_part(layer: Any, parts: list[SliceSource | None]) -> list[SliceSource | None]:
    """What this worker of several holds, as vLLM's layer cuts it."""
    if isinstance(layer, MergedColumnParallelLinearWithLoRA):
        a = layer.slice_lora_a([part.a if part else None for part in parts])
        b = layer.slice_lora_b([part.b if part else None for part in parts])
    else:
        a = [layer.slice_lora_a(part.a) if part else None for part in parts]
        b = [layer.slice_lora_b(part.b) if part else None for part in parts]
    return [
        SliceSource(a=a_s, b=b_s, scaling=part.scaling) if part else None
        for part, a_s, b_s in zip(parts, a, b, strict=True)
    ]
