"""The head of a segment: one form for one adapter, and a head or a SegmentError from whatever bytes."""

import base64
import dataclasses
import hashlib
import json
from typing import Any

import msgspec
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.adapters.body_hashes import chunks_of, hash_chunks, root_of, root_of_body
from loraserve.adapters.safetensors_file import ITEM_BYTES, TensorInfo
from loraserve.adapters.segment_head import (
    CHUNK_BYTES,
    SegmentError,
    SegmentHead,
    hashed,
    plan_head,
)
from tests.support.adapter_maker import one_line

DIGEST = "d" * 64
LAYER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tensors_of(shapes: dict[str, tuple[int, int, int]], dtype: str = "F16") -> list[TensorInfo]:
    """The tensors of modules of (rank, inputs, outputs), as a weights file may have them."""
    found = []
    for module, (rank, inputs, outputs) in shapes.items():
        for side, shape in (("B", (outputs, rank)), ("A", (rank, inputs))):
            name = f"base_model.model.{module}.lora_{side}.weight"
            found.append(TensorInfo(name=name, dtype=dtype, shape=shape, begin=0, end=0))
    return found


def head_of(shapes: dict[str, tuple[int, int, int]], dtype: str = "F16", scaling: float = 2.0) -> SegmentHead:
    return plan_head(tensors_of(shapes, dtype), dict.fromkeys(shapes, scaling), name="a@0", digest=DIGEST)


def model(num_layers: int, rank: int) -> dict[str, tuple[int, int, int]]:
    """All modules of a model's layers."""
    return {
        f"model.layers.{layer}.{'self_attn' if name in LAYER[:4] else 'mlp'}.{name}": (rank, 4096, 4096)
        for layer in range(num_layers)
        for name in LAYER
    }


SMALL = head_of({"model.layers.0.self_attn.q_proj": (4, 24, 20), "model.layers.0.mlp.up_proj": (3, 9, 7)})
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
module_names = st.one_of(
    names,
    st.builds("model.layers.{}.x.{}".format, st.integers(0, 12), st.sampled_from([*LAYER, "dense", "a"])),
)
shapes_of_modules = st.dictionaries(
    module_names,
    st.tuples(st.integers(1, 70), st.integers(1, 3000), st.integers(1, 3000)),
    min_size=1,
    max_size=9,
)


@settings(deadline=None)
@given(shapes_of_modules, st.sampled_from(["F32", "F16", "BF16"]), st.floats(-1e9, 1e9), st.randoms())
def test_one_adapter_has_one_head_whatever_order_its_file_has(
    shapes: dict[str, tuple[int, int, int]], dtype: str, scaling: float, dice: Any
) -> None:
    head = head_of(shapes, dtype, scaling)
    raw = head.encode()
    assert SegmentHead.decode(raw) == head
    shuffled = tensors_of(shapes, dtype)
    dice.shuffle(shuffled)
    scalings = dict(sorted(dict.fromkeys(shapes, scaling).items(), key=lambda _: dice.random()))
    assert plan_head(shuffled, scalings, name="a@0", digest=DIGEST).encode() == raw
    assert check_places(head) == {tensor.name: tensor.shape for tensor in shuffled}
    assert head.rank == max(rank for rank, _, _ in shapes.values())


def check_places(head: SegmentHead) -> dict[str, tuple[int, ...]]:
    """Every tensor is aligned, behind the one before, and whole; the shapes by name."""
    end = 0
    for tensor in head.tensors:
        assert tensor.begin % 64 == 0
        assert 0 <= tensor.begin - end < 64
        end = tensor.begin + ITEM_BYTES[tensor.dtype] * tensor.shape[0] * tensor.shape[1]
        assert tensor.end == end
    assert head.body_bytes == end
    assert len(head.chunk_hashes) == 8 * head.num_chunks
    assert len(head.chunk_sha256s) == 32 * head.num_chunks
    assert (head.num_chunks - 1) * head.chunk_bytes < end <= head.num_chunks * head.chunk_bytes
    return {tensor.name: tensor.shape for tensor in head.tensors}


