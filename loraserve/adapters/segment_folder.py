"""Reads PEFT folders as segments: the body's bytes in their order, and the head that belongs to them.

Also the head that a store keeps beside an adapter's files (`segment.head`), so that nobody has to read the
weights to know it.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loraserve.adapters.body_hashes import hash_chunks
from loraserve.adapters.files import WEIGHTS_FILE, open_member
from loraserve.adapters.manifest import DEFAULT_MAX_BYTES, read_config
from loraserve.adapters.peft_config import parse_peft_config
from loraserve.adapters.safetensors_file import (
    MAX_HEADER_BYTES,
    Header,
    SafetensorsError,
    TensorInfo,
    read_header,
)
from loraserve.adapters.segment_head import (
    CHUNK_BYTES,
    MAX_HEAD_BYTES,
    SegmentError,
    SegmentHead,
    hashed,
    plan_head,
)
from loraserve.adapters.tensors import check_tensors
from loraserve.errors import AdapterRejectedError
from loraserve.pace import no_rest

SEGMENT_FILE = "segment.head"
_SLICE_BYTES = 256 * 1024
"""What was read is hashed while it is still in the core's cache: sha256 is slow to fetch memory."""
_SHA256_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenFolder:
    """A checked folder whose weights are open; `head` has no hashes yet."""

    where: str
    config: bytes
    fd: int
    header: Header
    head: SegmentHead


@contextmanager
def open_folder(directory: Path, *, name: str, where: str, max_lora_rank: int) -> Iterator[OpenFolder]:
    """Check a folder's config and tensors against each other; AdapterRejectedError says what is wrong."""
    config_bytes = read_config(directory, where)
    config = parse_peft_config(config_bytes, where)
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
        try:
            head = plan_head(header.tensors, scalings, name=name)
        except SegmentError as error:
            raise AdapterRejectedError(f"{where}: {error}") from error
        yield OpenFolder(where=where, config=config_bytes, fd=file.fileno(), header=header, head=head)


def copy_body(folder: OpenFolder, body: memoryview, rest: Callable[[], None] = no_rest) -> bytes:
    """Read the weights into the body's order, once, in the file's order; the file's sha256.

    `rest` is called after each piece.
    """
    digest = hashlib.sha256()
    prefix = bytearray(folder.header.data_start)
    _read(folder, memoryview(prefix), 0)
    digest.update(prefix)
    places = {tensor.name: tensor.begin for tensor in folder.head.tensors}
    for tensor in folder.header.tensors:
        shift = places[tensor.name] - tensor.begin
        for begin in range(tensor.begin, tensor.end, _SLICE_BYTES):
            end = min(begin + _SLICE_BYTES, tensor.end)
            with body[begin + shift : end + shift] as part:
                _read(folder, part, folder.header.data_start + begin)
                digest.update(part)
            rest()
    return digest.digest()


def head_of_folder(directory: Path, *, digest: str, where: str, max_lora_rank: int) -> SegmentHead:
    """The head that `build_segment` makes of a folder with this content, whose name is the digest itself.

    Memory stays bounded whatever the weights' size. AdapterRejectedError as there.
    """
    with open_folder(directory, name=digest, where=where, max_lora_rank=max_lora_rank) as folder:
        return hashed(folder.head, digest=digest, hashes=hash_chunks(_chunks(folder)))


def kept_form(head: SegmentHead) -> bytes:
    """What `SEGMENT_FILE` holds: the head, and its sha256 before it, for a disk may forget."""
    raw = replace(head, name=head.digest).encode()
    return hashlib.sha256(raw).digest() + raw


def kept_head(directory: Path, *, name: str) -> SegmentHead | None:
    """The head that the folder's `SEGMENT_FILE` holds, under this name; None without a sound one."""
    max_bytes = _SHA256_BYTES + MAX_HEAD_BYTES
    try:
        with open_member(directory, SEGMENT_FILE, max_bytes=max_bytes, where=str(directory)) as (file, _):
            content = file.read(max_bytes)
    except (AdapterRejectedError, OSError):
        return None
    checksum, raw = content[:_SHA256_BYTES], content[_SHA256_BYTES:]
    if hashlib.sha256(raw).digest() != checksum:
        return None
    try:
        return replace(SegmentHead.decode(raw), name=name)
    except SegmentError:
        return None


def _chunks(folder: OpenFolder) -> Iterator[memoryview]:
    """The body that the folder gives, chunk by chunk, each in the same memory."""
    sources = {tensor.name: tensor for tensor in folder.header.tensors}
    tensors, body_bytes = folder.head.tensors, folder.head.body_bytes
    memory = memoryview(bytearray(CHUNK_BYTES))
    index = 0
    for first in range(0, body_bytes, CHUNK_BYTES):
        last = min(first + CHUNK_BYTES, body_bytes)
        memory[:] = bytes(CHUNK_BYTES)
        while index < len(tensors) and tensors[index].begin < last:
            _read_part(folder, sources[tensors[index].name], tensors[index], memory, first, last)
            if tensors[index].end > last:
                break
            index += 1
        yield memory[: last - first]


def _read_part(
    folder: OpenFolder, source: TensorInfo, placed: TensorInfo, memory: memoryview, first: int, last: int
) -> None:
    """Read what a tensor has in the body's bytes from `first` to `last`."""
    begin, end = max(placed.begin, first), min(placed.end, last)
    offset = folder.header.data_start + source.begin + begin - placed.begin
    _read(folder, memory[begin - first : end - first], offset)


def _read(folder: OpenFolder, into: Any, offset: int) -> None:
    """Fill `into` with the file's bytes at `offset`."""
    done = 0
    while done < len(into):
        read = os.preadv(folder.fd, [into[done:]], offset + done)
        if not read:
            raise AdapterRejectedError(f"{folder.where}: {WEIGHTS_FILE} was cut off while it was read")
        done += read
