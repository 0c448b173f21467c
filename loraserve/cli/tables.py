"""Tables for people."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

FILE_WIDTH = 160


def show(table: Table) -> None:
    """Print to standard output, as wide as the terminal, or as wide as it needs to be in a file."""
    for column in table.columns:
        column.no_wrap = True
    console = Console()
    if not console.is_terminal:
        console = Console(width=FILE_WIDTH)
    console.print(table)


def adapter_table(adapters: Sequence[Any]) -> Table:
    """One row per adapter: name, rank, size, version, holders with shares."""
    table = Table("adapter", "rank", "MiB", "version", "holders", box=None, pad_edge=False)
    for adapter in adapters:
        holders = ", ".join(f"{holder.replica_id} {holder.share:.0%}" for holder in adapter.holders)
        version = adapter.version.rpartition("@")[2]
        size_mib = adapter.size_bytes / 2**20
        table.add_row(adapter.name, str(adapter.rank), f"{size_mib:.2f}", version, holders or "none")
    return table


def replica_table(replicas: Sequence[Any]) -> Table:
    """One row per replica: state, limits, what it holds, what it does."""
    table = Table(
        "replica", "state", "engine", "max rank", "slots", "slot MiB", "adapters", "MiB", "running",
        "waiting", "KV", "restarts",
        box=None, pad_edge=False,
    )  # fmt: skip
    for replica in replicas:
        table.add_row(
            replica.replica_id,
            replica.state,
            replica.engine,
            str(replica.max_lora_rank),
            f"{replica.active_adapters}/{replica.adapter_slots}",
            f"{replica.slot_allocated_bytes / 2**20:.1f}",
            f"{len(replica.resident)}/{replica.pool_adapters}",
            f"{replica.resident_bytes / 2**20:.1f}",
            str(replica.running),
            str(replica.waiting),
            f"{replica.kv_cache_usage:.0%}",
            str(replica.restarts),
        )
    return table
