"""Whether a controller's store is sound: looked at without a write to it."""

import hashlib
import json
import sqlite3
from pathlib import Path
from urllib.parse import quote

ADAPTER_COLUMNS = "version_id, name, sha256, rank, size_bytes, source, target_modules"


def open_unchanged(path: Path) -> sqlite3.Connection:
    """The file for reading. Only a log that a killed controller has left needs SQLite's shared memory
    beside it, which a full disk may not take."""
    log = path.with_name(f"{path.name}-wal")
    is_whole = not log.exists() or log.stat().st_size == 0
    mode = "immutable=1" if is_whole else "mode=ro"
    return sqlite3.connect(f"file:{quote(str(path))}?{mode}", uri=True)


def checksum(row: tuple[object, ...]) -> str:
    """What a row carries beside its values."""
    return hashlib.blake2b(json.dumps(row).encode(), digest_size=12).hexdigest()


def check_rows(db: sqlite3.Connection) -> None:
    """ValueError for a row that is not as it was written."""
    for table, columns in (
        ("adapters", ADAPTER_COLUMNS),
        ("meta", "key, value"),
        ("drains", "replica_id, value"),
    ):
        for *row, written in db.execute(f"SELECT {columns}, checksum FROM {table}"):
            if checksum(tuple(row)) != written:
                raise ValueError(f"a row of {table} is damaged")


def check_values(db: sqlite3.Connection) -> None:
    """ValueError or TypeError for a value of a first-release store, which has no checksums, that cannot be
    what was written."""
    for (modules,) in db.execute("SELECT target_modules FROM adapters"):
        if not isinstance(json.loads(modules), list):
            raise ValueError("a row of adapters is damaged")
    values = dict(db.execute("SELECT key, value FROM meta"))
    int(values.get("table_version", "0"))
    plan = json.loads(values.get("plan", "{}"))
    if not isinstance(plan, dict) or not all(isinstance(holders, dict) for holders in plan.values()):
        raise ValueError("the plan is damaged")
    for holders in plan.values():
        sum(holders.values())  # shares are numbers
