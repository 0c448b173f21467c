"""The store knows the head of every segment that its adapters can become, without their weights."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from loraserve.adapters import AdapterStore, StoredAdapter, StoreLimits
from loraserve.adapters.segment import AdapterSegment, SegmentHead, build_segment, map_segment
from loraserve.adapters.segment_folder import SEGMENT_FILE, kept_form
from loraserve.errors import AdapterRejectedError, NotFoundError
from tests.support.adapter_maker import AdapterMaker, Tensors, one_line
from tests.support.full_disk import full_disk
from tests.support.segments import own_segments

LIMITS = StoreLimits(max_lora_rank=64)
NAME = "one@0123456789abcdef"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    """A store; at the end no temporary folder is in it, and no segment in this process."""
    before = own_segments()
    yield AdapterStore(tmp_path / "store", base=None, limits=LIMITS)
    assert own_segments() == before
    assert [path.name for path in (tmp_path / "store").iterdir() if len(path.name) != 16] == []


@pytest.fixture
def stored(store: AdapterStore, make: AdapterMaker) -> StoredAdapter:
    return store.add("one", str(make()))


def built(directory: Path, digest: str) -> AdapterSegment:
    return build_segment(directory, name=NAME, digest=digest, max_lora_rank=64)


def replaced(path: Path, content: bytes) -> None:
    """As a disk that forgets, or an attacker; files of the store are read-only."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


@st.composite
def adapters(draw: st.DrawFn) -> tuple[Tensors, dict[str, Any]]:
    """Tensors, some larger than a chunk of the body, and a config that fits them."""
    tensors: Tensors = {}
    ranks: dict[str, int] = {}
    for layer in draw(st.lists(st.integers(0, 12), unique=True, min_size=1, max_size=2)):
        for leaf in draw(
            st.lists(st.sampled_from(["q_proj", "o_proj", "up_proj", "x"]), unique=True, min_size=1)
        ):
            module = f"model.layers.{layer}.{leaf}"
            ranks[f"^{module}"] = rank = draw(st.integers(1, 6))
            dtype = draw(st.sampled_from([np.float32, np.float16]))
            for side in "AB":
                width = draw(st.sampled_from([1, 7, 24, 80_000]))
                shape = (rank, width) if side == "A" else (width, rank)
                values = np.arange(rank * width, dtype=np.uint32) % 2039 + layer
                tensors[f"base_model.model.{module}.lora_{side}.weight"] = values.astype(dtype).reshape(shape)
    return tensors, {
        "r": draw(st.integers(1, 6)),
        "target_modules": ".*",
        "rank_pattern": ranks,
        "use_rslora": draw(st.booleans()),
        "alpha_pattern": draw(st.sampled_from([{}, {"q_proj": 3}])),
    }


@settings(deadline=None, max_examples=20)
@given(adapter=adapters())
def test_the_head_in_the_store_is_that_of_the_segment_that_is_built(
    adapter: tuple[Tensors, dict[str, Any]],
) -> None:
    tensors, changes = adapter
    with TemporaryDirectory() as folder:
        store = AdapterStore(Path(folder) / "store", base=None, limits=LIMITS)
        stored = store.add("one", str(AdapterMaker(Path(folder))(tensors=tensors, **changes)))
        sha256 = stored.manifest.sha256
        head = store.segment_head(sha256, NAME)
        check_segment(built(stored.directory, sha256), head, stored)
        # A folder without a head has its own worked out.
        (stored.directory / SEGMENT_FILE).unlink()
        check_segment(built(stored.directory, sha256), head, stored)
        assert store.segment_head(sha256, NAME) == head


def check_segment(segment: AdapterSegment, head: bytes, stored: StoredAdapter) -> None:
    """It has this head, all bytes are as hashed, and all values as in the files."""
    assert segment.head == head
    SegmentHead.decode(head).check(
        name=NAME, digest=stored.manifest.sha256, max_lora_rank=stored.manifest.rank, max_bytes=2**27
    )
    mapped = map_segment(segment.ref)
    segment.close()
    mapped.verify()
    weights = load_file(stored.directory / "adapter_model.safetensors")
    for module in mapped.modules.values():
        for tensor in (module.a, module.b):
            expected = weights.pop(tensor.name)
            begin = mapped.data_start + tensor.begin
            assert mapped.memory[begin : begin + expected.nbytes] == expected.tobytes()
            assert tensor.shape == expected.shape
    assert not weights


