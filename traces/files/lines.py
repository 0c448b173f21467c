"""Whole lines of a plain or gzip file, many at a time, in bounded memory whatever the file holds.

Owns no meaning: a line is bytes without its end.
"""

import gzip
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, NamedTuple

from traces.types import TraceError

MAX_LINE_BYTES = 1 << 20
MAX_GZIP_RATIO = 200
"""Traces compress 3 to 40 times; a small file that grows far beyond that is no trace."""
GZIP_RATIO_FROM_BYTES = 1 << 20
"""The ratio is judged from this many decompressed bytes on."""
PARQUET_MAGIC = b"PAR1"

_PIECE_BYTES = 1 << 18
_GZIP_MAGIC = b"\x1f\x8b"
_OTHER_MAGIC = {
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "zstd-compressed",
    b"BZh": "bzip2-compressed",
    b"\xfd7zXZ\x00": "xz-compressed",
    PARQUET_MAGIC: "a Parquet file",
}


class Chunk(NamedTuple):
    """Whole lines, joined by line feeds without a last one; `data` None is one line above
    `MAX_LINE_BYTES`. `line` is the number, from 1, of the first of them."""

    line: int
    data: bytes | None


class _CountingReader:
    """A file that counts the bytes read from it; seeking is left out, so pipes work too.

    It reads in small pieces, so that the count is never far ahead of what was decompressed.
    """

    _COUNTED_BYTES = 8192

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.num_bytes = 0

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(self._COUNTED_BYTES if size < 0 else min(size, self._COUNTED_BYTES))
        self.num_bytes += len(data)
        return data


def magic_of(path: Path) -> bytes:
    """The first four bytes of a file that can be read twice; b"" of any other, such as a pipe."""
    try:
        if not path.is_file():
            return b""
        with path.open("rb") as file:
            return file.read(4)
    except OSError as error:
        raise _unreadable(path, error) from error


def read_chunks(path: Path) -> Iterator[Chunk]:
    """The lines of a file, in order and gap-free.

    TraceError for a file that cannot be read, is damaged, or decompresses beyond all reason; what was
    read before comes out first.
    """
    line = 1
    try:
        with ExitStack() as stack:
            read, packed = _open(path, stack)
            for line, chunk, end_bytes in _whole_lines(read):
                if packed is not None and end_bytes > GZIP_RATIO_FROM_BYTES:
                    _check_ratio(end_bytes, packed.num_bytes, path, line)
                if chunk is not None:
                    yield chunk
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        what = f"the gzip data ends or breaks here ({error}); fetch the file again"
        raise TraceError(what, source=str(path), line=line) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> TraceError:
    return TraceError(f"cannot read the trace: {error.strerror or error}", source=str(path))


def _open(path: Path, stack: ExitStack) -> tuple[Callable[[int], bytes], _CountingReader | None]:
    raw = stack.enter_context(path.open("rb"))
    magic = raw.peek(8)[:8]
    for prefix, kind in _OTHER_MAGIC.items():
        if magic.startswith(prefix):
            what = f"this is {kind}; a trace must be plain text or gzip or Parquet, so unpack or convert it"
            raise TraceError(what, source=str(path))
    if not magic.startswith(_GZIP_MAGIC):
        return raw.read1, None
    counting = _CountingReader(raw)
    unpacked = stack.enter_context(gzip.GzipFile(fileobj=counting, mode="rb"))  # type: ignore[call-overload]
    return unpacked.read1, counting


def _whole_lines(read: Callable[[int], bytes]) -> Iterator[tuple[int, Chunk | None, int]]:
    """`(number of the line that comes next, the lines of one piece, bytes so far)`.

    A line that is too long comes out, as None, as soon as that is known; its rest is read and dropped.
    """
    line, end_bytes, rest, dropping = 1, 0, b"", False
    while piece := read(_PIECE_BYTES):
        end_bytes += len(piece)
        if dropping:
            _, found, piece = piece.partition(b"\n")
            if not found:
                yield line, None, end_bytes
                continue
            line, dropping = line + 1, False
        whole, found, tail = (rest + piece).rpartition(b"\n")
        rest = tail
        if found:
            first = line
            line += whole.count(b"\n") + 1
            yield line, Chunk(first, whole), end_bytes
        else:
            yield line, None, end_bytes
        if len(rest) > MAX_LINE_BYTES:
            rest, dropping = b"", True
            yield line, Chunk(line, None), end_bytes
    if rest:
        yield line + 1, Chunk(line, rest), end_bytes


def _check_ratio(unpacked_bytes: int, packed_bytes: int, path: Path, line: int) -> None:
    if unpacked_bytes > packed_bytes * MAX_GZIP_RATIO:
        what = (
            f"{packed_bytes:,} bytes of gzip grew to over {unpacked_bytes:,}: more than"
            f" {MAX_GZIP_RATIO} times, which no trace does; unpack it first if it is one"
        )
        raise TraceError(what, source=str(path), line=line)
