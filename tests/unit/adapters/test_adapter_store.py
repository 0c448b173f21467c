"""The store: complete or absent, addressed by content, and nothing left behind."""

import asyncio
import os
import shutil
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from loraserve.adapters import AdapterStore, BaseModel, StoredAdapter, StoreLimits, inspect_adapter
from loraserve.adapters.safetensors_file import encode_header
from loraserve.errors import AdapterRejectedError, NotFoundError, WorkFailedError
from tests.support.adapter_maker import PREFIX, AdapterMaker

LIMITS = StoreLimits(max_lora_rank=64, allow_urls=("memory://loras",))


class FakeHub:
    """Serves one repository from a folder."""

    def __init__(self, repository: str, folder: Path) -> None:
        self._repository = repository
        self._folder = folder
        self.asked: list[tuple[str, str | None]] = []

    def download(self, repository: str, revision: str | None, into: Path, *, max_bytes: int) -> None:
        self.asked.append((repository, revision))
        if repository != self._repository:
            raise AdapterRejectedError(f"{repository}: not on this hub")
        for file in self._folder.iterdir():
            shutil.copy(file, into)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """The store's folder; at the end it holds nothing but entries."""
    root = tmp_path / "store"
    yield root
    assert [path.name for path in root.iterdir() if len(path.name) != 16] == []


@pytest.fixture
def store(root: Path, base: BaseModel) -> AdapterStore:
    return AdapterStore(root, base=base, limits=LIMITS)


def _bytes(folder: Path) -> tuple[bytes, bytes]:
    return (
        (folder / "adapter_config.json").read_bytes(),
        (folder / "adapter_model.safetensors").read_bytes(),
    )


def _clean(root: Path) -> bool:
    return list(root.iterdir()) == []


def _damage(stored: StoredAdapter, name: str) -> None:
    path = stored.directory / name
    path.chmod(0o644)
    raw = bytearray(path.read_bytes())
    raw[-8] ^= 1
    path.write_bytes(raw)


def test_a_plain_adapter_is_stored_byte_for_byte(
    store: AdapterStore, root: Path, base: BaseModel, make: AdapterMaker
) -> None:
    source = make()
    (source / "README.md").write_text("not fetched")
    stored = store.add("sql", str(source))
    assert stored.directory == root / stored.manifest.sha256[:16]
    assert _bytes(stored.directory) == _bytes(source)
    assert not (stored.directory / "README.md").exists()
    assert stored.manifest == inspect_adapter(source, base=base, max_lora_rank=64)
    assert store.contents() == (stored.manifest.sha256,)
    assert store.directory_of(stored.manifest.sha256) == stored.directory
    assert store.verify(stored.manifest.sha256) == stored.manifest
    assert not any(path.stat().st_mode & 0o222 for path in stored.directory.iterdir())


def test_the_same_content_is_stored_once_and_other_content_beside_it(
    store: AdapterStore, make: AdapterMaker
) -> None:
    first = store.add("a", str(make()))
    inode = first.directory.stat().st_ino
    again = store.add("b", f"file://{make()}")
    assert (again.name, again.directory) == ("b", first.directory)
    assert again.directory.stat().st_ino == inode
    other = store.add("a", str(make(tensors=make.tensors(seed=1))))
    assert other.directory != first.directory
    assert len(store.contents()) == 2


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_corrupt_entry_is_detected_and_replaced(store: AdapterStore, make: AdapterMaker, name: str) -> None:
    source = make()
    stored = store.add("a", str(source))
    _damage(stored, name)
    with pytest.raises(AdapterRejectedError):
        store.verify(stored.manifest.sha256)
    store.add("a", str(source))
    assert store.verify(stored.manifest.sha256) == stored.manifest


def test_an_incomplete_entry_is_not_served(store: AdapterStore, make: AdapterMaker) -> None:
    stored = store.add("a", str(make()))
    (stored.directory / "adapter_model.safetensors").unlink()
    with pytest.raises(NotFoundError, match="not in the store"):
        store.directory_of(stored.manifest.sha256)
    assert store.contents() == ()


def test_remove_deletes_and_may_be_repeated(store: AdapterStore, root: Path, make: AdapterMaker) -> None:
    stored = store.add("a", str(make()))
    store.remove(stored.manifest.sha256)
    store.remove(stored.manifest.sha256)
    assert _clean(root)
    with pytest.raises(NotFoundError, match="not in the store"):
        store.verify(stored.manifest.sha256)


def test_a_digest_that_is_none_never_becomes_a_path(store: AdapterStore) -> None:
    for sha256 in ("../../etc", "", "0" * 63, "G" * 64):
        with pytest.raises(NotFoundError, match="64 hexadecimal digits"):
            store.remove(sha256)


def _break_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


def _break_weights(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])


def _lose_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def _link_out(folder: Path) -> None:
    _lose_weights(folder)
    (folder / "adapter_model.safetensors").symlink_to("/etc/hostname")


@pytest.mark.parametrize("harm", [_break_config, _break_weights, _lose_weights, _link_out])
def test_a_refused_adapter_leaves_nothing_behind(
    store: AdapterStore, root: Path, make: AdapterMaker, harm: Callable[[Path], None]
) -> None:
    source = make()
    harm(source)
    with pytest.raises(AdapterRejectedError) as caught:
        store.add("a", str(source))
    assert str(caught.value).startswith(str(source))
    assert _clean(root)


def test_an_unsafe_name_is_refused_before_anything_is_fetched(store: AdapterStore, root: Path) -> None:
    with pytest.raises(AdapterRejectedError, match="adapter name"):
        store.add("../a", "/nowhere")
    assert _clean(root)


