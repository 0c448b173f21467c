"""What a controller remembers: adapters, drains, the last plan, the table's version. SQLite, one file.

Every write is durable before it returns, so that a killed controller comes back with all that anyone
was told. Every row carries a checksum, because SQLite itself does not notice damage inside a value.
"""

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from loraserve.controller.store_checks import (
    ADAPTER_COLUMNS,
    check_rows,
    check_values,
    checksum,
    open_unchanged,
)
from loraserve.errors import BadInputError, WorkFailedError
from placement.cluster.records import DrainOrder
from placement.plans.book import EarlierPlan
from placement.plans.text import parse_plan, plan_text
from placement.profile import Slo
from placement.types import AdapterName, AdapterTerms, AdapterVersion, Placement, ReplicaId, VersionId

SCHEMA_VERSION = 2
READABLE_VERSIONS = (1, SCHEMA_VERSION)
BUSY_TIMEOUT_S = 5.0

_SCHEMA = """
CREATE TABLE adapters (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    version_id TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    rank INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL,
    source TEXT NOT NULL,
    target_modules TEXT NOT NULL,
    checksum TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL, checksum TEXT NOT NULL DEFAULT '') STRICT;
CREATE TABLE drains (replica_id TEXT PRIMARY KEY, value TEXT NOT NULL, checksum TEXT NOT NULL) STRICT;
"""

_TO_VERSION_2 = """
ALTER TABLE adapters ADD COLUMN checksum TEXT NOT NULL DEFAULT '';
ALTER TABLE meta ADD COLUMN checksum TEXT NOT NULL DEFAULT '';
CREATE TABLE drains (replica_id TEXT PRIMARY KEY, value TEXT NOT NULL, checksum TEXT NOT NULL) STRICT;
"""

_EARLIER = "plan/"
"""What the keys of earlier plans begin with; their number follows."""

_DEMAND = "demand/"
"""What the keys of measured demand begin with."""

