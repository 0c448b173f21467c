"""A disk that takes no more, made of the system's limit on the size of files."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def full_disk(path: Path, *, room_bytes: int | None = None) -> Iterator[None]:
    """No file of this process grows beyond `room_bytes`, by default the size of `path`'s write-ahead log:
    the next write to it fails with a real error of the system."""
    log = path.with_name(f"{path.name}-wal")
    limit = log.stat().st_size if room_bytes is None else room_bytes
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
