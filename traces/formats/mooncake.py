"""Mooncake traces: one JSON object per line with `timestamp` in ms, `input_length`, `output_length`
and, optionally, `hash_ids`, one per block of 512 prompt tokens."""

import json
import math
from typing import Any

from traces.formats.base import Row, RowError, RowParser, TraceFormat, checked_seconds, checked_tokens, shown

_KEYS = ("timestamp", "input_length", "output_length")


def _object(text: str) -> dict[str, Any]:
    try:
        tree = json.loads(text)
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
    if not isinstance(value, list) or not all(type(block) is int for block in value):
        raise RowError(f"hash_ids is {shown(value)}; expected a list of whole numbers")
    return tuple(value)


def _parse(text: str) -> Row:
    tree = _object(text)
    timestamp_ms = _number(tree, "timestamp")
    if not 0 <= timestamp_ms <= 1e15:
        raise RowError(f"timestamp is {shown(timestamp_ms)}; expected milliseconds from 0 to 1e15")
    return Row(
        time_s=checked_seconds(timestamp_ms / 1000, "timestamp"),
        prompt_tokens=_tokens(tree, "input_length"),
        output_tokens=_tokens(tree, "output_length"),
        hash_ids=_hash_ids(tree),
    )


def _matches(line: str) -> bool:
    try:
        return all(key in _object(line) for key in _KEYS)
    except RowError:
        return False


def _parser(header: str) -> RowParser:
    return _parse


MOONCAKE = TraceFormat(
    name="mooncake",
    layout='JSON lines {"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [...]}',
    has_header=False,
    matches=_matches,
    parser=_parser,
)
