"""An adapter in shared memory: one sealed memfd that other processes of this user map read-only.

Owns the segment's memory: magic, the head's length, the head, and from the next page on the body, in the
order in which the engine wants it (`segment_head`). The memory is freed when the last descriptor and the last
mapping are gone, so nothing outlives the processes that use it, however they end.

Whoever fills a segment hashes it, once, while its bytes come, and seals it. From then on the kernel keeps
every byte as it is, so the engine's workers check the seals, the size and the head, by its sha256, and do not
hash the body again: that would be what each load waits for.
"""

import contextlib
import fcntl
import hashlib
import mmap
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from loraserve.adapters.body_hashes import BodyHashes, chunks_of, fast_hash, hash_body, root_of_body
from loraserve.adapters.manifest import content_digest
from loraserve.adapters.segment_folder import copy_body, kept_head, open_folder
from loraserve.adapters.segment_head import (
    CHUNK_BYTES,
    MAX_HEAD_BYTES,
    ModuleSegment,
    SegmentError,
    SegmentHead,
    hashed,
)
from loraserve.errors import AdapterRejectedError
from loraserve.pace import no_rest

__all__ = [
    "CHUNK_BYTES",
    "MAX_HEAD_BYTES",
    "AdapterSegment",
    "MappedSegment",
    "ModuleSegment",
    "SegmentError",
    "SegmentHead",
    "SegmentRef",
    "SegmentRegion",
    "SegmentWriter",
    "build_segment",
    "map_segment",
]

_FRONT = struct.Struct("<8sQ")
_MAGIC = b"LoRASeg2"
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentRef:
    """Where a segment is: a descriptor of a process of this machine, and what must be found there."""

    pid: int
    fd: int
    size_bytes: int
    head_sha256: str


class SegmentRegion(NamedTuple):
    """A segment as a transport serves it; the body is at `body_offset` of `fd` as well."""

    head: bytes
    body: memoryview
    fd: int
    body_offset: int


class AdapterSegment:
    """A sealed adapter; `close` gives the memory back once nobody maps it any more."""

    def __init__(self, fd: int, head: bytes, decoded: SegmentHead) -> None:
        self._fd = fd
        self._body: memoryview | None = None
        self.head = head
        self.decoded = decoded
        self.body_offset = _body_offset(head)

    @property
    def fd(self) -> int:
        """The memfd; SegmentError once it is closed."""
        if self._fd < 0:
            raise SegmentError(f"the segment of {self.decoded.name} is closed")
        return self._fd

    @property
    def rank(self) -> int:
        """The adapter's highest rank."""
        return self.decoded.rank

    @property
    def body_bytes(self) -> int:
        """The matrices, and the zeros between them."""
        return self.decoded.body_bytes

    @property
    def size_bytes(self) -> int:
        """All of the memfd."""
        return self.body_offset + self.body_bytes

    @property
    def ref(self) -> SegmentRef:
        """What another process needs to map it, as long as it is open here."""
        return SegmentRef(
            pid=os.getpid(),
            fd=self.fd,
            size_bytes=self.size_bytes,
            head_sha256=hashlib.sha256(self.head).hexdigest(),
        )

    def region(self) -> SegmentRegion:
        """The head and a read-only view of the body, mapped once; views stay good after `close`."""
        if self._body is None:
            mapping = mmap.mmap(self.fd, self.body_bytes, prot=mmap.PROT_READ, offset=self.body_offset)
            self._body = memoryview(mapping)
        return SegmentRegion(self.head, self._body, self.fd, self.body_offset)

    def close(self) -> None:
        """Give the descriptor back; safe to call twice."""
        fd, self._fd = self._fd, -1
        # Who still reads has the same view: it goes with its last reader.
        self._body = None
        if fd >= 0:
            os.close(fd)


