"""What a controller remembers: adapters, the last plan, the table's version. SQLite, one file.

Every write is durable before it returns, so that a killed controller comes back with all that anyone
was told.
"""

import json
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from loraserve.errors import BadInputError, WorkFailedError
from placement.types import AdapterName, AdapterVersion, Holder, Placement, ReplicaId, VersionId

SCHEMA_VERSION = 1

_SCHEMA = """
CREATE TABLE adapters (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    version_id TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    rank INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL,
    source TEXT NOT NULL,
    target_modules TEXT NOT NULL
) STRICT;
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRegistration:
    """One registered version, with what operators are shown beside what placement needs."""

    adapter: AdapterVersion
    source: str
    target_modules: tuple[str, ...]


class Store:
    """Not thread-safe: one controller, one loop, one store."""

    def __init__(self, path: Path) -> None:
        """Open or create; BadInputError if the file is not a store of this version."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            self._open()
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise BadInputError(
                f"{path}: not a readable store ({error}); restore it or move it away"
            ) from error
        except BadInputError:
            self._db.close()
            raise

    def _open(self) -> None:
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            self._create()
        elif version != SCHEMA_VERSION:
            raise BadInputError(
                f"{self.path}: the store has schema version {version}, this release reads {SCHEMA_VERSION};"
                " use the release that wrote it, or move the file away"
            )
        problems = self._db.execute("PRAGMA quick_check").fetchone()[0]
        if problems != "ok":
            raise BadInputError(f"{self.path}: the store is corrupt ({problems}); restore it or move it away")

    def _create(self) -> None:
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            for statement in _SCHEMA.split(";"):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    def begin_life(self, run_id: str, base_model: str) -> bool:
        """Note that a controller starts; True if an earlier one of the same run has been here, whose
        replicas may still be running. BadInputError if the store belongs to another base model."""
        self.check_base_model(base_model)
        recovering = self._get("run_id") == run_id
        self._set("base_model", base_model)
        self._set("run_id", run_id)
        return recovering

    def check_base_model(self, base_model: str) -> None:
        """BadInputError if adapters are registered here for another base model."""
        known = self._get("base_model")
        if known is not None and known != base_model and self.adapters():
            raise BadInputError(
                f"{self.path}: its adapters were registered for base model {known!r}, not {base_model!r};"
                " start with --fresh to forget them, or choose another --cluster name"
            )

    def save_adapter(self, registration: StoredRegistration) -> None:
        """Remember a registration; the same version again moves to the end of the order."""
        adapter = registration.adapter
        row = (
            adapter.version_id,
            adapter.name,
            adapter.sha256,
            adapter.rank,
            adapter.size_bytes,
            registration.source,
            json.dumps(registration.target_modules),
        )
        self._write(
            "INSERT OR REPLACE INTO adapters"
            " (version_id, name, sha256, rank, size_bytes, source, target_modules)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            row,
        )

    def delete_adapter(self, version: VersionId) -> None:
        """Forget a registration; an unknown one is no error."""
        self._write("DELETE FROM adapters WHERE version_id = ?", (version,))

    def adapters(self) -> list[StoredRegistration]:
        """All registrations in their order."""
        rows = self._db.execute(
            "SELECT version_id, name, sha256, rank, size_bytes, source, target_modules"
            " FROM adapters ORDER BY sequence"
        )
        return [
            StoredRegistration(
                adapter=AdapterVersion(
                    version_id=VersionId(version),
                    name=AdapterName(name),
                    sha256=sha256,
                    rank=rank,
                    size_bytes=size_bytes,
                ),
                source=source,
                target_modules=tuple(json.loads(modules)),
            )
            for version, name, sha256, rank, size_bytes, source, modules in rows
        ]

    def save_plan(self, plan: Placement) -> None:
        """Remember the last plan."""
        tree = {
            version: {holder.replica_id: holder.share for holder in holders}
            for version, holders in plan.holders.items()
        }
        self._set("plan", json.dumps(tree))

    def plan(self) -> Placement:
        """The last plan, or an empty one."""
        tree: dict[str, dict[str, float]] = json.loads(self._get("plan") or "{}")
        return Placement(
            MappingProxyType(
                {
                    VersionId(version): tuple(
                        Holder(replica_id=ReplicaId(replica), share=share)
                        for replica, share in sorted(holders.items())
                    )
                    for version, holders in tree.items()
                }
            )
        )

    def save_table_version(self, version: int) -> None:
        """Remember the highest table version that any router may have seen."""
        self._set("table_version", str(version))

    def table_version(self) -> int:
        """The highest table version so far; 0 if none was published."""
        return int(self._get("table_version") or "0")

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def _set(self, key: str, value: str) -> None:
        self._write("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (key, value))

    def _get(self, key: str) -> str | None:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def _write(self, statement: str, values: tuple[object, ...]) -> None:
        try:
            self._db.execute(statement, values)
        except sqlite3.Error as error:
            raise WorkFailedError(f"{self.path}: cannot write the store: {error}") from error