def test_limits_hold_while_copying(root: Path, base: BaseModel, make: AdapterMaker) -> None:
    small = AdapterStore(root, base=base, limits=replace(LIMITS, max_bytes=100))
    with pytest.raises(AdapterRejectedError, match="at most 100 are allowed"):
        small.add("a", str(make()))
    low = AdapterStore(root, base=base, limits=replace(LIMITS, max_lora_rank=1))
    with pytest.raises(AdapterRejectedError, match="rank is 4; no replica allows more than 1"):
        low.add("a", str(make()))
    assert _clean(root)


def test_an_allowed_url_is_fetched_and_nothing_but_its_two_files(
    store: AdapterStore, make: AdapterMaker
) -> None:
    memory = fsspec.filesystem("memory")
    source = make()
    memory.put(str(source), "/loras/a", recursive=True)
    stored = store.add("a", "memory://loras/a")
    assert _bytes(stored.directory) == _bytes(source)
    with pytest.raises(AdapterRejectedError, match=r"memory://loras/b/adapter_config\.json: not found"):
        store.add("b", "memory://loras/b")
    with pytest.raises(AdapterRejectedError, match="allow_urls"):
        store.add("c", "memory://secret/a")


def test_a_url_of_an_unknown_kind_is_refused_in_one_line(root: Path, base: BaseModel) -> None:
    store = AdapterStore(root, base=base, limits=replace(LIMITS, allow_urls=("nope://",)))
    with pytest.raises(AdapterRejectedError, match=r"nope://x/adapter_config\.json: cannot fetch it"):
        store.add("a", "nope://x")
    assert _clean(root)


def test_a_hub_repository_is_fetched_through_the_hub(root: Path, base: BaseModel, make: AdapterMaker) -> None:
    source = make()
    hub = FakeHub("acme/sql", source)
    store = AdapterStore(root, base=base, limits=LIMITS, hub=hub)
    assert _bytes(store.add("a", "acme/sql@main").directory) == _bytes(source)
    assert hub.asked == [("acme/sql", "main")]
    with pytest.raises(AdapterRejectedError, match="acme/other: not on this hub"):
        store.add("b", "acme/other")
    _lose_weights(source)
    with pytest.raises(AdapterRejectedError, match=r"acme/sql: adapter_model\.safetensors is missing"):
        store.add("c", "acme/sql")


def test_the_real_hub_offline_is_one_clear_line(
    store: AdapterStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AdapterRejectedError, match="acme/sql: cannot fetch it from the Hugging Face hub"):
        store.add("a", "acme/sql")
    assert _clean(root)


def test_a_stopped_fetch_leaves_nothing_behind(store: AdapterStore, root: Path, make: AdapterMaker) -> None:
    with pytest.raises(AdapterRejectedError, match="stopped"):
        store.add("a", str(make()), stop=lambda: True)
    assert _clean(root)


async def test_a_fetch_that_takes_too_long_is_refused_and_cleaned_up(
    root: Path, base: BaseModel, make: AdapterMaker
) -> None:
    source, started, release = make(), threading.Event(), threading.Event()

    class SlowHub(FakeHub):
        def download(self, repository: str, revision: str | None, into: Path, *, max_bytes: int) -> None:
            started.set()
            assert release.wait(30)
            super().download(repository, revision, into, max_bytes=max_bytes)

    store = AdapterStore(root, base=base, limits=LIMITS, hub=SlowHub("acme/sql", source))
    try:
        with pytest.raises(AdapterRejectedError, match=r"not fetched and checked within 0\.05 s"):
            await store.add_async("a", "acme/sql", timeout_s=0.05)
    finally:
        release.set()
    await asyncio.get_running_loop().shutdown_default_executor()
    assert started.is_set()
    assert _clean(root)


async def test_many_adds_of_one_content_at_once_agree(store: AdapterStore, make: AdapterMaker) -> None:
    source = str(make())
    stored = await asyncio.gather(*(store.add_async(f"a{i}", source, timeout_s=60) for i in range(8)))
    assert len({one.directory for one in stored}) == 1
    assert store.verify(stored[0].manifest.sha256) == stored[0].manifest


def test_what_a_dead_process_left_is_swept_and_a_live_one_is_spared(
    root: Path, base: BaseModel, make: AdapterMaker
) -> None:
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    (root / f".tmp-{dead}-x" / "fetched").mkdir(parents=True)
    live = root / f".tmp-{os.getpid()}-x"
    live.mkdir()
    AdapterStore(root, base=base, limits=LIMITS)
    assert [path.name for path in root.iterdir()] == [live.name]
    live.rmdir()


def test_a_failing_disk_is_the_stores_fault_not_the_adapters(
    root: Path, base: BaseModel, make: AdapterMaker
) -> None:
    store = AdapterStore(root, base=base, limits=LIMITS)
    root.rmdir()
    with pytest.raises(WorkFailedError, match="the adapter store failed"):
        store.add("a", str(make()))
    root.mkdir()


def test_a_large_adapter_needs_little_memory(root: Path, make: AdapterMaker) -> None:
    """128 MiB of zeros in one tensor (a sparse file), with a NaN as its very last value."""
    folder = make(target_modules=["q_proj"])
    shapes: dict[str, tuple[int, ...]] = {"A": (4, 2**23), "B": (2**23, 4)}
    names = {f"{PREFIX}.q_proj.lora_{side}.weight": ("F16", shape) for side, shape in shapes.items()}
    header = encode_header(names, {})
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(header)
    os.truncate(weights, len(header) + 2**27)
    store = AdapterStore(root, base=None, limits=LIMITS)
    tracemalloc.start()
    try:
        assert store.add("a", str(folder)).manifest.size_bytes == 2**27
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()
    with weights.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(bytes.fromhex("007e"))
    with pytest.raises(AdapterRejectedError, match="NaN or infinity"):
        store.add("b", str(folder))