def test_modules_lie_layer_by_layer_as_the_engine_packs_them() -> None:
    other = ("model.layers.2.mlp.zeta", "model.layers.2.alpha", "standalone")
    order = [
        module.name
        for module in head_of(dict(reversed(model(12, 8).items())) | dict.fromkeys(other, (8, 8, 8))).modules
    ]
    of_layers = [name for name in order if name not in other]
    assert of_layers == list(model(12, 8))
    assert order[0] == "standalone"
    assert order[22:24] == ["model.layers.2.alpha", "model.layers.2.mlp.zeta"]


def test_the_head_of_a_large_model_is_small() -> None:
    head = head_of(model(32, 64))
    assert len(head.tensors) == 448
    assert len(head.encode()) < 50_000


def test_hashes_take_their_place_without_a_byte_more() -> None:
    body = bytes(range(256)) * (CHUNK_BYTES // 256) + b"end"
    chunks = [body[:CHUNK_BYTES], body[CHUNK_BYTES:]]
    hashes = hash_chunks(iter(chunks))
    assert hashes.fast == b"".join(xxhash.xxh3_64(chunk).digest() for chunk in chunks)
    assert hashes.sha256 == b"".join(hashlib.sha256(chunk).digest() for chunk in chunks)
    head = head_of({"m": (1, CHUNK_BYTES // 2, 2)})
    told = hashed(head, digest="e" * 64, hashes=hashes)
    assert len(told.encode()) == len(head.encode())
    assert told.chunk_hash(0) + told.chunk_hash(1) == hashes.fast
    assert told.chunk_sha256(0) + told.chunk_sha256(1) == hashes.sha256
    assert SegmentHead.decode(told.encode()) == told


def test_the_root_stands_for_the_bytes_and_for_how_they_are_cut() -> None:
    body = bytes(range(200))
    with memoryview(body) as view, memoryview(body[:-1] + b"x") as other:
        root = root_of_body(view, 64)
        hashes = hash_chunks(chunks_of(view, 64)).sha256
        roots = [root, root_of_body(view, 63), root_of_body(view, 200), root_of_body(other, 64)]
        roots += [root_of(hashes, body_bytes=size, chunk_bytes=cut) for size, cut in ((199, 64), (200, 65))]
        roots.append(hashlib.sha256(hashes).hexdigest())
    assert root_of(hashes, body_bytes=200, chunk_bytes=64) == root
    assert len(set(roots)) == len(roots)


def changed(**fields: Any) -> bytes:
    """A head with other values in its written form."""
    return msgspec.json.encode(json.loads(SMALL.encode()) | fields)


def modules_with(position: int, value: Any) -> bytes:
    modules = json.loads(SMALL.encode())["modules"]
    modules[0][position] = value
    return changed(modules=modules)


DOUBLE = json.loads(SMALL.encode())["modules"]
DEFECTS = {
    "nothing": b"",
    "no JSON": b"\xff" * 100,
    "deep": b"[" * 1_000_000,
    "deep in a module": b'{"format":1,"name":"a","modules":' + b"[" * 100_000,
    "spaces": SMALL.encode() + b" ",
    "a field twice": SMALL.encode().replace(b'"name"', b'"name":"b","name"', 1),
    "another field": changed(more=1),
    "another format": changed(format=1),
    "a name that is none": changed(name=""),
    "a digest that is none": changed(digest="D" * 64),
    "no modules": changed(modules=[]),
    "a module twice": changed(modules=[DOUBLE[0], DOUBLE[0]]),
    "another order": changed(modules=DOUBLE[::-1]),
    "no rank": modules_with(2, 0),
    "a huge rank": modules_with(2, 2**63),
    "a number of 10,000 digits": SMALL.encode().replace(b",24,", b"," + b"9" * 10_000 + b","),
    "more than the hashes are for": modules_with(2, 2**31),
    "a scaling that is none": SMALL.encode().replace(b"2.0", b"1e999"),
    "another dtype": modules_with(5, "F64"),
    "no hashes": changed(chunk_hashes=""),
    "half a hash": changed(chunk_hashes=base64.b64encode(b"1234").decode()),
    "one hash more": changed(chunk_hashes=base64.b64encode(bytes(16)).decode()),
    "no sha256": changed(chunk_sha256s=""),
    "half a sha256": changed(chunk_sha256s=base64.b64encode(bytes(16)).decode()),
    "one sha256 more": changed(chunk_sha256s=base64.b64encode(bytes(64)).decode()),
    "another sha256": changed(chunk_sha256s=base64.b64encode(b"\1" + bytes(31)).decode()),
    "another root": changed(body_sha256="0" * 64),
    "no chunks": changed(chunk_bytes=0),
    "larger than any": b" " * (16 * 1024**2 + 1),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_what_is_no_head_is_refused_in_one_line(defect: str) -> None:
    with pytest.raises(SegmentError) as refusal:
        SegmentHead.decode(DEFECTS[defect])
    one_line(refusal.value)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_whatever_the_bytes_are_the_answer_is_a_sound_head_or_a_segment_error(data: st.DataObject) -> None:
    raw = bytearray(SMALL.encode())
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(
            st.binary(max_size=3) | st.just(b"99999999999")
        )
    raw = raw[: data.draw(st.sampled_from([len(raw), data.draw(st.integers(0, len(raw)))]))]
    try:
        head = SegmentHead.decode(bytes(raw))
    except SegmentError:
        return
    assert head.encode() == bytes(raw)
    check_places(head)


@given(st.binary(max_size=200))
def test_random_bytes_are_no_head(raw: bytes) -> None:
    with pytest.raises(SegmentError):
        SegmentHead.decode(raw)


EXPECTED: dict[str, Any] = {"name": "a@0", "digest": DIGEST, "max_lora_rank": 4, "max_bytes": 10_000}


def test_the_head_that_was_asked_for_passes() -> None:
    SMALL.check(**EXPECTED)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"name": "b@0"}, "it holds 'a@0', expected 'b@0'"),
        ({"digest": "e" * 64}, "its content has sha256 dddddddddddddddd, expected eeeeeeeeeeeeeeee"),
        ({"max_lora_rank": 3}, "its rank 4 is above 3"),
        ({"max_bytes": 400}, r"its body has \d+ bytes; at most 400 are allowed"),
    ],
)
def test_another_head_than_was_asked_for_is_refused(expected: dict[str, Any], message: str) -> None:
    with pytest.raises(SegmentError, match=message) as refusal:
        SMALL.check(**EXPECTED | expected)
    one_line(refusal.value)


def moved(tensor: TensorInfo, by: int) -> TensorInfo:
    return dataclasses.replace(tensor, begin=tensor.begin + by, end=tensor.end + by)


@pytest.mark.parametrize(
    "wrong",
    [
        {"body_bytes": SMALL.body_bytes - 1},
        {"rank": 3},
        {"chunk_hashes": b""},
        {"chunk_sha256s": b""},
        {"chunk_sha256s": bytes(31) + b"x"},
        {"body_sha256": "0" * 64},
        {"modules": (SMALL.modules[0], SMALL.modules[0])},
        {
            "modules": (
                dataclasses.replace(SMALL.modules[0], b=moved(SMALL.modules[0].b, -64)),
                SMALL.modules[1],
            )
        },
        {
            "modules": (
                SMALL.modules[0],
                dataclasses.replace(SMALL.modules[1], b=moved(SMALL.modules[1].b, 64)),
            )
        },
    ],
    ids=[
        "short",
        "rank",
        "hashes",
        "no sha256",
        "another sha256",
        "another root",
        "twice",
        "overlap",
        "outside",
    ],
)
def test_a_head_that_was_made_by_hand_is_checked_as_well(wrong: dict[str, Any]) -> None:
    with pytest.raises(SegmentError):
        dataclasses.replace(SMALL, **wrong).check(**EXPECTED)


def test_names_that_are_no_text_cannot_be_written() -> None:
    with pytest.raises(SegmentError, match="a name in it is not text"):
        head_of({"model.\ud800": (1, 1, 1)})
