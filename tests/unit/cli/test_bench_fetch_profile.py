"""Speeds that were measured go into a profile, and nothing else of it changes."""

from dataclasses import replace
from pathlib import Path

import pytest

from loraserve.bench.fetch_figures import FetchRow, Source, spread_s
from loraserve.cli.bench_fetch_profile import check_profile, keep_speeds
from loraserve.errors import BadInputError
from loraserve.profiling.files import find_profile, read_profile, shipped_profiles, write_profile


def row(source: Source, size_bytes: int, seconds: float) -> FetchRow:
    return FetchRow(
        label=f"{size_bytes}", rank=8, size_bytes=size_bytes, source=source, resident=spread_s([seconds])
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    write_profile(path, find_profile(shipped_profiles()[0]))
    return path


def test_the_largest_adapter_from_the_faster_peer_and_from_the_store_are_kept(path: Path) -> None:
    before = read_profile(path)
    rows = [
        row("ucx", 1000, 0.001), row("tcp", 1000, 0.002), row("ucx", 9000, 3.0), row("tcp", 9000, 1.0),
        row("origin", 9000, 2.0), row("cold_disk", 9000, 0.1),
    ]  # fmt: skip
    assert keep_speeds(path, rows) == (9000.0, 4500.0)
    after = read_profile(path)
    assert (after.speeds.peer_bytes_per_s, after.speeds.origin_bytes_per_s) == (9000.0, 4500.0)
    assert after.speeds.host_to_gpu_bytes_per_s == before.speeds.host_to_gpu_bytes_per_s
    assert "over tcp" in after.origins["speeds.peer_bytes_per_s"]
    assert replace(after, speeds=before.speeds, origins=before.origins) == before


def test_what_was_not_measured_stays_as_it_was(path: Path) -> None:
    before = read_profile(path)
    assert keep_speeds(path, [row("page_cache", 1000, 1.0)]) == (None, None)
    assert read_profile(path) == before


def test_what_is_no_profile_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="cannot read the profile"):
        check_profile(tmp_path / "none.toml")
