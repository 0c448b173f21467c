"""Checks a body while it comes, in a thread beside the one that fetches it."""

import hashlib
from queue import SimpleQueue

import xxhash

from loraserve.adapters.segment import SegmentHead


class CorruptError(Exception):
    """What a peer sent is not what the trusted head says."""


class Verifier:
    """Hashes each chunk as it is complete, and the whole in its order.

    `on_bytes` is called by the fetching thread, `run` by the verifying one. `finish` or `stop` ends `run`;
    once it has returned, no view of the body is left.
    """

    def __init__(self, head: SegmentHead, body: memoryview) -> None:
        self._head = head
        self._body = body
        last_bytes = head.body_bytes - (head.num_chunks - 1) * head.chunk_bytes
        self._missing_bytes = [head.chunk_bytes] * (head.num_chunks - 1) + [last_bytes]
        self._complete: SimpleQueue[int | None] = SimpleQueue()
        self._whole = hashlib.sha256()
        self._is_hashed = [False] * head.num_chunks
        self._num_in_order = 0
        self._is_stopped = False
        self.problem = ""
        """What is wrong with the bytes so far; '' if nothing is."""

    def on_bytes(self, begin: int, end: int) -> None:
        """These bytes are in place; CorruptError if earlier ones turned out wrong, or these cannot be."""
        if self.problem:
            raise CorruptError(self.problem)
        if not 0 <= begin <= end <= self._head.body_bytes:
            raise CorruptError(f"it sent bytes {begin} to {end} of {self._head.body_bytes}")
        size = self._head.chunk_bytes
        while begin < end:
            index = begin // size
            part_end = min(end, (index + 1) * size)
            self._missing_bytes[index] -= part_end - begin
            if self._missing_bytes[index] < 0:
                raise CorruptError(f"it sent part of chunk {index} twice")
            if self._missing_bytes[index] == 0:
                self._complete.put(index)
            begin = part_end

    def finish(self) -> None:
        """All bytes are in place: check what is left."""
        self._complete.put(None)

    def stop(self) -> None:
        """Nobody wants to know any more."""
        self._is_stopped = True
        self._complete.put(None)

    def run(self) -> None:
        """Check until `finish` or `stop`; what is wrong is in `problem`."""
        while not self._is_stopped and (index := self._complete.get()) is not None:
            if not self.problem:
                self._check(index)
        if self.problem or self._is_stopped:
            return
        if self._num_in_order != self._head.num_chunks:
            missing = sum(self._missing_bytes)
            self.problem = f"{missing} of {self._head.body_bytes} bytes never came"
        elif (found := self._whole.hexdigest()) != self._head.body_sha256:
            self.problem = f"its body hashes to {found[:16]}, expected {self._head.body_sha256[:16]}"

    def _check(self, index: int) -> None:
        with self._chunk(index) as chunk:
            if xxhash.xxh3_64_digest(chunk) != self._head.chunk_hash(index):
                self.problem = f"chunk {index} of {self._head.num_chunks} is damaged"
                return
        self._is_hashed[index] = True
        while self._num_in_order < self._head.num_chunks and self._is_hashed[self._num_in_order]:
            if self._is_stopped:
                return
            with self._chunk(self._num_in_order) as chunk:
                self._whole.update(chunk)
            self._num_in_order += 1

    def _chunk(self, index: int) -> memoryview:
        begin = index * self._head.chunk_bytes
        return self._body[begin : begin + self._head.chunk_bytes]
