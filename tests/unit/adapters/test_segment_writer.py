"""Memory for a segment becomes final at once and for all, or is gone; nothing of it leaks."""

import gc
import mmap
import os
import resource
from collections.abc import Iterator

import numpy as np
import pytest

from loraserve.adapters.body_hashes import hash_chunks
from loraserve.adapters.safetensors_file import TensorInfo
from loraserve.adapters.segment import SegmentError, SegmentHead, SegmentWriter, map_segment
from loraserve.adapters.segment_head import hashed, plan_head
from tests.support.segment_process import refused
from tests.support.segments import holders

NAME = f"written-{os.getpid()}@0"
BODY = bytes(range(1, 97)) * 2


def tensor(side: str, shape: tuple[int, int]) -> TensorInfo:
    return TensorInfo(name=f"base_model.model.m.lora_{side}.weight", dtype="F16", shape=shape, begin=0, end=0)


PLANNED = plan_head([tensor("A", (4, 16)), tensor("B", (8, 4))], {"m": 2.0}, name=NAME)
HEAD = hashed(PLANNED, digest="d" * 64, hashes=hash_chunks([BODY]))


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    """Neither memory nor a descriptor."""
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    assert not holders(NAME, [os.getpid()])
    assert sorted(os.listdir("/proc/self/fd")) == before


def written() -> SegmentWriter:
    writer = SegmentWriter(HEAD.encode())
    writer.body[:] = BODY
    return writer


def test_what_is_written_is_sealed_mapped_and_served() -> None:
    writer = SegmentWriter(HEAD.encode())
    assert bytes(writer.body) == bytes(HEAD.body_bytes)
    writer.body[:] = BODY
    segment = writer.seal()
    assert set(refused(segment.fd, segment.size_bytes).values()) == {"PermissionError"}
    mapped = map_segment(segment.ref)
    mapped.verify()
    assert mapped.memory[mapped.data_start :] == BODY
    head, body, fd, offset = segment.region()
    assert SegmentHead.decode(head) == segment.decoded == HEAD
    assert (bytes(body), os.pread(fd, len(BODY), offset)) == (BODY, BODY)
    assert (segment.body_bytes, segment.size_bytes, segment.rank) == (192, offset + 192, 4)
    assert body.readonly
    assert segment.region().body is body
    segment.close()
    segment.close()
    assert bytes(body) == BODY


def test_a_closed_segment_says_so() -> None:
    segment = written().seal()
    segment.close()
    for use in (segment.region, lambda: segment.fd, lambda: segment.ref):
        with pytest.raises(SegmentError, match=f"the segment of {NAME} is closed"):
            use()


def test_the_head_may_tell_the_hashes_at_the_end_and_nothing_else() -> None:
    writer = SegmentWriter(PLANNED.encode())
    writer.body[:] = BODY
    other = plan_head([tensor("A", (4, 16)), tensor("B", (9, 4))], {"m": 2.0}, name=NAME)
    with pytest.raises(SegmentError, match="does not fit"):
        writer.seal_as(other)
    segment = writer.seal_as(HEAD)
    assert segment.head == HEAD.encode()
    map_segment(segment.ref).verify()
    segment.close()


@pytest.mark.parametrize("view", [lambda body: body[3:5], lambda body: np.frombuffer(body, np.uint8)])
def test_who_can_still_write_keeps_it_from_being_sealed_and_harms_nobody_later(view: object) -> None:
    writer = written()
    late = view(writer.body)  # type: ignore[operator]
    with pytest.raises(SegmentError, match=f"{NAME}: it cannot be sealed: "):
        writer.seal()
    writer.abandon()
    other = written().seal()
    late[0] = 0
    map_segment(other.ref).verify()
    other.close()
    del late, writer


def test_another_mapping_that_can_write_keeps_it_from_being_sealed() -> None:
    writer = written()
    fd = os.open(f"/proc/self/fd/{writer._fd}", os.O_RDWR)
    mapping = mmap.mmap(fd, 4096)
    os.close(fd)
    with pytest.raises(SegmentError, match=r"it cannot be sealed: .*busy"):
        writer.seal()
    mapping.close()
    writer.abandon()


def test_abandoning_may_be_repeated_and_spares_what_is_sealed() -> None:
    writer = written()
    writer.abandon()
    writer.abandon()
    writer = written()
    segment = writer.seal()
    writer.abandon()
    assert bytes(segment.region().body) == BODY
    segment.close()


def test_without_room_nothing_is_made() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.dup(0) for _ in range(2)]
    for fd in free:
        os.close(fd)
    # No descriptor for the memory itself, then none for its mapping.
    for limit in free:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                SegmentWriter(HEAD.encode())
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_bytes_that_are_no_head_get_no_memory() -> None:
    with pytest.raises(SegmentError):
        SegmentWriter(b"{}")
