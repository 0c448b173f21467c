"""What the controller's store keeps, and what it refuses to open."""

import json
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest

from loraserve.controller.store import SCHEMA_VERSION, Changes, Store, StoredRegistration
from loraserve.errors import BadInputError, WorkFailedError
from placement.cluster.records import DrainOrder
from placement.types import AdapterName, AdapterVersion, Holder, Placement, ReplicaId, VersionId
from tests.support.cli import run_cli
from tests.support.full_disk import full_disk

R0, R1 = ReplicaId("replica-0"), ReplicaId("replica-1")
ORDER = DrainOrder(deadline_s=3.5, force=True, done=True)


def registration(name: str, digit: str = "1") -> StoredRegistration:
    adapter = AdapterVersion(
        version_id=VersionId(f"{name}@{digit * 16}"),
        name=AdapterName(name),
        sha256=digit * 64,
        rank=8,
        size_bytes=123,
    )
    return StoredRegistration(adapter=adapter, source="/a", target_modules=("q_proj", "v_proj"))


def test_everything_comes_back_in_the_order_of_registration(tmp_path: Path) -> None:
    path = tmp_path / "controller.sqlite"
    plan = Placement(
        MappingProxyType({VersionId("a@1"): (Holder(replica_id=ReplicaId("replica-0"), share=1.0),)})
    )
    store = Store(path)
    for one in (registration("b"), registration("a"), registration("a", "2")):
        store.save_adapter(one)
    store.write(
        Changes(
            deleted={registration("b").adapter.version_id},
            plan=plan,
            table_version=41,
            drains={R0: ORDER, R1: ORDER},
        )
    )
    store.write(Changes(drains={R1: None}))
    store.close()
    again = Store(path)
    assert again.adapters() == [registration("a"), registration("a", "2")]
    assert again.plan() == plan
    assert again.table_version() == 41
    assert again.drains() == {R0: ORDER}
    again.close()


def test_settings_are_kept_one_by_one_and_forgotten_with_the_run(tmp_path: Path) -> None:
    path = tmp_path / "controller.sqlite"
    store = Store(path)
    assert not store.begin_life("run-1", "m")
    store.write(Changes(max_lora_ranks={R0: 8, R1: 16}))
    store.write(Changes(max_lora_ranks={R1: None}))
    store.close()
    again = Store(path)
    assert again.begin_life("run-1", "m")
    assert again.max_lora_ranks() == {R0: 8}
    assert not again.begin_life("run-2", "m")
    assert again.max_lora_ranks() == {}
    again.close()


def test_what_was_written_survives_without_a_close(tmp_path: Path) -> None:
    path = tmp_path / "controller.sqlite"
    store = Store(path)
    store.save_adapter(registration("a"))
    other = Store(path)
    assert other.adapters() == [registration("a")]
    other.close()
    store.close()


def test_only_the_same_run_is_recovered_with_its_drains(tmp_path: Path) -> None:
    store = Store(tmp_path / "controller.sqlite")
    assert not store.begin_life("run-1", "model")
    store.write(Changes(drains={R0: ORDER}))
    assert store.begin_life("run-1", "model")
    assert store.drains() == {R0: ORDER}
    assert not store.begin_life("run-2", "model")
    assert store.drains() == {}
    store.close()


def test_adapters_of_another_base_model_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "controller.sqlite")
    store.begin_life("run", "model-a")
    store.begin_life("run", "model-b")
    store.save_adapter(registration("a"))
    with pytest.raises(BadInputError, match=r"'model-b', not 'model-a'.*--fresh"):
        store.begin_life("run", "model-a")
    store.close()


def version_1(path: Path, *kept: StoredRegistration) -> None:
    """A store as the first release wrote it."""
    with closing(sqlite3.connect(path, isolation_level=None)) as raw:
        raw.execute("PRAGMA journal_mode=WAL")
        raw.executescript(
            """
            CREATE TABLE adapters (
                sequence INTEGER PRIMARY KEY AUTOINCREMENT, version_id TEXT NOT NULL UNIQUE,
                name TEXT NOT NULL, sha256 TEXT NOT NULL, rank INTEGER NOT NULL,
                size_bytes INTEGER NOT NULL, source TEXT NOT NULL, target_modules TEXT NOT NULL
            ) STRICT;
            CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
            PRAGMA user_version=1;
            """
        )
        for one in kept:
            adapter = one.adapter
            raw.execute(
                "INSERT INTO adapters (version_id, name, sha256, rank, size_bytes, source, target_modules)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    *(adapter.version_id, adapter.name, adapter.sha256, adapter.rank, adapter.size_bytes),
                    *(one.source, json.dumps(one.target_modules)),
                ),
            )
        raw.execute("INSERT INTO meta VALUES ('table_version', '7'), ('base_model', 'm'), ('run_id', 'r')")


def test_a_store_of_the_first_release_is_taken_over_with_all_it_has(tmp_path: Path) -> None:
    path = tmp_path / "controller.sqlite"
    version_1(path, registration("b"), registration("a"))
    for _ in range(2):
        store = Store(path)
        assert store.adapters() == [registration("b"), registration("a")]
        assert store.table_version() == 7
        assert store.begin_life("r", "m"), "the run is known"
        store.write(Changes(drains={R0: ORDER}))
        store.close()


