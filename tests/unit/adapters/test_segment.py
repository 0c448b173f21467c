"""An adapter in shared memory is what its folder says, cannot be changed, and goes with its processes."""

import dataclasses
import fcntl
import hashlib
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from loraserve.adapters.safetensors_file import TensorInfo
from loraserve.adapters.segment import (
    AdapterSegment,
    MappedSegment,
    SegmentError,
    SegmentRef,
    build_segment,
    map_segment,
)
from loraserve.errors import AdapterRejectedError
from tests.support.adapter_maker import PREFIX, AdapterMaker, one_line
from tests.support.segment_process import refused
from tests.support.segments import holders

ROOT = Path(__file__).parents[3]
Q_PROJ, V_PROJ = (PREFIX.removeprefix("base_model.model.") + end for end in (".q_proj", ".v_proj"))
NAME = f"one-{os.getpid()}@0"
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@pytest.fixture
def segment(make: AdapterMaker) -> Iterator[AdapterSegment]:
    """The default adapter in shared memory."""
    one = build_segment(make(), name=NAME, digest=None, max_lora_rank=64)
    yield one
    one.close()
    one.close()


def values(mapped: MappedSegment, tensor: TensorInfo) -> NDArray[Any]:
    """A tensor where it lies."""
    dtype = {"F32": np.float32, "F16": np.float16}[tensor.dtype]
    offset = mapped.data_start + tensor.begin
    count = int(np.prod(tensor.shape))
    return np.frombuffer(mapped.memory, dtype, count, offset).reshape(tensor.shape)


def mixed_ranks(make: AdapterMaker) -> dict[str, NDArray[Any]]:
    """v_proj has rank 2, q_proj 4."""
    tensors = make.tensors()
    a, b = f"{PREFIX}.v_proj.lora_A.weight", f"{PREFIX}.v_proj.lora_B.weight"
    return tensors | {a: tensors[a][:2], b: np.ascontiguousarray(tensors[b][:, :2])}


@pytest.mark.parametrize(
    ("changes", "scalings"),
    [
        ({}, (2.0, 2.0)),
        ({"lora_alpha": 0.3}, (0.075, 0.075)),
        ({"use_rslora": True}, (4.0, 4.0)),
        ({"alpha_pattern": {"v_proj": 123456}}, (2.0, 30864.0)),
        ({"rank_pattern": {"v_proj": 2}}, (2.0, 4.0)),
        ({"rank_pattern": {"v_proj": 2}, "use_rslora": True}, (4.0, 8 / 2**0.5)),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_what_is_mapped_is_what_the_folder_says(
    make: AdapterMaker, changes: dict[str, Any], scalings: tuple[float, float], dtype: Any
) -> None:
    tensors = mixed_ranks(make) if "rank_pattern" in changes else make.tensors()
    tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    built = build_segment(make(tensors=tensors, **changes), name=NAME, digest=None, max_lora_rank=4)
    mapped = map_segment(built.ref)
    mapped.verify()
    assert {name: module.scaling for name, module in mapped.modules.items()} == pytest.approx(
        {Q_PROJ: scalings[0], V_PROJ: scalings[1]}, rel=1e-15
    )
    assert mapped.rank == built.rank == 4
    assert mapped.modules[V_PROJ].rank == (2 if "rank_pattern" in changes else 4)
    assert mapped.size_bytes == built.ref.size_bytes
    # Where memory can be registered with a device or a transport.
    assert mapped.data_start % mmap.PAGESIZE == 0
    for name, module in mapped.modules.items():
        for side, tensor in (("A", module.a), ("B", module.b)):
            assert np.array_equal(
                values(mapped, tensor), tensors[f"base_model.model.{name}.lora_{side}.weight"]
            )
    built.close()


def test_neither_the_owner_nor_another_process_can_change_it_and_it_outlives_the_owners_close(
    segment: AdapterSegment,
) -> None:
    all_refused = dict.fromkeys(("write", "shrink", "grow", "map", "punch"), "PermissionError")
    assert refused(segment.ref.fd, segment.ref.size_bytes) == all_refused
    assert not os.get_inheritable(segment.ref.fd)
    with process("reach", json.dumps(dataclasses.asdict(segment.ref))) as other:
        assert told(other) == all_refused
        assert told(other) == [Q_PROJ, V_PROJ]
        assert holders(NAME) == {os.getpid(), other.pid}
        segment.close()
        assert holders(NAME) == {other.pid}
        go_on(other)
        assert told(other) == [Q_PROJ, V_PROJ]
        assert other.wait(10) == 0
    assert holders(NAME) == set()


def test_nothing_is_left_of_an_owner_that_is_killed_once_nobody_maps_it(make: AdapterMaker) -> None:
    with process("own", str(make()), NAME) as owner:
        ref = SegmentRef(**told(owner))
        mapped = map_segment(ref)
        owner.kill()
        owner.wait(10)
    mapped.verify()
    assert holders(NAME) == {os.getpid()}
    with pytest.raises(SegmentError, match=f"process {ref.pid} has no segment"):
        map_segment(ref)
    del mapped
    assert holders(NAME) == set()


def damaged(make: AdapterMaker, kind: str) -> Path:
    folder = make(name=kind, tensors=make.tensors(8), r=8) if kind == "over-rank" else make(name=kind)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    match kind:
        case "no weights":
            weights.unlink()
        case "no config":
            config.unlink()
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-1])
        case "longer":
            weights.write_bytes(weights.read_bytes() + b"\0")
        case "other rank":
            config.write_text(json.dumps(make.config(r=2)))
        case "empty":
            weights.write_bytes(b"")
        case "a folder":
            weights.unlink()
            weights.mkdir()
    return folder


