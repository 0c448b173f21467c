"""Small files that a workload names: weights and adapters, in bounded memory."""

from pathlib import Path

from traces.types import TraceError

MAX_FILE_BYTES = 64 * 2**20


def read_small(path: str) -> bytes:
    """All of a regular file of at most 64 MiB; TraceError names what is wrong."""
    file = Path(path)
    try:
        if not file.is_file():
            raise TraceError("is no file" if file.exists() else "is not there", source=path)
        with file.open("rb") as opened:
            content = opened.read(MAX_FILE_BYTES + 1)
    except TraceError:
        raise
    except OSError as error:
        raise TraceError(f"cannot be read: {error.strerror}", source=path) from error
    except ValueError as error:
        raise TraceError(f"is no file name: {error}", source=path[:80]) from error
    if len(content) > MAX_FILE_BYTES:
        raise TraceError(f"has more than {MAX_FILE_BYTES:,} bytes", source=path)
    return content