_TERMS = "terms/"
"""What the keys of what is wanted of an adapter begin with; its name follows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRegistration:
    """One registered version, with what operators are shown beside what placement needs."""

    adapter: AdapterVersion
    source: str
    target_modules: tuple[str, ...]


@dataclass(slots=True, kw_only=True)
class Changes:
    """What is to be written at once: the last plan and those before it, the table's version, what is
    forgotten, drains."""

    plan: Placement | None = None
    table_version: int | None = None
    deleted: set[VersionId] = field(default_factory=set)
    drains: dict[ReplicaId, DrainOrder | None] = field(default_factory=dict)
    max_lora_ranks: dict[ReplicaId, int | None] = field(default_factory=dict)
    earlier_plans: dict[int, EarlierPlan | None] = field(default_factory=dict)
    terms: dict[AdapterName, AdapterTerms] = field(default_factory=dict)
    # Empty, or the one that is frozen from now on, None for none.
    frozen: list[Placement | None] = field(default_factory=list)

    def __bool__(self) -> bool:
        if self.plan is not None or self.table_version is not None:
            return True
        changed = self.deleted or self.drains or self.max_lora_ranks or self.earlier_plans or self.terms
        return bool(changed or self.frozen)


class Store:
    """Not thread-safe: one controller, one loop, one store."""

    def __init__(self, path: Path) -> None:
        """Open or create.

        BadInputError, with the file left as it was, if it is not a sound store of a readable version;
        WorkFailedError if a new one cannot be written.
        """
        self.path = path
        is_new = not path.exists()
        if not is_new:
            self._check()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                path, isolation_level=None, check_same_thread=False, timeout=BUSY_TIMEOUT_S
            )
        except (sqlite3.Error, OSError) as error:
            raise BadInputError(f"{path}: the store cannot be created: {error}") from error
        try:
            self._open()
        except Exception as error:
            self._db.close()
            if is_new:
                # An empty file would be refused as a damaged store the next time.
                path.unlink(missing_ok=True)
            if isinstance(error, sqlite3.Error):
                raise WorkFailedError(f"{path}: {_explained(error)}") from error
            raise

    def _check(self) -> None:
        """Refuse a file that is damaged, without a write to it."""
        try:
            with closing(open_unchanged(self.path)) as db:
                version = db.execute("PRAGMA user_version").fetchone()[0]
                if version == 0 and not db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
                    raise BadInputError(
                        f"{self.path}: the store is empty; restore it, or start with --fresh to forget it"
                    )
                if version not in READABLE_VERSIONS:
                    raise BadInputError(
                        f"{self.path}: the store has schema version {version}, this release reads"
                        f" {' and '.join(map(str, READABLE_VERSIONS))};"
                        " use the release that wrote it, or move the file away"
                    )
                problems = db.execute("PRAGMA integrity_check").fetchone()[0].splitlines()
                if problems != ["ok"]:
                    raise BadInputError(
                        f"{self.path}: the store is corrupt ({problems[0]}); restore it or move it away"
                    )
                if version == SCHEMA_VERSION:
                    check_rows(db)
                else:
                    check_values(db)
        except (sqlite3.Error, ValueError, TypeError) as error:
            raise BadInputError(
                f"{self.path}: not a readable store ({error}); restore it or move it away"
            ) from error

    def _open(self) -> None:
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version == SCHEMA_VERSION:
            return
        with self._transaction():
            for statement in (_SCHEMA if version == 0 else _TO_VERSION_2).split(";"):
                self._db.execute(statement)
            for registration in self.adapters():
                self._put_adapter(registration)
            for key, value in self._db.execute("SELECT key, value FROM meta").fetchall():
                self._set(key, value)
            self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    def begin_life(self, run_id: str, base_model: str) -> bool:
        """Note that a controller starts; True if an earlier one of the same run has been here, whose
        replicas may still be running. A new run forgets the drains and settings of the one before.

        BadInputError if the store belongs to another base model.
        """
        self.check_base_model(base_model)
        if self._get("run_id") == run_id and self._get("base_model") == base_model:
            # Writes nothing, so that a full disk does not keep a controller from coming back.
            return True
        with self._transaction():
            self._set("base_model", base_model)
            self._set("run_id", run_id)
            self._db.execute("DELETE FROM drains")
            self._db.execute("DELETE FROM meta WHERE key = 'max_lora_ranks'")
        return False

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
        with self._transaction():
            self._db.execute("DELETE FROM adapters WHERE version_id = ?", (registration.adapter.version_id,))
            self._put_adapter(registration)

    def write(self, changes: Changes) -> None:
        """Write all of it or, with WorkFailedError, nothing."""
        with self._transaction():
            for version in sorted(changes.deleted):
                self._db.execute("DELETE FROM adapters WHERE version_id = ?", (version,))
            if changes.deleted:
                self._forget_terms()
            for name, terms in changes.terms.items():
                self._set(f"{_TERMS}{name}", _terms_text(terms))
            if changes.plan is not None:
                self._set("plan", plan_text(changes.plan))
            for frozen in changes.frozen:
                self._set("frozen_plan", "" if frozen is None else plan_text(frozen))
            for number, earlier in changes.earlier_plans.items():
                self._put_earlier(number, earlier)
            if changes.table_version is not None:
                self._set("table_version", str(changes.table_version))
            for replica, order in changes.drains.items():
                self._put_drain(replica, order)
            if changes.max_lora_ranks:
                self._put_max_lora_ranks(changes.max_lora_ranks)

    def adapters(self) -> list[StoredRegistration]:
        """All registrations in their order."""
        rows = self._db.execute(f"SELECT {ADAPTER_COLUMNS} FROM adapters ORDER BY sequence")
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
            for version, name, sha256, rank, size_bytes, source, modules in rows.fetchall()
        ]

    def terms(self) -> dict[AdapterName, AdapterTerms]:
        """What is wanted of adapters, where anything is."""
        rows = self._db.execute("SELECT key, value FROM meta WHERE key LIKE ?", (f"{_TERMS}%",))
        return {AdapterName(key.removeprefix(_TERMS)): _parse_terms(value) for key, value in rows}

    def plan(self) -> Placement:
        """The last plan, or an empty one."""
        return parse_plan(self._get("plan") or "{}")

    def frozen_plan(self) -> Placement | None:
        """The plan that is to stay, if one is."""
        text = self._get("frozen_plan")
        return parse_plan(text) if text else None

    def earlier_plans(self) -> list[EarlierPlan]:
        """The plans before the last one, the oldest first."""
        rows = self._db.execute("SELECT key, value FROM meta WHERE key LIKE ?", (f"{_EARLIER}%",)).fetchall()
        found = []
        for key, value in rows:
            tree = json.loads(value)
            plan = parse_plan(tree["plan"])
            number = int(key.removeprefix(_EARLIER))
            found.append(EarlierPlan(number=number, plan=plan, ended_by=tree["ended_by"]))
        return sorted(found, key=lambda one: one.number)

    def drains(self) -> dict[ReplicaId, DrainOrder]:
        """The replicas of this run that are to drain or have drained."""
        rows = self._db.execute("SELECT replica_id, value FROM drains")
        return {ReplicaId(replica): DrainOrder(**json.loads(value)) for replica, value in rows}

    def max_lora_ranks(self) -> dict[ReplicaId, int]:
        """The replicas of this run that start with another setting than the configuration's."""
        tree: dict[str, int] = json.loads(self._get("max_lora_ranks") or "{}")
        return {ReplicaId(replica): rank for replica, rank in tree.items()}

    def table_version(self) -> int:
        """The highest table version that any router may have seen; 0 if none was published."""
        return int(self._get("table_version") or "0")

    def save_demand(self, changes: Mapping[str, str | None]) -> None:
        """Remember what `loraserve.controller.demand` knows, under keys of its own; None forgets one."""
        with self._transaction():
            for key, value in changes.items():
                if value is None:
                    self._db.execute("DELETE FROM meta WHERE key = ?", (f"{_DEMAND}{key}",))
                else:
                    self._set(f"{_DEMAND}{key}", value)

    def demand(self) -> dict[str, str]:
        """What `save_demand` was given and has not been forgotten."""
        rows = self._db.execute("SELECT key, value FROM meta WHERE key LIKE ?", (f"{_DEMAND}%",))
        return {key.removeprefix(_DEMAND): value for key, value in rows}

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def _put_adapter(self, registration: StoredRegistration) -> None:
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
        self._db.execute(
            f"INSERT INTO adapters ({ADAPTER_COLUMNS}, checksum) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (version_id) DO UPDATE SET checksum = excluded.checksum",
            (*row, checksum(row)),
        )

    def _forget_terms(self) -> None:
        """Those of names that are not registered any more."""
        self._db.execute(
            "DELETE FROM meta WHERE key LIKE ? AND substr(key, ?) NOT IN (SELECT name FROM adapters)",
            (f"{_TERMS}%", len(_TERMS) + 1),
        )

    def _put_earlier(self, number: int, earlier: EarlierPlan | None) -> None:
        if earlier is None:
            self._db.execute("DELETE FROM meta WHERE key = ?", (f"{_EARLIER}{number}",))
            return
        self._set(
            f"{_EARLIER}{number}",
            json.dumps({"ended_by": earlier.ended_by, "plan": plan_text(earlier.plan)}),
        )

    def _put_max_lora_ranks(self, changed: Mapping[ReplicaId, int | None]) -> None:
        known: dict[ReplicaId, int | None] = {**self.max_lora_ranks(), **changed}
        kept = {replica: rank for replica, rank in sorted(known.items()) if rank is not None}
        self._set("max_lora_ranks", json.dumps(kept))

    def _put_drain(self, replica: ReplicaId, order: DrainOrder | None) -> None:
        if order is None:
            self._db.execute("DELETE FROM drains WHERE replica_id = ?", (replica,))
            return
        tree = {"deadline_s": order.deadline_s, "force": order.force, "done": order.done}
        row = (replica, json.dumps(tree))
        self._db.execute("INSERT OR REPLACE INTO drains VALUES (?, ?, ?)", (*row, checksum(row)))

    def _set(self, key: str, value: str) -> None:
        row = (key, value)
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?, ?)", (*row, checksum(row)))

    def _get(self, key: str) -> str | None:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            raise WorkFailedError(f"{self.path}: {_explained(error)}") from error
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")


def _terms_text(terms: AdapterTerms) -> str:
    slo = None if terms.slo is None else {"ttft_ms": terms.slo.ttft_ms, "tbt_ms": terms.slo.tbt_ms}
    return json.dumps({"weight": terms.weight, "slo": slo})


def _parse_terms(text: str) -> AdapterTerms:
    tree = json.loads(text)
    return AdapterTerms(weight=tree["weight"], slo=None if tree["slo"] is None else Slo(**tree["slo"]))


def _explained(error: Exception) -> str:
    """What went wrong with a write, and what to do."""
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
        return "the disk is full; free some space on it"
    return f"cannot be written ({error}); check its disk"
