"""How large a Parquet file says it is, read without pyarrow.

pyarrow's own account of a file's column chunks ends the process where the footer is damaged in certain
ways (an exception of C++ that nothing catches), so what must be known before anything is unpacked is
read here: the footer in Thrift's compact protocol, fields by number as in parquet-format's
`parquet.thrift`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAGIC = b"PAR1"
MAX_FOOTER_BYTES = 64 << 20
MAX_VALUES = 2_000_000
"""Values in a footer; a real one has some dozens per column of a row group."""

_MAX_DEPTH = 32
_TAIL_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSize:
    """What the footer tells of the whole file. `num_values` counts those of the chunks that have more
    than one value per row."""

    num_rows: int
    num_columns: int
    unpacked_bytes: int
    num_values: int


def file_size(path: Path) -> FileSize:
    """The sizes by the footer; ValueError for one that is damaged, OSError."""
    tree = _Compact(_footer(path)).struct()
    try:
        num_rows, num_columns, unpacked_bytes, num_values = _count(tree[3], "num_rows"), 0, 0, 0
        for group in tree.get(4, []):
            rows = _count(group[3], "num_rows")
            num_columns = max(num_columns, len(group[1]))
            for column in group[1]:
                about = column[3]
                unpacked_bytes += _count(about[6], "total_uncompressed_size")
                values = _count(about[5], "num_values")
                num_values += values if values > rows else 0
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("its footer lacks what every footer has") from error
    return FileSize(
        num_rows=num_rows, num_columns=num_columns, unpacked_bytes=unpacked_bytes, num_values=num_values
    )


def _footer(path: Path) -> bytes:
    with path.open("rb") as file:
        size_bytes = file.seek(0, 2)
        file.seek(max(size_bytes - _TAIL_BYTES, 0))
        tail = file.read(_TAIL_BYTES)
        length = int.from_bytes(tail[:4], "little")
        if len(tail) < _TAIL_BYTES or tail[4:] != MAGIC or length > size_bytes - _TAIL_BYTES - len(MAGIC):
            raise ValueError("its end is missing or damaged")
        if length > MAX_FOOTER_BYTES:
            raise ValueError(f"its footer of {length:,} bytes is larger than {MAX_FOOTER_BYTES:,}")
        file.seek(size_bytes - _TAIL_BYTES - length)
        return file.read(length)


def _count(value: object, name: str) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"its footer has a {name} that is no number of anything")
    return value


class _Compact:
    """Thrift's compact protocol; structs become dicts by field number."""

    _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 11, 12
    _INTEGERS = (4, 5, 6)

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._num_values = 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            step, kind = head >> 4, head & 15
            number = number + step if step else self._zigzag()
            if kind in (self._TRUE, self._FALSE):
                fields[number] = kind == self._TRUE
            else:
                fields[number] = self._value(kind, depth + 1)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        self._num_values += 1
        if depth > _MAX_DEPTH or self._num_values > MAX_VALUES:
            raise ValueError("its footer is beyond all reason")
        if kind in self._INTEGERS:
            return self._zigzag()
        if kind in (self._TRUE, self._FALSE, self._BYTE):
            return self._byte()
        if kind == self._BINARY:
            return self._bytes(self._varint())
        if kind == self._DOUBLE:
            return self._bytes(8)
        if kind == self._STRUCT:
            return self.struct(depth)
        if kind in (self._LIST, self._SET):
            return self._list(depth)
        if kind == self._MAP:
            return self._map(depth)
        raise ValueError("its footer is no Thrift")

    def _list(self, depth: int) -> list[Any]:
        head = self._byte()
        count, kind = head >> 4, head & 15
        if count == 15:
            count = self._varint()
        return [self._value(kind, depth + 1) for _ in range(count)]

    def _map(self, depth: int) -> list[Any]:
        count = self._varint()
        if count == 0:
            return []
        kinds = self._byte()
        return [
            (self._value(kinds >> 4, depth + 1), self._value(kinds & 15, depth + 1)) for _ in range(count)
        ]

    def _byte(self) -> int:
        if self._at >= len(self._data):
            raise ValueError("its footer ends too early")
        self._at += 1
        return self._data[self._at - 1]

    def _bytes(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise ValueError("its footer ends too early")
        self._at += count
        return self._data[self._at - count : self._at]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if not byte & 128:
                return value
            if shift > 63:
                raise ValueError("its footer has a number of more than 64 bits")

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
