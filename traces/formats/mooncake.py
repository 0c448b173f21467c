"""Mooncake traces and their Qwen-Bailian variant: one JSON object per line with `input_length`,
`output_length`, `timestamp` and, optionally, `hash_ids`, one per block of prompt tokens.

Mooncake (FAST25 release) counts milliseconds and hashes blocks of 512 tokens. Qwen-Bailian
(alibaba-edu/qwen-bailian-usagetraces-anon) counts seconds, hashes blocks of 16, and has a `chat_id`,
by which it is told apart. Ours may add to Mooncake's keys `adapter`, `rank` and `block_size`.
"""

import json
import math
from decimal import Decimal
from typing import Any

from traces.formats.base import (
    MAX_RANK,
    Parser,
    Row,
    RowError,
    Setting,
    TraceFormat,
    checked_name,
    checked_seconds,
    checked_tokens,
    shown,
)

MOONCAKE_BLOCK_TOKENS = 512
QWEN_BLOCK_TOKENS = 16

_KEYS = ("timestamp", "input_length", "output_length")
_MAX_BLOCK_TOKENS = 1 << 20
_HASH_BITS = 63


class _Exact(float):
    """A float that remembers how it was written: a time in ms must lose nothing on its way to seconds."""

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> "_Exact":
        self = super().__new__(cls, text)
        self.text = text
        return self


_DECODER = json.JSONDecoder(parse_float=_Exact)


def _object(text: str) -> dict[str, Any]:
    try:
        tree = _DECODER.decode(text)
    except RecursionError as error:
        raise RowError("broken JSON: nested too deeply") from error
    except ValueError as error:
        raise RowError(f"broken JSON: {error}; expected one object per line") from error
    if not isinstance(tree, dict):
        raise RowError(f"{shown(tree)} is not a JSON object with {', '.join(_KEYS)}")
    return tree


def _number(tree: dict[str, Any], key: str) -> float | int:
    value = tree.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError(f"{key} is {shown(value)}; expected a number")
    return value


def _tokens(tree: dict[str, Any], key: str) -> int:
    value = _number(tree, key)
    if isinstance(value, float):
        if not math.isfinite(value) or value != int(value):
            raise RowError(f"{key} is {shown(value)}; expected a whole number of tokens")
        value = int(value)
    return checked_tokens(value, key)


def _hash_ids(tree: dict[str, Any]) -> tuple[int, ...]:
    value = tree.get("hash_ids") or []
    if not isinstance(value, list) or not all(
        type(block) is int and block.bit_length() <= _HASH_BITS for block in value
    ):
        raise RowError(f"hash_ids is {shown(value)}; expected a list of whole numbers of at most 64 bits")
    return tuple(value)


def _adapter(tree: dict[str, Any]) -> tuple[str | None, int | None]:
    name, rank = tree.get("adapter"), tree.get("rank")
    if name is None and rank is None:
        return None, None
    if not isinstance(name, str) or not name.strip():
        raise RowError(f"adapter is {shown(name)}; expected a name, or neither adapter nor rank")
    if rank is not None and (type(rank) is not int or not 0 < rank <= MAX_RANK):
        raise RowError(f"rank is {shown(rank)}; expected a whole number from 1 to {MAX_RANK:,}")
    return checked_name(name.strip()), rank


def _milliseconds(value: float | int) -> float:
    if not 0 <= value <= 1e15:
        raise RowError(f"timestamp is {shown(value)}; expected milliseconds from 0 to 1e15")
    # What was written is rounded once, to seconds, so that a time that was written comes back.
    return float(Decimal(value.text).scaleb(-3)) if isinstance(value, _Exact) else value / 1000


class _Parser(Parser):
    block_tokens = MOONCAKE_BLOCK_TOKENS

    def __init__(self, first: str, setting: Setting) -> None:
        block_size = _object(first).get("block_size", self.block_tokens)
        if type(block_size) is int and 0 < block_size <= _MAX_BLOCK_TOKENS:
            self.block_tokens = block_size

    def row(self, text: str) -> Row:
        tree = _object(text)
        time_s = self._time_s(_number(tree, "timestamp"))
        block_size = tree.get("block_size", self.block_tokens)
        if block_size != self.block_tokens:
            right = f"expected {self.block_tokens} as in the lines before"
            raise RowError(f"block_size is {shown(block_size)}; {right}")
        adapter, rank = _adapter(tree)
        return Row(
            time_s=time_s,
            prompt_tokens=_tokens(tree, "input_length"),
            output_tokens=_tokens(tree, "output_length"),
            adapter=adapter,
            rank=rank,
            hash_ids=_hash_ids(tree),
        )

    def _time_s(self, value: float | int) -> float:
        return checked_seconds(_milliseconds(value), "timestamp")


class _QwenParser(_Parser):
    block_tokens = QWEN_BLOCK_TOKENS

    def _time_s(self, value: float | int) -> float:
        return checked_seconds(float(value) if value <= 1e300 else math.inf, "timestamp")


def _matches(line: str, *, qwen: bool) -> bool:
    try:
        tree = _object(line)
    except RowError:
        return False
    return all(key in tree for key in _KEYS) and ("chat_id" in tree) is qwen


MOONCAKE = TraceFormat(
    name="mooncake",
    layout='JSON lines {"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [...]}',
    has_header=False,
    matches=lambda line: _matches(line, qwen=False),
    parser=_Parser,
)

QWEN = TraceFormat(
    name="qwen",
    layout='JSON lines {"chat_id": n, "parent_chat_id": n, "timestamp": s, "input_length": n, '
    '"output_length": n, "type": "...", "turn": n, "hash_ids": [...]}',
    has_header=False,
    matches=lambda line: _matches(line, qwen=True),
    parser=_QwenParser,
)
