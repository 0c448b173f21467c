"""Checks a body while it comes, in threads beside the one that fetches it."""

from collections.abc import Callable
from concurrent.futures import Executor

from loraserve.adapters.body_hashes import ChunkHasher, fast_hash, sha256_of
from loraserve.adapters.segment import SegmentHead
from loraserve.pace import no_rest


def verifier(
    head: SegmentHead, body: memoryview, pool: Executor | None, rest: Callable[[], None] = no_rest
) -> ChunkHasher:
    """One that compares each chunk with the trusted head, which holds the sha256 of all: the body is the
    head's once every chunk is. The pool's threads call `rest` after each."""

    def compare(index: int, chunk: memoryview) -> str:
        # The fast hash also fetches the chunk into the core's cache, at the memory's own speed. sha256 alone
        # would wait for it line by line, which takes longer than both.
        if fast_hash(chunk) == head.chunk_hash(index) and sha256_of(chunk) == head.chunk_sha256(index):
            return ""
        return f"chunk {index} of {head.num_chunks} is damaged"

    return ChunkHasher(body, head.chunk_bytes, compare, pool, rest)
