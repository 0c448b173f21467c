"""Checks a body while it comes, in threads beside the one that fetches it."""

from concurrent.futures import Executor

from loraserve.adapters.body_hashes import ChunkHasher
from loraserve.adapters.segment import SegmentHead


def verifier(head: SegmentHead, body: memoryview, pool: Executor | None) -> ChunkHasher:
    """One that compares each chunk's hash with the trusted head's. The head holds the hashes of all chunks,
    so the body is the head's once every chunk is."""

    def compare(index: int, found: bytes) -> str:
        if found == head.chunk_hash(index):
            return ""
        return f"chunk {index} of {head.num_chunks} is damaged"

    return ChunkHasher(body, head.chunk_bytes, compare, pool)