@pytest.mark.parametrize(
    "kind",
    ["no weights", "no config", "truncated", "longer", "other rank", "empty", "a folder", "over-rank"],
)
def test_nothing_is_left_of_a_folder_that_is_refused(make: AdapterMaker, kind: str) -> None:
    folder = damaged(make, kind)
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(AdapterRejectedError, match="adapter bad@0: ") as refusal:
        build_segment(folder, name="bad@0", digest=None, max_lora_rank=4)
    one_line(refusal.value)
    assert sorted(os.listdir("/proc/self/fd")) == before


def sha256_of(content: bytes) -> str:
    """The sha256 of the head that the bytes say they have."""
    length = int.from_bytes(content[8:16], "little")
    return hashlib.sha256(content[16 : 16 + length]).hexdigest()


@contextmanager
def memory(content: bytes, seals: int = SEALS) -> Iterator[SegmentRef]:
    """A reference to a memfd of these bytes."""
    fd = os.memfd_create("crafted", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(fd, content)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        yield SegmentRef(pid=os.getpid(), fd=fd, size_bytes=len(content), head_sha256=sha256_of(content))
    finally:
        os.close(fd)


def content_of(segment: AdapterSegment) -> bytes:
    return os.pread(segment.ref.fd, segment.ref.size_bytes, 0)


@pytest.mark.parametrize("missing", [fcntl.F_SEAL_WRITE, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_SEAL, SEALS])
def test_what_could_still_be_changed_is_refused(segment: AdapterSegment, missing: int) -> None:
    with (
        memory(content_of(segment), SEALS & ~missing) as ref,
        pytest.raises(SegmentError, match="it is not sealed"),
    ):
        map_segment(ref)


def test_other_bytes_than_the_head_tells_of_are_found_out(segment: AdapterSegment) -> None:
    content = bytearray(content_of(segment))
    content[-1] ^= 1
    with memory(bytes(content)) as ref:
        mapped = map_segment(ref)
        with pytest.raises(SegmentError, match=f"expected {segment.decoded.body_sha256[:16]}"):
            mapped.verify()


def test_another_head_than_was_announced_is_refused(segment: AdapterSegment) -> None:
    content = content_of(segment)
    other = content.replace(b",2.0,", b",4.0,", 1)
    assert other != content
    with memory(other) as ref:
        assert map_segment(ref).modules[Q_PROJ].scaling == 4.0
        announced = dataclasses.replace(ref, head_sha256=segment.ref.head_sha256)
        with pytest.raises(SegmentError, match="its head hashes to"):
            map_segment(announced)


def test_a_reference_that_does_not_fit_is_refused(segment: AdapterSegment, tmp_path: Path) -> None:
    ref = segment.ref
    with pytest.raises(SegmentError, match=f"it has {ref.size_bytes} bytes, expected 1"):
        map_segment(dataclasses.replace(ref, size_bytes=1))
    with pytest.raises(SegmentError, match="has no segment 99999: No such file"):
        map_segment(dataclasses.replace(ref, fd=99999))
    with (
        (tmp_path / "file").open("wb") as file,
        pytest.raises(SegmentError, match=r"segment \d+ of process \d+: "),
    ):
        map_segment(dataclasses.replace(ref, fd=file.fileno()))


def front(text: bytes) -> bytes:
    return b"LoRASeg2" + len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        b"\0" * 4096,
        b"L",
        b"LoRASeg2",
        b"LoRASeg2" + b"\xff" * 8,
        front(b"{}")[:-1],
        front(b"{}"),
        front(b"null"),
        front(b'{"format": 1, "name": Infinity}'),
        front(b"[" * 100_000),
    ],
)
def test_what_is_no_adapter_is_refused(content: bytes) -> None:
    with memory(content) as ref, pytest.raises(SegmentError, match=f"segment {ref.fd} of process"):
        map_segment(ref)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_the_bytes_are_the_answer_is_a_segment_or_a_segment_error(
    segment: AdapterSegment, data: st.DataObject
) -> None:
    """Damage in the front part, where the sizes and names are; its sha256 is announced all the same."""
    content = bytearray(content_of(segment))
    front = 16 + len(segment.head)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, front))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.sampled_from([len(content), data.draw(st.integers(1, len(content)))]))]
    with memory(bytes(content)) as ref:
        try:
            mapped = map_segment(ref)
        except SegmentError:
            return
        for module in mapped.modules.values():
            assert module.a.end <= mapped.size_bytes - mapped.data_start


@contextmanager
def process(*arguments: str) -> "Iterator[subprocess.Popen[str]]":
    """`tests.support.segment_process`, gone afterwards."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.segment_process", *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as one:
        try:
            yield one
        finally:
            one.kill()


def told(one: "subprocess.Popen[str]") -> Any:
    """The next line of a process; pytest's own time limit bounds the wait."""
    assert one.stdout is not None
    return json.loads(one.stdout.readline())


def go_on(one: "subprocess.Popen[str]") -> None:
    assert one.stdin is not None
    one.stdin.write("\n")
    one.stdin.flush()
