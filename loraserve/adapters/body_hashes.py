"""The hashes of a segment's body: a fast one and the sha256 of each chunk, and the root over the latter, for
the whole.

Chunks are hashed for themselves, in any order and by several threads, while the bytes come: a body that came
over a fast link is verified when its last chunk is, not a pass of one thread later.
"""

import hashlib
import os
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import xxhash

from loraserve.pace import no_rest

FAST_BYTES = 8
SHA256_BYTES = 32
_MAX_HASHERS = 16
_ROOT = b"LoRAServe: root of a segment's body\n"
_SIZES = struct.Struct(">QQ")


class CorruptError(Exception):
    """Bytes are not what the trusted head says."""


def num_hashers() -> int:
    """How many threads hash beside those that bring bytes: all cores that this process may use but one, up
    to 16."""
    return max(1, min(len(os.sched_getaffinity(0)) - 1, _MAX_HASHERS))


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyHashes:
    """Of all chunks, one after the other, as a head holds them: xxh3_64 (8 bytes each, big endian) and sha256
    (32 bytes each)."""

    fast: bytes
    sha256: bytes


def fast_hash(chunk: Any) -> bytes:
    """A chunk's xxh3_64."""
    return xxhash.xxh3_64_digest(chunk)


def sha256_of(chunk: Any) -> bytes:
    """A chunk's sha256, worked out without the interpreter's lock."""
    return hashlib.sha256(chunk).digest()


def hash_chunks(chunks: Iterable[Any]) -> BodyHashes:
    """Both hashes of all chunks, each of which may be gone when the next one comes."""
    fast, strong = bytearray(), bytearray()
    for chunk in chunks:
        fast += fast_hash(chunk)
        strong += sha256_of(chunk)
    return BodyHashes(fast=bytes(fast), sha256=bytes(strong))


def chunks_of(body: memoryview, chunk_bytes: int) -> Iterator[memoryview]:
    """A body in memory, chunk by chunk."""
    for begin in range(0, len(body), chunk_bytes):
        with body[begin : begin + chunk_bytes] as chunk:
            yield chunk


def root_of(sha256s: bytes, *, body_bytes: int, chunk_bytes: int) -> str:
    """The root over the sha256 of all chunks of a body.

    The tree is exactly two deep, and how the body is cut is hashed with it, so that no other body, and no
    other way to cut it, has the same root as long as sha256 holds.
    """
    return hashlib.sha256(_ROOT + _SIZES.pack(body_bytes, chunk_bytes) + sha256s).hexdigest()


def root_of_body(body: memoryview, chunk_bytes: int) -> str:
    """The root of a body that is in memory."""
    found = hash_chunks(chunks_of(body, chunk_bytes)).sha256
    return root_of(found, body_bytes=len(body), chunk_bytes=chunk_bytes)


