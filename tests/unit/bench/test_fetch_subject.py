"""The adapters that `bench fetch` makes, and the pages of their files."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.adapters.segment import build_segment
from loraserve.bench.fetch_pages import drop_pages, share_in_memory
from loraserve.bench.fetch_subject import MIB, made, parse_size, shape_of_rank, shape_of_size, show_size
from loraserve.errors import BadInputError, WorkFailedError
from tests.support.adapter_maker import small_base


@pytest.mark.parametrize(
    ("text", "size_bytes"), [("1MiB", MIB), ("512KiB", MIB // 2), (" 2GiB ", 2048 * MIB), ("8GiB", 2**33)]
)
def test_sizes_are_read_as_people_write_them(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "1", "1MB", "-1MiB", "1.5MiB", "0KiB", "9GiB", "١MiB", "1 MiB"])
def test_what_is_no_size_is_one_line_with_an_example(text: str) -> None:
    with pytest.raises(BadInputError, match="expected such as 512KiB"):
        parse_size(text)


@given(st.integers(MIB, 2048 * MIB))
def test_an_adapter_of_a_size_has_about_that_size(size_bytes: int) -> None:
    assert shape_of_size(size_bytes).body_bytes == pytest.approx(size_bytes, rel=0.01)


def test_an_adapter_of_a_rank_changes_every_matrix_of_the_layers() -> None:
    shape = shape_of_rank(small_base(), 4)
    assert shape.label == "r4"
    assert set(shape.modules) == {
        f"model.layers.{layer}.self_attn.{leaf}" for layer in range(2) for leaf in ("q_proj", "v_proj")
    }


def test_what_is_made_is_one_content_in_a_folder_and_in_a_store_and_gone_afterwards(tmp_path: Path) -> None:
    with made(shape_of_size(64 * 1024), tmp_path) as subject:
        heads = []
        for folder, digest in ((subject.folder, None), (subject.stored, subject.digest)):
            segment = build_segment(folder, name=subject.version, digest=digest, max_lora_rank=512)
            heads.append(segment.head)
            assert segment.body_bytes == subject.body_bytes
            assert segment.decoded.digest == subject.digest
            segment.close()
        assert heads[0] == heads[1]
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_for_which_there_is_no_room_is_not_begun(tmp_path: Path) -> None:
    shape = shape_of_size(64 * 1024)
    huge = type(shape)(label="huge", rank=512, modules=dict.fromkeys(shape.modules, (2**40, 2**40)))
    with pytest.raises(WorkFailedError, match="are free, huge needs"), made(huge, tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_pages_that_were_read_are_in_memory_and_say_so(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(3 * 4096 + 1))
    assert share_in_memory(file) == 1.0
    drop_pages(file)
    # Where the folder lies in memory they stay; what is asked of the kernel is never more than all.
    assert share_in_memory(file) in (0.0, 1.0)
    file.write_bytes(b"")
    assert share_in_memory(file) == 0.0


def test_sizes_are_shown_short() -> None:
    assert [show_size(one) for one in (5, 2048, 3 * MIB, 2048 * MIB)] == [
        "5 bytes",
        "2 KiB",
        "3 MiB",
        "2 GiB",
    ]
