"""Lays out an adapter's B for the CPU execution: transposed and scaled, in one pass where that is compiled.

Engine processes only.
"""

import ctypes
import os
from collections.abc import Callable
from typing import Any

import torch

from loraserve.engines.vllm_lora.few_rows import LIBRARY

Transpose = Callable[[torch.Tensor, float, torch.Tensor], None]
"""Called with B [out, rank], which may be read-only, the scaling, and where B goes as [rank, out]: it is
multiplied in float32 and rounded once."""

_NAMES = {torch.float32: "float", torch.bfloat16: "bf16"}


def transpose_with_torch(b: torch.Tensor, scaling: float, into: torch.Tensor) -> None:
    """What works for all types, and everywhere."""
    into.copy_((b.float() * scaling).to(into.dtype).t())


def load_transpose() -> Transpose:
    """The fastest way there is: the compiled one (see `few_rows`) for the types it knows."""
    path = os.environ.get(LIBRARY, "")
    try:
        library = ctypes.CDLL(path) if path else None
        functions = {
            (source, target): _function(library, f"transpose_{source_name}_{target_name}")
            for source, source_name in _NAMES.items()
            for target, target_name in _NAMES.items()
            if library is not None
        }
    except (OSError, AttributeError):  # said already, when the kernel beside it was to be loaded
        return transpose_with_torch

    def transpose(b: torch.Tensor, scaling: float, into: torch.Tensor) -> None:
        function = functions.get((b.dtype, into.dtype))
        if function is None or not (b.is_contiguous() and into.is_contiguous()):
            transpose_with_torch(b, scaling, into)
            return
        rows, ranks = b.shape
        if into.shape != (ranks, rows):
            raise ValueError(f"a {(rows, ranks)} matrix does not fit {tuple(into.shape)} transposed")
        function(b.data_ptr(), rows, ranks, scaling, into.data_ptr())

    return transpose


def _function(library: Any, name: str) -> Any:
    function = getattr(library, name)
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p]
    function.restype = None
    return function
