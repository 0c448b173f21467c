"""A replica's fabric is what its configuration says, within what the process may have."""

import resource
from typing import Any

import pytest

from loraserve.config import parse_config
from loraserve.fabric.fabric import Fabric
from loraserve.replica.fabric_start import FILES_PER_CACHED, open_fabric
from tests.support.fabric_kit import Library


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(tmp_path_factory.mktemp("adapters"))


async def opened(monkeypatch: pytest.MonkeyPatch, *, num_files: int, **engine: Any) -> Fabric:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (num_files, num_files))
    config = parse_config(
        {"engine": {"kind": "emulated", **engine}, "fabric": {"transports": ["tcp"], "max_fetches": 1}}
    )
    fabric = open_fabric(config, "127.0.0.1")
    assert fabric is not None
    return fabric


@pytest.mark.parametrize("files", [{"fabric": {"transports": []}}, {"engine": {"lora_execution": "stock"}}])
async def test_where_nothing_is_fetched_there_is_none(files: dict[str, Any]) -> None:
    assert open_fabric(parse_config(files), "127.0.0.1") is None


@pytest.mark.parametrize(("num_files", "num_kept"), [(2 * FILES_PER_CACHED, 2), (resource.RLIM_INFINITY, 3)])
async def test_so_many_segments_are_kept_as_there_are_descriptors_for(
    monkeypatch: pytest.MonkeyPatch, library: Library, num_files: int, num_kept: int
) -> None:
    fabric = await opened(monkeypatch, num_files=num_files)
    for number in range(3):
        await fabric.prefetch(library(f"n{number}"))
    assert len(fabric.cached()) == num_kept
    await fabric.close()


async def test_what_the_pool_may_hold_fits_with_its_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    fabric = await opened(monkeypatch, num_files=1024, pool_bytes=10**9)
    assert fabric.capacity_bytes > 1.02 * 10**9
    assert [scheme for scheme, _ in fabric.addresses] == ["tcp"]
    await fabric.close()