@pytest.mark.parametrize(
    "damage",
    [
        """UPDATE adapters SET target_modules = '["q_proj", "v_pr'""",
        "UPDATE adapters SET target_modules = '8'",
        "UPDATE meta SET value = '4x' WHERE key = 'table_version'",
        """INSERT INTO meta VALUES ('plan', '{"a@1": {"replica-0": 1.')""",
        """INSERT INTO meta VALUES ('plan', '["a@1"]')""",
        """INSERT INTO meta VALUES ('plan', '{"a@1": ["replica-0"]}')""",
        """INSERT INTO meta VALUES ('plan', '{"a@1": {"replica-0": "all"}}')""",
    ],
)
def test_a_damaged_store_of_the_first_release_is_refused_and_left_alone(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "controller.sqlite"
    version_1(path, registration("a"))
    with closing(sqlite3.connect(path, isolation_level=None)) as raw:
        raw.execute(damage)
    before = path.read_bytes()
    with pytest.raises(BadInputError, match=r"controller\.sqlite: .*; restore it or move it away"):
        Store(path)
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_a_disk_too_full_to_take_an_old_store_over_leaves_it_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "controller.sqlite"
    version_1(path, *(replace(registration(name), source="x" * 20_000) for name in "abc"))
    before = path.read_bytes()
    with full_disk(path, room_bytes=40_000), pytest.raises(WorkFailedError, match=f"{path}: .*disk"):
        Store(path)
    assert path.read_bytes() == before
    Store(path).close()


def filled(path: Path) -> list[StoredRegistration]:
    store = Store(path)
    store.begin_life("run", "model")
    kept = [registration(f"adapter-{index}", "0123456789abcdef"[index % 16]) for index in range(40)]
    for one in kept:
        store.save_adapter(one)
    store.write(Changes(table_version=41, drains={R0: ORDER}))
    store.close()
    return kept


def test_no_damaged_page_is_ever_read_as_something_else(tmp_path: Path) -> None:
    path = tmp_path / "controller.sqlite"
    kept = filled(path)
    sound = path.read_bytes()
    refused = 0
    for begin in range(0, len(sound), 512):
        for torn in (bytes(512), b"\x5a" * 512):
            path.write_bytes(sound[:begin] + torn + sound[begin + 512 :])
            damaged = path.read_bytes()
            try:
                store = Store(path)
            except BadInputError as error:
                line = str(error)
            else:
                line = ""
            if line:
                refused += 1
                assert line.startswith(f"{path}: ")
                assert "\n" not in line
                assert path.read_bytes() == damaged, "a refused file is left as it is"
                continue
            # What was hit holds nothing.
            assert (store.adapters(), store.table_version()) == (kept, 41)
            assert store.drains() == {R0: ORDER}
            store.close()
    assert refused > len(sound) // 4096


def _flip(path: Path, old: bytes, new: bytes) -> None:
    raw = path.read_bytes()
    assert old in raw
    path.write_bytes(raw.replace(old, new))


def test_a_value_that_is_not_as_it_was_written_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "controller.sqlite"
    filled(path)
    _flip(path, b"adapter-7", b"adapter-X")
    with pytest.raises(BadInputError, match=r"controller\.sqlite: .*; restore it or move it away"):
        Store(path)


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 99])
def test_another_schema_version_is_refused_with_both_numbers(tmp_path: Path, version: int) -> None:
    path = tmp_path / "controller.sqlite"
    filled(path)
    with closing(sqlite3.connect(path)) as raw:
        raw.execute(f"PRAGMA user_version={version}")
    with pytest.raises(BadInputError, match=f"version {version}, this release reads 1 and 2"):
        Store(path)


@pytest.mark.parametrize("content", [b"not a database" * 1000, b"", b"SQLite format 3\x00" + bytes(84)])
def test_a_file_that_is_no_store_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "controller.sqlite"
    path.write_bytes(content)
    with pytest.raises(BadInputError, match=r"controller\.sqlite: .*store"):
        Store(path)
    assert path.read_bytes() == content
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "controller.sqlite"
    path.mkdir()
    with pytest.raises(BadInputError, match="not a readable store"):
        Store(path)


def test_a_store_that_cannot_be_made_leaves_no_file_behind(tmp_path: Path) -> None:
    path = tmp_path / "controller.sqlite"
    with full_disk(path, room_bytes=1000), pytest.raises(WorkFailedError, match=r"controller\.sqlite: "):
        Store(path)
    assert list(tmp_path.iterdir()) == []


def _limit_pages(store: Store, max_pages: int) -> None:
    """SQLite says itself that the disk is full; the limit is its connection's."""
    store._db.execute(f"PRAGMA max_page_count={max_pages}")


def test_a_registration_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "controller.sqlite"
    kept = filled(path)
    store = Store(path)
    _limit_pages(store, path.stat().st_size // 4096)
    large = replace(registration("large"), source="x" * 10_000)
    with pytest.raises(WorkFailedError, match=r"controller\.sqlite: the disk is full; free some space"):
        store.save_adapter(large)
    assert store.adapters() == kept
    _limit_pages(store, 1000)
    store.save_adapter(large)
    store.close()
    again = Store(path)
    assert again.adapters() == [*kept, large]
    again.close()


@pytest.mark.parametrize("damage", [b"\x00" * 4096, b"not a database" * 1000])
async def test_up_refuses_a_damaged_store_in_one_line_and_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes
) -> None:
    monkeypatch.setenv("LORASERVE_CACHE_DIR", str(tmp_path))
    folder = tmp_path / "clusters" / "damaged"
    folder.mkdir(parents=True)
    path = folder / "controller.sqlite"
    filled(path)
    damaged = damage + path.read_bytes()[len(damage) :]
    path.write_bytes(damaged)
    ran = await run_cli("up", "--engine", "emulated", "--cluster", "damaged", "--port", "0")
    assert ran.exit_code == 2, ran.stderr
    assert ran.stderr.startswith(f"error: {path}: ")
    assert ran.stderr.count("\n") == 1
    assert path.read_bytes() == damaged
