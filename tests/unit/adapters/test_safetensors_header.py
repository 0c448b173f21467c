"""The header reader: it reads what the library writes, and never raises anything but its own error."""

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from loraserve.adapters import inspect_adapter
from loraserve.adapters.safetensors_file import SafetensorsError, encode_header, read_header
from loraserve.errors import AdapterRejectedError
from tests.support.adapter_maker import AdapterMaker, one_line, small_base

SHAPES = st.lists(st.integers(0, 4), min_size=0, max_size=3).map(tuple)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F4", "", "F64"]) | JSON,
        "shape": st.lists(st.integers(-1, 2**70), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 2**70), min_size=2, max_size=2) | JSON,
    },
)


def _file(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def _read(raw: bytes) -> Any:
    return read_header(io.BytesIO(raw), len(raw))


@given(shapes=st.dictionaries(st.text(min_size=1, max_size=12), SHAPES, max_size=5))
def test_it_reads_what_the_library_writes(shapes: dict[str, tuple[int, ...]]) -> None:
    shapes.pop("__metadata__", None)
    raw = save({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, {"format": "pt"})
    header = _read(raw)
    assert {tensor.name: tensor.shape for tensor in header.tensors} == shapes
    assert header.metadata == {"format": "pt"}
    assert sum(tensor.end - tensor.begin for tensor in header.tensors) == len(raw) - header.data_start


@given(shapes=st.dictionaries(st.text(min_size=1, max_size=12), SHAPES, max_size=5))
def test_it_reads_what_it_encodes(shapes: dict[str, tuple[int, ...]]) -> None:
    shapes.pop("__metadata__", None)
    raw = encode_header({name: ("BF16", shape) for name, shape in shapes.items()}, {"a": "b"})
    assert len(raw) % 8 == 0
    data_bytes = sum(2 * int(np.prod(shape, dtype=int)) for shape in shapes.values())
    header = read_header(io.BytesIO(raw), len(raw) + data_bytes)
    assert {tensor.name: tensor.shape for tensor in header.tensors} == shapes


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"not json", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b"9" * 5000, "not JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"a":{},"a":{}}', "twice"),
        (b'{"__metadata__":{"a":1}}', "__metadata__"),
        (b'{"a":3}', "tensor 'a': its header entry is not an object"),
        (b'{"a":{"dtype":"F32","shape":[1]}}', "lacks a dtype"),
        (b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', "lacks a dtype"),
        (b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', "lacks a dtype"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "do not fit"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', "gap"),
        (
            b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
            b'"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}',
            "overlap",
        ),
        (b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', "truncated"),
        (b"{}", "8 bytes follow the last tensor"),
    ],
)
def test_each_defect_has_its_message(header: bytes, words: str) -> None:
    with pytest.raises(SafetensorsError, match=words):
        _read(_file(header, b"12345678"))


def test_an_absurd_header_length_is_refused_without_reading_it() -> None:
    with pytest.raises(SafetensorsError, match="not safetensors"):
        _read(b"\xff" * 16)


@given(raw=st.binary(max_size=200) | st.binary(max_size=60).map(_file))
@example(raw=b"")
def test_random_bytes_raise_nothing_else(raw: bytes) -> None:
    try:
        header = _read(raw)
    except SafetensorsError as error:
        one_line(error)
    else:
        assert header.data_start <= len(raw)


@given(entries=st.dictionaries(st.text(max_size=12), ENTRY, max_size=4), data=st.binary(max_size=32))
def test_random_headers_raise_nothing_else(entries: dict[str, Any], data: bytes) -> None:
    raw = _file(json.dumps(entries).encode(), data)
    try:
        header = _read(raw)
    except SafetensorsError as error:
        one_line(error)
    else:
        assert sum(tensor.end - tensor.begin for tensor in header.tensors) == len(data)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_damaged_adapter_is_refused_or_sound(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = AdapterMaker(tmp_path_factory.mktemp("fuzz"))()
    name = data.draw(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
    raw = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, min(len(raw) - 1, 900)))] = data.draw(st.integers(0, 255))
    (folder / name).write_bytes(raw)
    _refused_or_sound(folder)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(changes=st.dictionaries(st.sampled_from(sorted(AdapterMaker(Path()).config())), JSON, min_size=1))
def test_a_random_config_is_refused_or_sound(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    _refused_or_sound(AdapterMaker(tmp_path_factory.mktemp("fuzz"))(**changes))


def _refused_or_sound(folder: Path) -> None:
    try:
        manifest = inspect_adapter(folder, base=small_base(), max_lora_rank=64)
    except AdapterRejectedError as error:
        one_line(error)
    else:
        assert manifest.rank == 4