def test_the_head_is_there_from_the_beginning_and_reads_no_weights(
    store: AdapterStore, stored: StoredAdapter
) -> None:
    head = store.segment_head(stored.manifest.sha256, NAME)
    assert not (stored.directory / SEGMENT_FILE).stat().st_mode & 0o222
    replaced(stored.directory / "adapter_model.safetensors", b"none")
    assert store.segment_head(stored.manifest.sha256, NAME) == head
    other = SegmentHead.decode(store.segment_head(stored.manifest.sha256, "two@0"))
    assert (other.name, other.digest) == ("two@0", stored.manifest.sha256)


def older_form(kept: bytes) -> bytes:
    """As it was kept when the sha256 in a head was that of the body as a whole."""
    head = json.loads(kept[32:])
    del head["chunk_sha256s"]
    raw = msgspec.json.encode(head | {"format": 1})
    assert raw.startswith(b'{"format":1,"name":')
    return hashlib.sha256(raw).digest() + raw


@pytest.mark.parametrize(
    "harm", ["older", "older form", "cut off", "changed", "another adapter's", "empty", "a folder"]
)
def test_a_head_that_is_not_there_or_not_sound_is_made_again(
    store: AdapterStore, stored: StoredAdapter, make: AdapterMaker, harm: str
) -> None:
    sha256, path = stored.manifest.sha256, stored.directory / SEGMENT_FILE
    head, kept = store.segment_head(sha256, NAME), path.read_bytes()
    other = store.add("other", str(make(tensors=make.tensors(seed=1)))).directory / SEGMENT_FILE
    path.unlink()
    if harm == "a folder":
        path.mkdir()
    elif harm != "older":
        harmed = {
            "older form": older_form(kept),
            "cut off": kept[:-1],
            "changed": kept[:-9] + b"B" + kept[-8:],
            "empty": b"",
        }
        path.write_bytes(harmed.get(harm) or (other.read_bytes() if harm != "empty" else b""))
    assert store.segment_head(sha256, NAME) == head
    segment = built(stored.directory, sha256)
    assert segment.head == head
    segment.close()
    if harm != "a folder":
        assert path.read_bytes() == kept
        assert not path.stat().st_mode & 0o222
        replaced(stored.directory / "adapter_model.safetensors", b"none")
        assert store.segment_head(sha256, NAME) == head


def test_a_head_of_corrupt_weights_is_never_made(store: AdapterStore, stored: StoredAdapter) -> None:
    weights = stored.directory / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-8] ^= 1
    replaced(weights, bytes(content))
    (stored.directory / SEGMENT_FILE).unlink()
    with pytest.raises(AdapterRejectedError, match="corrupt"):
        store.segment_head(stored.manifest.sha256, NAME)
    assert not (stored.directory / SEGMENT_FILE).exists()


def test_content_that_is_not_there_has_no_head(store: AdapterStore) -> None:
    with pytest.raises(NotFoundError, match="not in the store"):
        store.segment_head("0" * 64, NAME)


def test_a_full_disk_costs_time_and_no_answer(store: AdapterStore, stored: StoredAdapter) -> None:
    head = store.segment_head(stored.manifest.sha256, NAME)
    (stored.directory / SEGMENT_FILE).unlink()
    with full_disk(stored.directory, room_bytes=10):
        assert store.segment_head(stored.manifest.sha256, NAME) == head
    assert not (stored.directory / SEGMENT_FILE).exists()


def test_many_who_ask_an_older_entry_at_once_get_one_answer(
    store: AdapterStore, stored: StoredAdapter
) -> None:
    head = store.segment_head(stored.manifest.sha256, NAME)
    (stored.directory / SEGMENT_FILE).unlink()
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(store.segment_head, stored.manifest.sha256, NAME) for _ in range(16)]
    assert {one.result() for one in asked} == {head}


def test_a_folder_with_other_content_than_announced_is_refused(
    stored: StoredAdapter, make: AdapterMaker
) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    # Its head is that of the content that is asked for: it is not believed.
    other = make(tensors=make.tensors(seed=1))
    shutil.copy(stored.directory / SEGMENT_FILE, other)
    with pytest.raises(AdapterRejectedError, match=f"not {stored.manifest.sha256[:16]}") as refusal:
        built(other, stored.manifest.sha256)
    one_line(refusal.value)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_head_that_lies_of_the_body_is_not_believed(store: AdapterStore, stored: StoredAdapter) -> None:
    head = SegmentHead.decode(store.segment_head(stored.manifest.sha256, NAME))
    lies = SegmentHead.decode(head.encode().replace(b",2.0,", b",4.0,"))
    assert lies != head
    replaced(stored.directory / SEGMENT_FILE, kept_form(lies))
    segment = built(stored.directory, stored.manifest.sha256)
    assert segment.decoded == head
    segment.close()
