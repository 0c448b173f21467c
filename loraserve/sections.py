"""TOML files of one strict shape: sections as frozen structs, and errors that name the path of a key, what
stands there and what would be right."""

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import msgspec
from msgspec import inspect

from loraserve.errors import ConfigError

MAX_SHOWN_CHARS = 80


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all sections."""


Whole = TypeVar("Whole", bound=Section)


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The tree of a TOML file; ConfigError says why `what` cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read {what}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def checked(tree: Mapping[str, Any], kind: type[Whole], where: str) -> Whole:
    """The tree as a `kind`; ConfigError begins with `where` and names the path and what would be right."""
    _refuse_unknown_keys(tree, kind, where, "")
    try:
        return msgspec.convert(tree, kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        path = path.rstrip("`")
        # A section's own check has said it all.
        is_own = isinstance(error.__cause__, ValueError)
        said = f"{path}.{message}" if is_own else _explained(tree, path, kind, message)
        raise ConfigError(f"{where}: {said or message}") from error


def _refuse_unknown_keys(tree: Mapping[str, Any], section: type[Section], where: str, prefix: str) -> None:
    fields = {field.name: field.type for field in msgspec.structs.fields(section)}
    for key, value in tree.items():
        path = f"{prefix}{key if key.isprintable() else repr(key)}"
        if key not in fields:
            raise ConfigError(f"{where}: {path}: unknown key; allowed: {', '.join(sorted(fields))}")
        kind = fields[key]
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        if get_origin(kind) is list and isinstance(value, list):
            items = [(f"{path}[{place}].", one) for place, one in enumerate(value)]
            kind = get_args(kind)[0]
        else:
            items = [(f"{path}.", value)]
        if isinstance(kind, type) and issubclass(kind, Section):
            for under, one in items:
                if isinstance(one, Mapping):
                    _refuse_unknown_keys(one, kind, where, under)


def _explained(tree: Mapping[str, Any], path: str, section: type[Section], message: str) -> str:
    """What stands at a path, like `adapters.allow_urls[0]`, and what was expected there."""
    value: Any = tree
    kind: inspect.Type = inspect.type_info(section)
    for name, index in re.findall(r"(\w+)|\[(\d+)\]", path):
        kind = _not_none(kind)
        if isinstance(kind, inspect.StructType):
            value, kind = value[name], _field(kind, name)
        elif isinstance(kind, inspect.ListType):
            value, kind = value[int(index)], kind.item_type
        elif isinstance(kind, inspect.TupleType):
            value, kind = value[int(index)], kind.item_types[int(index)]
    missing = re.search(r"missing required field `(\w+)`", message)
    if missing and isinstance(kind, inspect.StructType):
        dotted = ".".join(filter(None, (path, missing[1])))
        return f"{dotted}: is missing; expected {_expected(_field(kind, missing[1]))}"
    return f"{path}: {shown(value)}; expected {_expected(kind)}"


def _field(kind: inspect.StructType, name: str) -> inspect.Type:
    return next(field.type for field in kind.fields if field.name == name)


def _not_none(kind: inspect.Type) -> inspect.Type:
    """What a value that may also be left out is when it is there."""
    if isinstance(kind, inspect.UnionType):
        there = [one for one in kind.types if not isinstance(one, inspect.NoneType)]
        return there[0] if len(there) == 1 else kind
    return kind


def _expected(kind: inspect.Type) -> str:
    match _not_none(kind):
        case inspect.UnionType(types=types):
            there = [one for one in types if not isinstance(one, inspect.NoneType)]
            return " or ".join(dict.fromkeys(_expected(one) for one in there))
        case inspect.Metadata(extra_json_schema={"description": str(description)}):
            return description
        case inspect.LiteralType(values=values):
            return f"one of {', '.join(map(str, values))}"
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType() as number:
            return f"an integer{_range(number)}"
        case inspect.FloatType() as number:
            return f"a number{_range(number)}"
        case inspect.EnumType(cls=kinds):
            return f"one of {', '.join(str(one.value) for one in kinds)}"
        case inspect.ListType(item_type=item, min_length=least):
            least_said = f" of at least {least}" if least else ""
            return f"a list{least_said}, each item {_expected(item)}"
        case inspect.TupleType(item_types=items):
            return f"a list of {len(items)}: {', '.join(_expected(one) for one in items)}"
        case inspect.StrType():
            return "a string"
    return "a table"


def _range(kind: inspect.IntType | inspect.FloatType) -> str:
    most = None if kind.le is None else _plain(kind.le)
    if kind.gt is not None:
        return f" above {_plain(kind.gt)}" + (f" and at most {most}" if most else "")
    if kind.ge is None:
        return ""
    return f" from {_plain(kind.ge)} to {most}" if most else f" of at least {_plain(kind.ge)}"


def _plain(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}".replace("e+0", "e").replace("e+", "e")


def shown(value: object) -> str:
    """A value as one would write it in TOML, on one line and not too long."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}..."
