"""Reads safetensors headers without trusting them: every length, offset and shape is checked.

Owns the file format only; knows nothing of adapters or models. Any defect is a SafetensorsError.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

MAX_HEADER_BYTES = 64 * 1024**2
ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
_LENGTH = struct.Struct("<Q")


class SafetensorsError(ValueError):
    """The bytes are not a complete, consistent safetensors file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One tensor; `begin` and `end` are byte offsets into the data part of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """All tensors in the order of their bytes; `data_start` is where the data part begins."""

    tensors: tuple[TensorInfo, ...]
    data_start: int
    metadata: Mapping[str, str]


def read_header(file: BinaryIO, file_bytes: int) -> Header:
    """Read the header at the file's start and check it against the file's size.

    The tensors cover the data part exactly, without gaps or overlaps. The file is left at `data_start`.
    """
    prefix = file.read(_LENGTH.size)
    if len(prefix) < _LENGTH.size:
        raise SafetensorsError(f"truncated: {file_bytes} bytes hold no safetensors header")
    (length,) = _LENGTH.unpack(prefix)
    if length > MAX_HEADER_BYTES:
        raise SafetensorsError(f"not safetensors: its header would be {length} bytes long")
    if _LENGTH.size + length > file_bytes:
        raise SafetensorsError(f"truncated: the header needs {_LENGTH.size + length} of {file_bytes} bytes")
    entries = _parse(file.read(length))
    metadata = _metadata(entries.pop("__metadata__", {}))
    tensors = [_tensor(name, entry) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    _check_layout(tensors, file_bytes - _LENGTH.size - length)
    return Header(tensors=tuple(tensors), data_start=_LENGTH.size + length, metadata=metadata)


def encode_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The length and header of a file that holds name → (dtype, shape) in this order, padded to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return _LENGTH.pack(len(header)) + header


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except SafetensorsError:
        raise
    except (ValueError, RecursionError) as error:
        raise SafetensorsError("not safetensors: its header is not JSON") from error
    if not isinstance(entries, dict):
        raise SafetensorsError("not safetensors: its header is not a JSON object")
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise SafetensorsError("its header names something twice")
    return result


def _metadata(entry: object) -> Mapping[str, str]:
    if isinstance(entry, dict) and all(isinstance(value, str) for value in entry.values()):
        return entry
    raise SafetensorsError("its header's __metadata__ is not a table of strings")


def _tensor(name: str, entry: object) -> TensorInfo:
    if not isinstance(entry, dict):
        raise SafetensorsError(f"tensor {show(name)}: its header entry is not an object")
    dtype, shape, offsets = entry.get("dtype"), _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
        raise SafetensorsError(f"tensor {show(name)}: its header entry lacks a dtype, shape or data_offsets")
    begin, end = offsets
    item_bytes = ITEM_BYTES.get(dtype)
    if end < begin or (item_bytes is not None and end - begin != math.prod(shape) * item_bytes):
        raise SafetensorsError(f"tensor {show(name)}: its data_offsets do not fit its dtype and shape")
    return TensorInfo(name=name, dtype=dtype, shape=shape, begin=begin, end=end)


def _sizes(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, list) or len(value) > 8:
        return None
    sound = all(type(item) is int and 0 <= item < 2**63 for item in value)
    return tuple(value) if sound else None


def _check_layout(tensors: list[TensorInfo], data_bytes: int) -> None:
    end = 0
    for tensor in tensors:
        if tensor.begin != end:
            raise SafetensorsError(f"tensor {show(tensor.name)}: its bytes overlap others or leave a gap")
        end = tensor.end
    if end > data_bytes:
        raise SafetensorsError(f"truncated: its tensors need {end} bytes of data, {data_bytes} are there")
    if end < data_bytes:
        raise SafetensorsError(f"{data_bytes - end} bytes follow the last tensor")


def show(text: str) -> str:
    """A name from an untrusted file, fit for one line of an error message."""
    quoted = ascii(text)
    return quoted if len(quoted) <= 160 else quoted[:157] + "..."
