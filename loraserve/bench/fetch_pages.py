"""Whether a file's pages are in memory, and how to have them read anew from the disk. Linux only."""

import ctypes
import mmap
import os
from pathlib import Path


def drop_pages(path: Path) -> None:
    """Bring the file to the disk and ask the system to forget its pages."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def share_in_memory(path: Path) -> float | None:
    """The share of the file's pages that are in memory, 0 to 1; None where the system does not say."""
    fd = os.open(path, os.O_RDONLY)
    try:
        size_bytes = os.fstat(fd).st_size
        if not size_bytes:
            return 0.0
        # A private mapping: ctypes wants to be able to write.
        with mmap.mmap(fd, size_bytes, access=mmap.ACCESS_COPY) as mapping:
            return _share(mapping, size_bytes)
    finally:
        os.close(fd)


def _share(mapping: mmap.mmap, size_bytes: int) -> float | None:
    mincore = getattr(ctypes.CDLL(None, use_errno=True), "mincore", None)
    if mincore is None:
        return None
    num_pages = -(-size_bytes // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * num_pages)()
    first = ctypes.c_char.from_buffer(mapping)
    try:
        address = ctypes.c_void_p(ctypes.addressof(first))
        if mincore(address, ctypes.c_size_t(size_bytes), found) != 0:
            return None
    finally:
        del first  # or the mapping cannot be closed
    return sum(one & 1 for one in found) / num_pages
