"""Laws as text: `name`, `name:value,value` or `name:field=value,field=value`.

A list has slashes between its values, as in `equal:8/16/32`, and a list of pairs is `128=4/8=1`. A law
within a law is written without fields of its own, or with one value, as in `inside=zipf:1.2`. The path
of a file may have commas in it.
"""

import dataclasses
import re
import typing
from collections.abc import Mapping
from typing import TypeVar

from traces.synthesis.popularity import POPULARITY, Popularity
from traces.types import TraceError

T = TypeVar("T")

MAX_TEXT = 100_000
MAX_DIGITS = 18


def read_law(text: str, laws: Mapping[str, type[T]], what: str) -> T:
    """The law that a text names; TraceError says what is wrong with it, and which there are."""
    name, _, rest = text.strip().partition(":")
    if len(text) > MAX_TEXT:
        raise TraceError(f"{what}: {len(text):,} characters are too many for a law")
    if name not in laws:
        raise TraceError(f"{what}: {name[:80]!r} is unknown; there are: {', '.join(laws)}")
    fields = _fields(laws[name])
    values: dict[str, object] = {}
    for index, part in enumerate(_parts(rest, fields)):
        key, equals, value = part.partition("=")
        if not equals or key.strip() not in fields:
            if index >= len(fields):
                raise TraceError(f"{what}: {part[:80]!r} is too much; {_usage(name, fields)}")
            key, value = list(fields)[index], part
        key = key.strip()
        if key in values:
            raise TraceError(f"{what}: {key} is given twice; {_usage(name, fields)}")
        try:
            values[key] = _value(value.strip(), fields[key])
        except ValueError as error:
            if isinstance(error, TraceError):
                raise
            raise TraceError(f"{what}: {value[:80]!r} is no {key}; {_usage(name, fields)}") from error
    missing = [field.name for field in _dataclass_fields(laws[name]) if _is_needed(field, values)]
    if missing:
        raise TraceError(f"{what}: {name} needs {' and '.join(missing)}; {_usage(name, fields)}")
    try:
        return laws[name](**values)
    except TraceError as error:
        raise TraceError(f"{what}: {error}") from error


def law_text(law: object, laws: Mapping[str, type[T]]) -> str:
    """The text that `read_law` makes this law of."""
    name = next((name for name, kind in laws.items() if type(law) is kind), "")
    if not name:
        return f"({type(law).__name__}, which has no text)"
    parts = [f"{field.name}={_text(getattr(law, field.name))}" for field in _dataclass_fields(type(law))]
    return f"{name}:{','.join(parts)}" if parts else name


def usage(laws: Mapping[str, type[T]]) -> dict[str, str]:
    """Each law's name and fields with their defaults, and what it does in one sentence."""
    return {
        _usage(name, _fields(kind), kind): " ".join((kind.__doc__ or "").split("\n\n")[0].split())
        for name, kind in laws.items()
    }


def _parts(text: str, fields: Mapping[str, object]) -> list[str]:
    """The values of a law; where the first is a text, such as a path, only `,field=` ends it."""
    if not text:
        return []
    if next(iter(fields.values()), None) is str:
        return re.split(rf",(?=(?:{'|'.join(fields)})=)", text)
    return text.split(",")


def _dataclass_fields(kind: type) -> tuple["dataclasses.Field[object]", ...]:
    return dataclasses.fields(kind)


def _fields(kind: type) -> dict[str, object]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in _dataclass_fields(kind)}


def _is_needed(field: "dataclasses.Field[object]", values: Mapping[str, object]) -> bool:
    has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    return field.name not in values and not has_default


def _usage(name: str, fields: Mapping[str, object], kind: type | None = None) -> str:
    if kind is None:
        return f"write {name}:{','.join(f'{field}=...' for field in fields)}" if fields else f"write {name}"
    shown = []
    for field in _dataclass_fields(kind):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        shown.append(f"{field.name}={_text(default) if default is not dataclasses.MISSING else '...'}")
    return f"{name}:{','.join(shown)}" if shown else name


def _value(text: str, kind: object) -> object:
    if kind is float:
        return float(text)
    if kind is int:
        if len(text) > MAX_DIGITS:
            raise ValueError("too many digits")
        return int(text)
    if kind is str:
        if not text:
            raise ValueError("nothing is given")
        return text
    if kind is Popularity:
        return read_law(text, POPULARITY, "inside")
    (item, *_) = typing.get_args(kind)
    return tuple(_item(part.strip(), item) for part in text.split("/"))


def _item(text: str, kind: object) -> object:
    pair = typing.get_args(kind)
    if not pair:
        return _value(text, kind)
    left, equals, right = text.partition("=")
    if not equals:
        raise ValueError(f"{text} is no pair")
    return _value(left, pair[0]), _value(right, pair[1])


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return "/".join(
            "=".join(map(_text, item)) if isinstance(item, tuple) else _text(item) for item in value
        )
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    if type(value) in POPULARITY.values():
        return law_text(value, POPULARITY)
    return str(value)
