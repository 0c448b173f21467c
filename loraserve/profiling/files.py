"""Profile files: TOML that people read, checked strictly, and those that ship with LoRAServe by name."""

import dataclasses
import difflib
import json
import math
import tomllib
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec

import placement
from loraserve.errors import BadInputError, WorkFailedError
from placement.latency import RankKernel
from placement.profile import LatencyBasis, Profile

SUFFIX = ".toml"
MAX_FILE_BYTES = 16 * 1024**2
_WRAP_CHARS = 100


def shipped_profiles() -> tuple[str, ...]:
    """The names of the profiles that ship with LoRAServe, in order."""
    return tuple(sorted(path.stem for path in _shipped_folder().glob(f"*{SUFFIX}")))


def find_profile(given: str) -> Profile:
    """A shipped profile by its name, or a file by its path; BadInputError says what there is."""
    names = shipped_profiles()
    if given in names:
        return read_profile(_shipped_folder() / f"{given}{SUFFIX}")
    path = Path(given)
    if path.suffix == SUFFIX or path.is_file():
        return read_profile(path)
    near = difflib.get_close_matches(given, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(names)}, or a {SUFFIX} file"
    raise BadInputError(f"--profile {given}: no such profile; {hint}")


def find_simulatable(given: str) -> Profile:
    """`find_profile`, and BadInputError that lists others if it has no latency model."""
    profile = find_profile(given)
    if profile.latency is None:
        having = [name for name in shipped_profiles() if find_profile(name).latency is not None]
        raise BadInputError(
            f"--profile {given}: it has operating points but no latency model; those that have one: "
            f"{', '.join(having)}"
        )
    return profile


def read_profile(path: Path) -> Profile:
    """Read one file; BadInputError names the file, the key and what would be right."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise BadInputError(f"{path}: cannot read the profile: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise BadInputError(f"{path}: more than {MAX_FILE_BYTES} bytes; expected a profile")
    try:
        tree = tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadInputError(f"{path}: not valid TOML: {error}") from error
    return parse_profile(tree, str(path))


def parse_profile(tree: Mapping[str, Any], where: str) -> Profile:
    """A profile from plain values; BadInputError names the key."""
    _refuse_unknown(tree, Profile, where, "")
    tree = {key: _unwrapped(value) if key == "source" else value for key, value in tree.items()}
    try:
        return msgspec.convert(tree, Profile)
    except msgspec.ValidationError as error:
        message, _, key = str(error).partition(" - at `$")
        key = key.strip(".`")
        raise BadInputError(f"{where}: {f'{key}: ' if key else ''}{_said(message, key)}") from error


def write_profile(path: Path, profile: Profile) -> None:
    """Write the file whole or not at all; WorkFailedError if it cannot be."""
    draft = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(profile_text(profile), encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise WorkFailedError(f"{path}: cannot write the profile: {error.strerror}") from error


def profile_text(profile: Profile) -> str:
    """The profile as TOML; `read_profile` gives it back equal."""
    return "\n".join(_lines(profile)) + "\n"


def _lines(profile: Profile) -> Iterator[str]:
    plain, tables, lists = [], [], []
    for field in dataclasses.fields(profile):
        value = getattr(profile, field.name)
        if dataclasses.is_dataclass(value) or isinstance(value, Mapping):
            tables.append((field.name, value))
        elif isinstance(value, tuple):
            lists.append((field.name, value))
        elif not _is_left_out(field, value):
            plain.append((field.name, value))
    for name, value in plain:
        yield f"{name} = {_wrapped(value) if name == 'source' else _value(value)}"
    for name, value in tables:
        yield from ("", f"[{name}]")
        yield from (f"{_key(key)} = {_value(one)}" for key, one in _items(value))
    for name, values in lists:
        for value in values:
            yield from ("", f"[[{name}]]")
            yield from (f"{_key(key)} = {_value(one)}" for key, one in _items(value))


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
        return
    for field in dataclasses.fields(value):
        one = getattr(value, field.name)
        if not _is_left_out(field, one):
            yield field.name, one


def _is_left_out(field: "dataclasses.Field[Any]", value: Any) -> bool:
    """TOML has no null, and '' by default says nothing."""
    return value is None or (value == "" and field.default == "")


def _key(key: str) -> str:
    return key if key.replace("_", "a").isalnum() and key.isascii() else _quoted(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Enum):
        return _quoted(str(value.value))
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    short = f"{value:g}"
    # 1.07e+10 is read more easily than 10700000000.0.
    return short if isinstance(value, float) and "e+" in short and float(short) == value else repr(value)


def _quoted(text: str) -> str:
    # JSON's escapes are TOML's, but for DEL.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _wrapped(text: str) -> str:
    """A long text as lines; a text that lines would not give back stays on one."""
    if len(text) <= _WRAP_CHARS or text != " ".join(text.split()) or '"""' in text or "\\" in text:
        return _quoted(text)
    if not text.isprintable():
        return _quoted(text)
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > _WRAP_CHARS:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return '"""\n' + "\n".join([*lines, line]) + '\n"""'


def _unwrapped(text: Any) -> Any:
    return " ".join(text.split()) if isinstance(text, str) and "\n" in text else text


def _refuse_unknown(tree: Any, kind: type, where: str, prefix: str) -> None:
    hints = get_type_hints(kind)
    for key, value in tree.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(hints)}"
            shown = key if key.isprintable() else repr(key)
            raise BadInputError(f"{where}: {prefix}{shown}: unknown key; {hint}")
        kinds = (hints[key], *get_args(hints[key]))
        inner = next((one for one in kinds if isinstance(one, type) and dataclasses.is_dataclass(one)), None)
        if inner is None:
            continue
        if isinstance(value, Mapping):
            _refuse_unknown(value, inner, where, f"{prefix}{key}.")
        elif isinstance(value, list):
            for number, one in enumerate(value):
                if isinstance(one, Mapping):
                    _refuse_unknown(one, inner, where, f"{prefix}{key}[{number}].")


def _said(message: str, key: str) -> str:
    message = message.replace("Object missing required field", "missing the key").replace(
        "`object`", "a table"
    )
    allowed = {"latency_basis": get_args(LatencyBasis)[:-1], "kernel": tuple(RankKernel)}
    values = allowed.get(key.rpartition(".")[2]) if "enum" in message else None
    return message[:1].lower() + message[1:] + (f"; expected one of {', '.join(values)}" if values else "")


def _shipped_folder() -> Path:
    return Path(next(iter(placement.__path__))) / "profiles"
