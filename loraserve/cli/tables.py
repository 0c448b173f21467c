"""Tables for people."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

FILE_WIDTH = 160

_SOURCES = {"cache": "their own cache", "origin": "the controller's store"}


def show(part: RenderableType) -> None:
    """Print to standard output, as wide as the terminal, or as wide as it needs to be in a file."""
    if isinstance(part, Table):
        for column in part.columns:
            column.no_wrap = True
    console = Console()
    if not console.is_terminal:
        console = Console(width=FILE_WIDTH)
    console.print(part, soft_wrap=not isinstance(part, Table))


def adapter_table(adapters: Sequence[Any]) -> Table:
    """One row per adapter: name, rank, size, version, weight, demand, targets (TTFT/TBT), attainment of late,
    cold misses of late and in all, holders with shares."""
    table = Table(
        "adapter", "rank", "MiB", "version", "weight", "tok/s", "forecast", "SLO ms", "in SLO", "cold",
        "holders",
        box=None, pad_edge=False,
    )  # fmt: skip
    for adapter in adapters:
        holders = ", ".join(
            f"{holder.replica_id} {'spill' if holder.spill else f'{holder.share:.0%}'}"
            for holder in adapter.holders
        )
        table.add_row(
            adapter.name,
            str(adapter.rank),
            f"{adapter.size_bytes / 2**20:.2f}",
            adapter.version.rpartition("@")[2],
            f"{adapter.weight:g}",
            f"{adapter.demand_tokens_per_s:.0f}",
            f"{adapter.forecast_tokens_per_s:.0f}",
            f"{adapter.slo_ttft_ms:g}/{adapter.slo_tbt_ms:g}" if adapter.slo_ttft_ms else "",
            f"{adapter.recent_in_slo / adapter.recent_requests:.0%}" if adapter.recent_requests else "",
            f"{adapter.recent_cold_misses}/{adapter.cold_misses}",
            holders or "none",
        )
    return table


def replica_table(replicas: Sequence[Any]) -> Table:
    """One row per replica: state, limits, what it holds, what it does. Ranks are the highest resident one
    and the engine's setting."""
    table = Table(
        "replica", "state", "engine", "ranks", "used", "of tok/s", "slots", "slot MiB", "adapters", "MiB",
        "running", "waiting", "KV", "restarts",
        box=None, pad_edge=False,
    )  # fmt: skip
    for replica in replicas:
        point = replica.operating_point_tokens_per_s
        table.add_row(
            replica.replica_id,
            replica.state,
            replica.engine,
            f"{replica.highest_resident_rank}/{replica.max_lora_rank}",
            f"{replica.utilisation:.0%}" if replica.profile else "",
            f"{point:.0f}" if point else "",
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


def fabric_line(replicas: Sequence[Any]) -> str:
    """Where the replicas' adapters have come from and what has failed, in one line; '' for neither."""
    loads: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    for replica in replicas:
        for one in replica.fabric.sources:
            loads[one.source] += one.loads
            moved[one.source] += one.bytes
        failures.update(replica.fabric.failures)
    parts = [
        f"{_SOURCES.get(source, f'peers over {source}')} {number} ({moved[source] / 2**20:.1f} MiB)"
        for source, number in sorted(loads.items())
    ]
    said = [f"adapters loaded from: {', '.join(parts)}"] if parts else []
    if failures:
        counted = ", ".join(f"{kind} {number}" for kind, number in sorted(failures.items()))
        said.append(f"failed attempts: {counted}")
    resting = sorted({name for replica in replicas for name in replica.fabric.open_breakers})
    if resting:
        said.append(f"not tried at the moment: {', '.join(resting)}")
    return "; ".join(said)
