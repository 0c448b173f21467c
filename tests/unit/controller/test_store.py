"""What the controller's store keeps, and what it refuses to open."""

import sqlite3
from pathlib import Path
from types import MappingProxyType

import pytest

from loraserve.controller.store import SCHEMA_VERSION, Store, StoredRegistration
from loraserve.errors import BadInputError
from placement.types import AdapterName, AdapterVersion, Holder, Placement, ReplicaId, VersionId


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
    store.delete_adapter(registration("b").adapter.version_id)
    store.save_plan(plan)
    store.save_table_version(41)
    store.close()
    again = Store(path)
    assert again.adapters() == [registration("a"), registration("a", "2")]
    assert again.plan() == plan
    assert again.table_version() == 41
    again.close()


def test_what_was_written_survives_without_a_close(tmp_path: Path) -> None:
    path = tmp_path / "controller.sqlite"
    store = Store(path)
    store.save_adapter(registration("a"))
    other = Store(path)
    assert other.adapters() == [registration("a")]
    other.close()
    store.close()


def test_only_the_same_run_is_recovered(tmp_path: Path) -> None:
    store = Store(tmp_path / "controller.sqlite")
    assert not store.begin_life("run-1", "model")
    assert store.begin_life("run-1", "model")
    assert not store.begin_life("run-2", "model")
    store.close()


def test_adapters_of_another_base_model_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "controller.sqlite")
    store.begin_life("run", "model-a")
    store.begin_life("run", "model-b")
    store.save_adapter(registration("a"))
    with pytest.raises(BadInputError, match=r"'model-b', not 'model-a'.*--fresh"):
        store.begin_life("run", "model-a")
    store.close()


def test_another_schema_version_is_refused_with_both_numbers(tmp_path: Path) -> None:
    path = tmp_path / "controller.sqlite"
    raw = sqlite3.connect(path)
    raw.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    raw.commit()
    raw.close()
    with pytest.raises(BadInputError, match=f"version {SCHEMA_VERSION + 1}, this release reads"):
        Store(path)


def test_a_file_that_is_no_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "controller.sqlite"
    path.write_bytes(b"not a database" * 1000)
    with pytest.raises(BadInputError, match="not a readable store"):
        Store(path)
    assert path.read_bytes() == b"not a database" * 1000
