"""Many CSV lines at once: the fast way for lines with nothing unusual in them.

Each function returns None for anything that the careful way, row by row, might read otherwise; so
nothing here ever says what is wrong with a line.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from traces.formats.base import MAX_TIME_S, MAX_TOKENS, NUMBER, RowError

_NUMBER_LETTERS = str.maketrans("", "", "0123456789.+-,eE")
_MAX_DIGITS = len(str(MAX_TOKENS))


def split_columns(text: str, width: int) -> list[list[str]] | None:
    """The fields of each column of lines that all have `width` fields and no quotes."""
    if '"' in text or "\r" in text:
        return None
    # The separator that stands alone between two lines shows that each has its share of fields.
    fields = text.replace("\n", ",\n,").split(",")
    stride = width + 1
    num_lines = text.count("\n") + 1
    if len(fields) != num_lines * stride - 1 or fields[width::stride] != ["\n"] * (num_lines - 1):
        return None
    return [fields[column::stride] for column in range(width)]


def token_column(fields: Sequence[str]) -> NDArray[np.int32] | None:
    """Numbers of tokens in plain digits."""
    joined = "".join(fields)
    if not (joined.isascii() and joined.isdigit()) or "" in fields or len(max(fields, key=len)) > _MAX_DIGITS:
        return None
    column = np.array(list(map(int, fields)), dtype=np.int32)
    return column if column.max() <= MAX_TOKENS else None


def seconds_column(fields: Sequence[str]) -> NDArray[np.float64] | None:
    """Times in seconds, each from 0 to `MAX_TIME_S`."""
    joined = ",".join(fields)
    if joined.translate(_NUMBER_LETTERS):
        return None
    if ("e" in joined or "E" in joined) and not all(map(NUMBER.fullmatch, fields)):
        return None
    try:
        column = np.array(list(map(float, fields)))
    except ValueError:
        return None
    # Written so that a NaN does not pass.
    return column if bool(np.all((column >= 0) & (column <= MAX_TIME_S))) else None


class NameMemo:
    """Places of adapters by the very text of their fields, each looked at closely only once."""

    _MOST = 1 << 16

    def __init__(self, place: Callable[[tuple[str, ...]], int]) -> None:
        self._place = place
        self._known: dict[tuple[str, ...], int] = {}

    def column(self, *fields: Sequence[str]) -> NDArray[np.int32] | None:
        """The place of each row's fields."""
        rows = list(zip(*fields, strict=True))
        known = self._known
        try:
            for row in dict.fromkeys(rows):  # in order, so that numbers do not depend on hashes
                if row not in known:
                    known[row] = self._place(row)
        except (RowError, OverflowError):
            return None
        column = np.array([known[row] for row in rows], dtype=np.int32)
        if len(known) > self._MOST:
            known.clear()
        return column
