"""An adapter in shared memory: one sealed memfd that other processes of this user map read-only.

Owns the segment's layout: magic, the length of a JSON header, the header, and the weights file's own bytes,
placed so that tensors are aligned. The memory is freed when the last descriptor and the last mapping are
gone, so nothing outlives the processes that use it, however they end.
"""

import fcntl
import hashlib
import json
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraserve.adapters.files import WEIGHTS_FILE, open_member
from loraserve.adapters.manifest import DEFAULT_MAX_BYTES, read_config
from loraserve.adapters.peft_config import PeftConfig, parse_peft_config
from loraserve.adapters.safetensors_file import (
    MAX_HEADER_BYTES,
    Header,
    SafetensorsError,
    TensorInfo,
    read_header,
)
from loraserve.adapters.tensors import check_tensors
from loraserve.errors import AdapterRejectedError

_MAGIC = b"LoRASeg1"
_LENGTH = struct.Struct("<Q")
_ALIGN_BYTES = 64
_SLICE_BYTES = 4 * 1024**2
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SegmentError(ValueError):
    """A segment is not there, not sealed, or not what its reference says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentRef:
    """Where a segment is: a descriptor of a process of this machine, and what must be found there."""

    pid: int
    fd: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleSegment:
    """One module of an adapter: its tensors' places, its rank, and what B·A is multiplied by."""

    a: TensorInfo
    b: TensorInfo
    scaling: float

    @property
    def rank(self) -> int:
        """The module's true rank."""
        return self.a.shape[0]


class AdapterSegment:
    """A published adapter; `close` gives the memory back once nobody maps it any more."""

    def __init__(self, fd: int, ref: SegmentRef, rank: int) -> None:
        self._fd = fd
        self.ref = ref
        self.rank = rank

    def close(self) -> None:
        """Give the descriptor back; safe to call twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class MappedSegment:
    """A segment as another process sees it: `modules` by their PEFT name, and the bytes."""

    def __init__(self, memory: mmap.mmap, weights_start: int, sha256: str, tree: Mapping[str, Any]) -> None:
        self._memory = memory
        self._weights_start = weights_start
        self._sha256 = sha256
        self.rank = int(tree["rank"])
        header = _weights_header(memory, weights_start)
        self.data_start = header.data_start + weights_start
        self.modules = _modules(header, tree["scalings"])

    @property
    def size_bytes(self) -> int:
        """All of the mapping."""
        return len(self._memory)

    @property
    def memory(self) -> mmap.mmap:
        """The mapping; offsets of tensors count from `data_start`."""
        return self._memory

    def verify(self) -> None:
        """SegmentError unless the weights are those that were published."""
        with memoryview(self._memory) as view, view[self._weights_start :] as weights:
            found = hashlib.sha256(weights).hexdigest()
        if found != self._sha256:
            raise SegmentError(f"its weights hash to {found[:16]}, expected {self._sha256[:16]}")


def publish(directory: Path, *, name: str, max_lora_rank: int) -> AdapterSegment:
    """Copy an adapter folder's weights into a new sealed segment.

    AdapterRejectedError, with nothing left behind, if its files are damaged, do not fit each other or exceed
    `max_lora_rank`. Reads the weights once.
    """
    where = f"adapter {name}"
    raw = read_config(directory, where)
    config = parse_peft_config(raw, where)
    fd = os.memfd_create(f"loraserve-{name}"[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        return _fill(fd, directory, config, where, max_lora_rank)
    except BaseException:
        os.close(fd)
        raise


def map_segment(ref: SegmentRef) -> MappedSegment:
    """Map another process's segment read-only; SegmentError says what is wrong with it."""
    path = f"/proc/{ref.pid}/fd/{ref.fd}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SegmentError(f"process {ref.pid} has no segment {ref.fd}: {error.strerror}") from error
    try:
        return _map(fd, ref)
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, OSError) as error:
        raise SegmentError(f"segment {ref.fd} of process {ref.pid}: {error}") from error
    finally:
        os.close(fd)


def _map(fd: int, ref: SegmentRef) -> MappedSegment:
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
        raise SegmentError("it is not sealed")
    size_bytes = os.fstat(fd).st_size
    if size_bytes != ref.size_bytes:
        raise SegmentError(f"it has {size_bytes} bytes, expected {ref.size_bytes}")
    memory = mmap.mmap(fd, size_bytes, prot=mmap.PROT_READ)
    if memory[: len(_MAGIC)] != _MAGIC:
        raise SegmentError("it holds no adapter")
    begin = len(_MAGIC) + _LENGTH.size
    length = _LENGTH.unpack_from(memory, len(_MAGIC))[0] if size_bytes >= begin else size_bytes
    if length > size_bytes - begin:
        raise SegmentError("its header is cut off")
    return MappedSegment(memory, begin + length, ref.sha256, json.loads(memory[begin : begin + length]))


def _fill(fd: int, directory: Path, config: PeftConfig, where: str, max_lora_rank: int) -> AdapterSegment:
    max_bytes = DEFAULT_MAX_BYTES + MAX_HEADER_BYTES
    with open_member(directory, WEIGHTS_FILE, max_bytes=max_bytes, where=where) as (file, file_bytes):
        try:
            header = read_header(file, file_bytes)
        except SafetensorsError as error:
            raise AdapterRejectedError(f"{where}: {WEIGHTS_FILE}: {error}") from error
        ranks = check_tensors(header.tensors, config=config, base=None, where=where)
        rank = max(ranks.values())
        if rank > max_lora_rank:
            raise AdapterRejectedError(
                f"{where}: its rank {rank} is above engine.max_lora_rank {max_lora_rank}"
            )
        scalings = {module: config.scaling_of(module) for module in ranks}
        _write(fd, _front({"rank": rank, "scalings": scalings}, header.data_start))
        file.seek(0)
        digest = hashlib.sha256()
        left = file_bytes
        while left:
            piece = file.read(min(_SLICE_BYTES, left))
            if not piece:
                raise AdapterRejectedError(f"{where}: {WEIGHTS_FILE} was cut off while it was read")
            digest.update(piece)
            _write(fd, piece)
            left -= len(piece)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    size_bytes = os.fstat(fd).st_size
    ref = SegmentRef(pid=os.getpid(), fd=fd, size_bytes=size_bytes, sha256=digest.hexdigest())
    return AdapterSegment(fd, ref, rank)


def _front(tree: Mapping[str, Any], data_start: int) -> bytes:
    """Magic, length and header, padded so that the tensors' data are aligned."""
    text = json.dumps(tree, separators=(",", ":")).encode()
    begin = len(_MAGIC) + _LENGTH.size
    text += b" " * (-(begin + len(text) + data_start) % _ALIGN_BYTES)
    return _MAGIC + _LENGTH.pack(len(text)) + text


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _weights_header(memory: mmap.mmap, weights_start: int) -> Header:
    memory.seek(weights_start)
    # A mapping reads like a file.
    return read_header(memory, len(memory) - weights_start)  # type: ignore[arg-type]


def _modules(header: Header, scalings: Mapping[str, float]) -> Mapping[str, ModuleSegment]:
    tensors = {tensor.name: tensor for tensor in header.tensors}
    prefix = "base_model.model."
    return {
        module: ModuleSegment(
            a=tensors[f"{prefix}{module}.lora_A.weight"],
            b=tensors[f"{prefix}{module}.lora_B.weight"],
            scaling=float(scaling),
        )
        for module, scaling in scalings.items()
    }
