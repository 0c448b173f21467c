"""Memory for an adapter's prepared matrices, used again when it has left. Engine processes only."""

import contextlib
import ctypes
import mmap
import threading
import weakref
from collections import deque
from math import prod
from typing import Any

import torch

_BLOCK_BYTES = 8 * 1024**2
_LARGE_FROM_BYTES = _BLOCK_BYTES
_ALIGN_BYTES = 64
_MAX_SPARE_BYTES = 128 * 1024**2


class Spare:
    """Blocks that nobody uses, up to 128 MiB, the one that was used last to be used first.

    Touching new memory takes longer than copying an adapter into it, most of all on a virtual machine that
    gives what it does not use back to its host.
    """

    def __init__(self) -> None:
        self._blocks: deque[mmap.mmap] = deque()
        # A block may come back in the middle of anything, when the garbage collector runs.
        self._lock = threading.RLock()

    @property
    def size_bytes(self) -> int:
        """What is kept."""
        return sum(map(len, tuple(self._blocks)))

    def take(self, size_bytes: int) -> mmap.mmap | None:
        """A block of exactly this size, with what its last user left in it."""
        with self._lock:
            for block in reversed(tuple(self._blocks)):
                if len(block) == size_bytes:
                    self._blocks.remove(block)
                    return block
        return None

    def keep(self, block: mmap.mmap) -> None:
        """Nobody uses it any more; the oldest go if that are too many."""
        with self._lock:
            self._blocks.append(block)
            while self.size_bytes > _MAX_SPARE_BYTES:
                self._blocks.popleft()


class Room:
    """Memory, given out matrix by matrix; it is free when the last matrix in it is gone.

    `about_bytes` is what will be needed, more or less. For much, memory of those who left is used, and large
    pages are asked for; for little, both would waste more than they save.
    """

    def __init__(self, about_bytes: int, spare: Spare | None = None) -> None:
        self._spare = (spare or Spare()) if about_bytes >= _LARGE_FROM_BYTES else None
        self._block_bytes = -(-about_bytes // _BLOCK_BYTES) * _BLOCK_BYTES or _BLOCK_BYTES
        self._memory: Any = b""
        self._is_used = False
        self._taken_bytes = 0

    def take(self, *shape: int, dtype: torch.dtype, zeroed: bool = True) -> torch.Tensor:
        """A matrix of zeros; of anything at all if it need not be `zeroed`."""
        count = prod(shape)
        size_bytes = count * dtype.itemsize
        begin = -(-self._taken_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
        if begin + size_bytes > len(self._memory):
            self._new_block(max(self._block_bytes, size_bytes))
            begin = 0
        self._taken_bytes = begin + size_bytes
        taken = torch.frombuffer(self._memory, dtype=dtype, count=count, offset=begin).view(shape)
        return taken.zero_() if self._is_used and zeroed else taken

    def _new_block(self, size_bytes: int) -> None:
        block = self._spare.take(size_bytes) if self._spare is not None else None
        self._is_used = block is not None
        if block is None:
            block = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if self._spare is not None:
                with contextlib.suppress(OSError, AttributeError):  # a kernel without large pages
                    block.madvise(mmap.MADV_HUGEPAGE)
        # Every matrix refers to this, and to the block through it alone.
        self._memory = (ctypes.c_char * size_bytes).from_buffer(block)
        if self._spare is not None:
            weakref.finalize(self._memory, self._spare.keep, block).atexit = False