class ChunkHasher:
    """Has the chunks of a body hashed while its bytes come.

    One thread brings the bytes: it calls `on_bytes`, and at last `finish` or `stop`. Chunks that are whole
    are hashed in the threads of `pool`, as far as it has some to spare; those that nobody has begun with are
    left to `work` and `finish`, so that all ends well with a busy pool, a closed one, or none. `take` is
    called with a chunk's number and the chunk, in any order and by several threads; it hashes it, keeps no
    view of it, and says what is wrong, '' if nothing is. The pool's threads call `rest` after each.

    Guarantees: once `finish` or `stop` has returned or raised, no thread reads the body. What went wrong in
    whatever thread is raised by `on_bytes` or `finish`.
    """

    def __init__(
        self,
        body: memoryview,
        chunk_bytes: int,
        take: Callable[[int, memoryview], str],
        pool: Executor | None = None,
        rest: Callable[[], None] = no_rest,
    ) -> None:
        self._body = body
        self._body_bytes = len(body)
        self._chunk_bytes = chunk_bytes
        self._take = take
        self._pool = pool
        self._rest = rest
        num_chunks = -(-self._body_bytes // chunk_bytes)
        last_bytes = self._body_bytes - (num_chunks - 1) * chunk_bytes
        self._missing_bytes = [chunk_bytes] * (num_chunks - 1) + [last_bytes]
        self._changed = threading.Condition(threading.Lock())
        self._waiting: deque[int] = deque()
        """Chunks that are whole and that nobody has begun with; what follows is the condition's as well."""
        self._num_begun = 0
        self._num_left = num_chunks
        self._is_over = False
        self._problem = ""
        self._error: BaseException | None = None

    @property
    def has_failed(self) -> bool:
        """Whether bytes are known to be wrong, or could not be hashed."""
        return bool(self._problem) or self._error is not None

    def check(self) -> None:
        """Raise what is known to be wrong."""
        if self._error is not None:
            raise self._error
        if self._problem:
            raise CorruptError(self._problem)

    def on_bytes(self, begin: int, end: int) -> None:
        """These bytes are in place; CorruptError if earlier ones turned out wrong, or these cannot be."""
        self.check()
        if not 0 <= begin <= end <= self._body_bytes:
            raise CorruptError(f"it sent bytes {begin} to {end} of {self._body_bytes}")
        size = self._chunk_bytes
        while begin < end:
            index = begin // size
            part_end = min(end, (index + 1) * size)
            self._missing_bytes[index] -= part_end - begin
            if self._missing_bytes[index] < 0:
                raise CorruptError(f"it sent part of chunk {index} twice")
            if self._missing_bytes[index] == 0:
                self._offer(index)
            begin = part_end

    def work(self) -> bool:
        """Hash one of the chunks that wait, in this thread; False if none does."""
        with self._changed:
            if not self._waiting:
                return False
            index = self._waiting.popleft()
            self._num_begun += 1
        problem, error = "", None
        try:
            begin = index * self._chunk_bytes
            with self._body[begin : begin + self._chunk_bytes] as chunk:
                problem = self._take(index, chunk)
        except BaseException as caught:  # Raised where somebody waits for it, whatever it is.
            error = caught
        self._end(problem, error)
        return True

    def finish(self) -> None:
        """All that will come is in place: hash what is left; CorruptError unless all is sound."""
        while self.work():
            pass
        self._settle()
        self.check()
        if self._num_left:
            raise CorruptError(f"{sum(self._missing_bytes)} of {self._body_bytes} bytes never came")

    def stop(self) -> None:
        """Nobody wants to know any more; safe to call twice, and after `finish`."""
        with self._changed:
            self._waiting.clear()
        self._settle()

    def _offer(self, index: int) -> None:
        with self._changed:
            if self._is_over:
                return
            self._waiting.append(index)
        if self._pool is not None:
            # Closed, or the system has no thread left: `finish` does it.
            with suppress(RuntimeError):
                self._pool.submit(self._help)

    def _help(self) -> bool:
        """As `work`, in a thread of the pool. It rests when the chunk is done with: nobody waits for that."""
        has_worked = self.work()
        if has_worked:
            self._rest()
        return has_worked

    def _end(self, problem: str, error: BaseException | None) -> None:
        with self._changed:
            self._num_begun -= 1
            self._num_left -= 1
            self._problem = self._problem or problem
            self._error = self._error or error
            if self._problem or self._error:
                self._waiting.clear()
            if not self._num_begun:
                self._changed.notify_all()

    def _settle(self) -> None:
        """Wait for the chunks that have been begun with; no other will be."""
        with self._changed:
            self._is_over = True
            self._changed.wait_for(lambda: not self._num_begun)
        self._body = memoryview(b"")


def hash_body(body: memoryview, chunk_bytes: int) -> BodyHashes:
    """Both hashes of all chunks of a body that is in memory, from this thread and others beside."""
    num_chunks = -(-len(body) // chunk_bytes)
    fast, strong = bytearray(num_chunks * FAST_BYTES), bytearray(num_chunks * SHA256_BYTES)

    def keep(index: int, chunk: memoryview) -> str:
        fast[index * FAST_BYTES : (index + 1) * FAST_BYTES] = fast_hash(chunk)
        strong[index * SHA256_BYTES : (index + 1) * SHA256_BYTES] = sha256_of(chunk)
        return ""

    with ThreadPoolExecutor(num_hashers(), "segment-hash") as pool:
        hasher = ChunkHasher(body, chunk_bytes, keep, pool)
        try:
            hasher.on_bytes(0, len(body))
            hasher.finish()
        finally:
            hasher.stop()
    return BodyHashes(fast=bytes(fast), sha256=bytes(strong))
