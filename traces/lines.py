"""Lines of a plain or gzip file, in bounded memory whatever the file holds.

Owns no meaning: a line is bytes without its end.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from traces.types import TraceError

MAX_LINE_BYTES = 1 << 20
MAX_GZIP_RATIO = 200
"""Traces compress 3 to 40 times; a small file that grows far beyond that is no trace."""
GZIP_RATIO_FROM_BYTES = 1 << 20
"""The ratio is judged from this many decompressed bytes on."""

_GZIP_MAGIC = b"\x1f\x8b"
_OTHER_MAGIC = {
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "zstd-compressed",
    b"BZh": "bzip2-compressed",
    b"\xfd7zXZ\x00": "xz-compressed",
    b"PAR1": "a Parquet file",
}


class _CountingReader:
    """A file that counts the bytes read from it; seeking is left out, so pipes work too.

    It reads in small pieces, so that the count is never far ahead of what was decompressed.
    """

    _PIECE_BYTES = 8192

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.num_bytes = 0

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(self._PIECE_BYTES if size < 0 else min(size, self._PIECE_BYTES))
        self.num_bytes += len(data)
        return data


def read_lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """`(line number from 1, bytes)` of each line that is not empty; None for one above `MAX_LINE_BYTES`.

    TraceError for a file that cannot be read, is damaged, or decompresses beyond all reason.
    """
    line = 0  # the last one that was whole
    try:
        with ExitStack() as stack:
            file, compressed = _open(path, stack)
            for line, text, end_bytes in _split(file):
                if compressed is not None and end_bytes > GZIP_RATIO_FROM_BYTES:
                    _check_ratio(end_bytes, compressed.num_bytes, path, line)
                if text is not _INSIDE and text != b"":
                    yield line, text
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        what = f"the gzip data ends or breaks here ({error}); fetch the file again"
        raise TraceError(what, source=str(path), line=line + 1) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise TraceError(f"cannot read the trace: {reason}", source=str(path)) from error


def _open(path: Path, stack: ExitStack) -> tuple[BinaryIO, _CountingReader | None]:
    raw = stack.enter_context(path.open("rb"))
    magic = raw.peek(8)[:8]
    for prefix, kind in _OTHER_MAGIC.items():
        if magic.startswith(prefix):
            what = f"this is {kind}; a trace must be plain text or gzip, so unpack or convert it"
            raise TraceError(what, source=str(path))
    if not magic.startswith(_GZIP_MAGIC):
        return raw, None
    counting = _CountingReader(raw)
    unpacked = stack.enter_context(gzip.GzipFile(fileobj=counting, mode="rb"))  # type: ignore[call-overload]
    return io.BufferedReader(unpacked, 1 << 16), counting


_INSIDE = b"\n"
"""Stands for the rest of a line that is too long; no line without its end is equal to it."""


def _split(file: BinaryIO) -> Iterator[tuple[int, bytes | None, int]]:
    """`(line, text, bytes so far)`; None once a line is too long, then `_INSIDE` for its rest."""
    line, end_bytes, overlong = 1, 0, False
    while piece := file.readline(MAX_LINE_BYTES + 1):
        end_bytes += len(piece)
        ended = piece.endswith(b"\n")
        if overlong:
            yield line, _INSIDE, end_bytes
        elif not ended and len(piece) > MAX_LINE_BYTES:
            overlong = True
            yield line, None, end_bytes
        else:
            yield line, piece.rstrip(b"\r\n"), end_bytes
        if ended:
            line, overlong = line + 1, False


def _check_ratio(unpacked_bytes: int, packed_bytes: int, path: Path, line: int) -> None:
    if unpacked_bytes > packed_bytes * MAX_GZIP_RATIO:
        what = (
            f"{packed_bytes:,} bytes of gzip grew to over {unpacked_bytes:,}: more than"
            f" {MAX_GZIP_RATIO} times, which no trace does; unpack it first if it is one"
        )
        raise TraceError(what, source=str(path), line=line)
