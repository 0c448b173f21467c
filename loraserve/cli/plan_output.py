"""Plans and what they change, for people."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from loraserve.cli.tables import show

if TYPE_CHECKING:
    from loraserve.client_types import PlanStatus
    from placement.plans.diff import PlanDiff, ReplicaChange

MAX_NAMED = 4


def print_plan(status: "PlanStatus") -> None:
    """The plan in force, one row per adapter, and how it came to be."""
    table = Table("adapter", "version", "holders", box=None, pad_edge=False)
    for version, holders in sorted(status.current.holders.items()):
        name, _, digest = version.rpartition("@")
        parts = [f"{one.replica_id} {'spill' if one.spill else f'{one.share:.0%}'}" for one in holders]
        table.add_row(name, digest, ", ".join(parts))
    show(table)
    for replica, rank in sorted(status.current.max_lora_ranks.items()):
        print(f"{replica} is to take ranks up to {rank}")
    number = len(status.earlier)
    frozen, earlier = "frozen" if status.frozen else "not frozen", "plan" if number == 1 else "plans"
    print(
        f"{frozen}; {number or 'no'} earlier {earlier} to go back to"
        + (f", the last one ended by {status.earlier[-1]}" if status.earlier else "")
    )
    if status.problem:
        print(f"problem: {status.problem}")


def print_diff(diff: "PlanDiff") -> None:
    """What changes on each replica, and what comes of it for all."""
    if not diff.is_empty:
        table = Table(
            "replica", "loads", "MiB", "drops", "MiB", "shares", "max rank", "utilisation",
            box=None, pad_edge=False,
        )  # fmt: skip
        for change in diff.replicas:
            table.add_row(*_row(change))
        show(table)
    print(
        f"to move: {diff.bytes_to_move / 2**20:.2f} MiB; highest utilisation"
        f" {diff.highest_utilisation_before:.0%} -> {diff.highest_utilisation_after:.0%},"
        f" skew {diff.skew_before.total:.2f} -> {diff.skew_after.total:.2f}"
        + ("" if diff.is_measured else " (no profile: utilisations can only be compared)")
    )
    if diff.unplaced:
        print(f"without a place: {_named(diff.unplaced)}")


def _row(change: "ReplicaChange") -> tuple[str, ...]:
    ranks = [f"{change.max_lora_rank_before}", f"{change.max_lora_rank_after}"]
    return (
        change.replica_id,
        _named(change.added),
        f"{change.added_bytes / 2**20:.2f}",
        _named(change.dropped),
        f"{change.dropped_bytes / 2**20:.2f}",
        f"{len(change.shares)} change" if change.shares else "",
        " -> ".join(dict.fromkeys(ranks)),
        f"{change.utilisation_before:.0%} -> {change.utilisation_after:.0%}",
    )


def _named(versions: Sequence[str]) -> str:
    """The names, the first few of them."""
    names = [version.rpartition("@")[0] for version in versions[:MAX_NAMED]]
    more = [f"{len(versions) - MAX_NAMED} more"] if len(versions) > MAX_NAMED else []
    return ", ".join(names + more)
