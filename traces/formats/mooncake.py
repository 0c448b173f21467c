"""Mooncake traces and their Qwen-Bailian variant: one JSON object per line with `input_length`,
`output_length`, `timestamp` and, optionally, `hash_ids`, one per block of prompt tokens.

Mooncake (FAST25 release) counts milliseconds and hashes blocks of 512 tokens. Qwen-Bailian
(alibaba-edu/qwen-bailian-usagetraces-anon) counts seconds, hashes blocks of 16, and has a `chat_id`,
by which it is told apart. Ours may add to Mooncake's keys `adapter`, `rank` and `block_size`.
"""

import json
import math
from collections.abc import Sequence
from decimal import Decimal
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traces.columns import BASE
from traces.formats.base import (
    MAX_RANK,
    MAX_TOKENS,
    Block,
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
_END, _COMMA = "}\n{", "},{"


class _Exact(float):
    """A float that remembers how it was written: a time in ms must lose nothing on its way to seconds."""

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> "_Exact":
        self = super().__new__(cls, text)
        self.text = text
        return self


_NUMBERS = {int, _Exact}
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


def _objects(text: str) -> list[dict[str, Any]] | None:
    """The objects of many lines, each with one on it and no other inside."""
    count = text.count("\n") + 1
    # With one pair of braces on each line, at its ends, as many objects as lines are one per line.
    if not (text.startswith("{") and text.endswith("}") and text.count("}\n{") == count - 1):
        return None
    if not text.count("{") == text.count("}") == count:
        return None
    try:
        trees = _DECODER.decode(f"[{text.replace(_END, _COMMA)}]")
    except (ValueError, RecursionError):
        return None
    whole = isinstance(trees, list) and len(trees) == count and all(type(tree) is dict for tree in trees)
    return trees if whole else None


def _hash_columns(trees: Sequence[dict[str, Any]]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """How many blocks each has, and all of them; TypeError or OverflowError for what are none."""
    lists = [tree.get("hash_ids") or [] for tree in trees]
    if not set(map(type, lists)) <= {list} or not set(map(type, chain.from_iterable(lists))) <= {int}:
        raise TypeError("no lists of whole numbers")
    counts = np.array(list(map(len, lists)), dtype=np.int32)
    ids = np.fromiter(chain.from_iterable(lists), dtype=np.int64, count=int(counts.sum()))
    if len(ids) and int(ids.min()) == -(1 << _HASH_BITS):
        raise OverflowError("more than 63 bits and a sign")
    return counts, ids


class _Parser(Parser):
    block_tokens = MOONCAKE_BLOCK_TOKENS

    def __init__(self, first: str, setting: Setting) -> None:
        self._table = setting.adapters
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

    def block(self, text: str) -> Block | None:
        trees = _objects(text)
        try:
            if trees is None or any(
                tree.get("block_size", self.block_tokens) != self.block_tokens for tree in trees
            ):
                return None
            times = [tree["timestamp"] for tree in trees]
            prompts = [tree["input_length"] for tree in trees]
            outputs = [tree["output_length"] for tree in trees]
            if not (set(map(type, times)) <= _NUMBERS and set(map(type, prompts + outputs)) <= {int}):
                return None
            if not 0 <= min(prompts + outputs) <= max(prompts + outputs) <= MAX_TOKENS:
                return None
            counts, ids = _hash_columns(trees)
            return Block(
                time_s=np.array([self._time_s(time) for time in times]),
                prompt_tokens=np.array(prompts, dtype=np.int32),
                output_tokens=np.array(outputs, dtype=np.int32),
                adapter=np.array([self._place(tree) for tree in trees], dtype=np.int32),
                hash_counts=counts,
                hash_ids=ids,
            )
        except (KeyError, TypeError, RowError, OverflowError):
            return None

    def _place(self, tree: dict[str, Any]) -> int:
        name, rank = _adapter(tree)
        return BASE if name is None else self._table.place(name, rank)

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
