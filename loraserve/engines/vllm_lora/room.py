"""Memory for an adapter's prepared matrices. Engine processes only."""

import contextlib
import mmap
from math import prod

import torch

_BLOCK_BYTES = 32 * 1024**2
"""What is not touched takes no memory."""
_LARGE_FROM_BYTES = 8 * 1024**2
_ALIGN_BYTES = 64


class Room:
    """Fresh zeroed memory, given out matrix by matrix; a block of it goes with the last matrix in it.

    `about_bytes` is what will be needed, more or less. For much, large pages are asked for: with small ones
    the faults of touching it first take longer than copying the matrices. For little, they would waste more
    than they save.
    """

    def __init__(self, about_bytes: int) -> None:
        self._is_large = about_bytes >= _LARGE_FROM_BYTES
        self._block: mmap.mmap | None = None
        self._taken_bytes = 0

    def take(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Zeros of this shape."""
        count = prod(shape)
        size_bytes = count * dtype.itemsize
        begin = -(-self._taken_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
        if self._block is None or begin + size_bytes > len(self._block):
            self._block, begin = self._new_block(size_bytes), 0
        self._taken_bytes = begin + size_bytes
        return torch.frombuffer(self._block, dtype=dtype, count=count, offset=begin).view(shape)

    def _new_block(self, least_bytes: int) -> mmap.mmap:
        block = mmap.mmap(-1, max(_BLOCK_BYTES, least_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if self._is_large:
            with contextlib.suppress(OSError, AttributeError):  # a kernel without them
                block.madvise(mmap.MADV_HUGEPAGE)
        return block