class SegmentWriter:
    """Memory for a segment whose bytes are still to come.

    `body` is writable and has exactly the head's body_bytes, zeros at first. Ends with `seal` or `abandon`;
    OSError if there is no memory or no descriptor left, SegmentError if `head` is none. One that has been
    decoded already is taken as it is.
    """

    def __init__(self, head: bytes | SegmentHead) -> None:
        self._decoded = head if isinstance(head, SegmentHead) else SegmentHead.decode(head)
        self._head = head = head.encode() if isinstance(head, SegmentHead) else head
        # The kernel takes 249 bytes, and shows them in /proc.
        name = self._decoded.name.encode("ascii", "replace")[:200].replace(b"\0", b"?").decode()
        offset = _body_offset(head)
        self._fd = os.memfd_create(f"loraserve-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, offset + self._decoded.body_bytes)
            self._mapping = mmap.mmap(self._fd, self._decoded.body_bytes, offset=offset)
        except BaseException:
            os.close(self._fd)
            raise
        self.body = memoryview(self._mapping)

    def seal(self) -> AdapterSegment:
        """Make it final: `body` is gone, and no process can change a byte any more.

        SegmentError, and `abandon` is still due, if somebody has a view of the body or maps it for writing.
        """
        try:
            self.body.release()
            self._mapping.close()
            _write(self._fd, _FRONT.pack(_MAGIC, len(self._head)) + self._head)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
        except (BufferError, OSError, ValueError) as error:
            raise SegmentError(f"{self._decoded.name}: it cannot be sealed: {error}") from error
        fd, self._fd = self._fd, -1
        return AdapterSegment(fd, self._head, self._decoded)

    def seal_as(self, head: SegmentHead) -> AdapterSegment:
        """`seal` with a head that tells the hashes, which could not be known before the bytes were there."""
        raw = head.encode()
        if len(raw) != len(self._head) or head.body_bytes != self._decoded.body_bytes:
            raise SegmentError(f"{head.name}: the head does not fit the one that room was made for")
        self._head, self._decoded = raw, head
        return self.seal()

    def abandon(self) -> None:
        """Give the memory back, once no view of the body is left; safe to call twice, and after `seal`."""
        fd, self._fd = self._fd, -1
        # A transfer that is still on its way out may have one: it must not write into memory of others.
        with contextlib.suppress(BufferError):
            self.body.release()
            self._mapping.close()
        if fd >= 0:
            os.close(fd)


class MappedSegment:
    """A segment as another process sees it: `modules` by their PEFT name, and the bytes."""

    def __init__(self, memory: mmap.mmap, data_start: int, head: SegmentHead) -> None:
        self._memory = memory
        self._head = head
        self.data_start = data_start
        self.rank = head.rank
        self.modules: Mapping[str, ModuleSegment] = {module.name: module for module in head.modules}

    @property
    def size_bytes(self) -> int:
        """All of the mapping."""
        return len(self._memory)

    @property
    def memory(self) -> mmap.mmap:
        """The mapping; offsets of tensors count from `data_start`."""
        return self._memory

    def verify(self) -> None:
        """SegmentError unless the body is what the head says; loading does without (see above)."""
        with memoryview(self._memory) as view, view[self.data_start :] as body:
            found = root_of_body(body, self._head.chunk_bytes)
        if found != self._head.body_sha256:
            raise SegmentError(f"its body hashes to {found[:16]}, expected {self._head.body_sha256[:16]}")


def build_segment(
    directory: Path,
    *,
    name: str,
    digest: str | None,
    max_lora_rank: int,
    rest: Callable[[], None] = no_rest,
) -> AdapterSegment:
    """Lay out a PEFT folder's adapter as a new sealed segment.

    `digest` is the sha256 of the content as the registry knows it, None where nobody does. `rest` is called
    after each piece of the reading.
    AdapterRejectedError, with nothing left behind, if the files are damaged, do not fit each other, exceed
    `max_lora_rank`, or are not that content. Reads the weights once.
    """
    where = f"adapter {name}"
    with open_folder(directory, name=name, where=where, max_lora_rank=max_lora_rank) as folder:
        writer = SegmentWriter(folder.head)
        try:
            found = content_digest(folder.config, copy_body(folder, writer.body, rest))
            if digest not in (None, found):
                raise AdapterRejectedError(
                    f"{where}: its files have sha256 {found[:16]}, not {digest[:16] if digest else ''}"
                )
            return writer.seal_as(_told(folder.head, found, writer.body, kept_head(directory, name=name)))
        except BaseException:
            writer.abandon()
            raise


def _told(head: SegmentHead, digest: str, body: memoryview, kept: SegmentHead | None) -> SegmentHead:
    """The head with its hashes.

    The content has its digest, so a kept head that agrees with all chunks' fast hashes is this body's, and
    their sha256 need not be worked out again. Who writes another one there makes a head that no peer was told
    of.
    """
    if kept is not None:
        fast = b"".join(fast_hash(chunk) for chunk in chunks_of(body, head.chunk_bytes))
        known = BodyHashes(fast=fast, sha256=kept.chunk_sha256s)
        if hashed(head, digest=digest, hashes=known) == kept:
            return kept
    return hashed(head, digest=digest, hashes=hash_body(body, head.chunk_bytes))


def map_segment(ref: SegmentRef) -> MappedSegment:
    """Map another process's segment read-only; SegmentError says what is wrong with it."""
    path = f"/proc/{ref.pid}/fd/{ref.fd}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SegmentError(f"process {ref.pid} has no segment {ref.fd}: {error.strerror}") from error
    try:
        return _map(fd, ref)
    except (ValueError, OSError) as error:
        raise SegmentError(f"segment {ref.fd} of process {ref.pid}: {error}") from error
    finally:
        os.close(fd)


def _map(fd: int, ref: SegmentRef) -> MappedSegment:
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
        raise SegmentError("it is not sealed")
    size_bytes = os.fstat(fd).st_size
    if size_bytes != ref.size_bytes:
        raise SegmentError(f"it has {size_bytes} bytes, expected {ref.size_bytes}")
    front = os.pread(fd, _FRONT.size, 0).ljust(_FRONT.size, b"\0")
    magic, length = _FRONT.unpack(front)
    if magic != _MAGIC:
        raise SegmentError("it holds no adapter")
    if length > min(size_bytes, MAX_HEAD_BYTES):
        raise SegmentError("its head is cut off")
    raw = os.pread(fd, length, _FRONT.size)
    found = hashlib.sha256(raw).hexdigest()
    if found != ref.head_sha256:
        raise SegmentError(f"its head hashes to {found[:16]}, expected {ref.head_sha256[:16]}")
    head, data_start = SegmentHead.decode(raw), _body_offset(raw)
    if data_start + head.body_bytes != size_bytes:
        raise SegmentError(f"it has {size_bytes} bytes, its head says {data_start + head.body_bytes}")
    return MappedSegment(mmap.mmap(fd, size_bytes, prot=mmap.PROT_READ), data_start, head)


def _body_offset(head: bytes) -> int:
    """The first page after the head."""
    return -(-(_FRONT.size + len(head)) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY


def _write(fd: int, data: bytes) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], done)
