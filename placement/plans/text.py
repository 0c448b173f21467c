"""A plan as JSON: what the store keeps, `loraserve plan show --json` prints and `plan apply FILE` reads.

`{"holders": {VERSION: {REPLICA: SHARE}}, "spill": {VERSION: [REPLICA]}, "max_lora_ranks": {REPLICA: RANK}}`,
where what is empty may be absent. The first releases kept the inner object of `holders` alone.
"""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from placement.types import Holder, Placement, ReplicaId, VersionId

_KEYS = {"holders", "spill", "max_lora_ranks"}


def plan_text(plan: Placement) -> str:
    """The plan on one line; the same plan gives the same text."""
    return json.dumps(plan_tree(plan))


def plan_tree(plan: Placement) -> dict[str, Any]:
    """The plan as JSON's types."""
    spill = {
        version: sorted(holder.replica_id for holder in holders if holder.spill)
        for version, holders in sorted(plan.holders.items())
        if any(holder.spill for holder in holders)
    }
    return {
        "holders": {
            version: {holder.replica_id: holder.share for holder in holders}
            for version, holders in sorted(plan.holders.items())
        },
        **({"spill": spill} if spill else {}),
        **({"max_lora_ranks": dict(sorted(plan.max_lora_ranks.items()))} if plan.max_lora_ranks else {}),
    }


def parse_plan(text: str) -> Placement:
    """The plan of a text; ValueError says what is wrong with it."""
    try:
        tree = json.loads(text)
    except RecursionError:
        raise ValueError("not a plan: it is nested too deeply") from None
    if not isinstance(tree, dict):
        raise ValueError("not a plan: expected a JSON object")
    if "holders" not in tree and all("@" in key for key in tree):
        tree = {"holders": tree}
    if unknown := sorted(set(tree) - _KEYS):
        raise ValueError(f"not a plan: unknown key {unknown[0]!r}; allowed: {', '.join(sorted(_KEYS))}")
    placed = _table(tree, "holders")
    spill = _table(tree, "spill")
    ranks = _table(tree, "max_lora_ranks")
    return Placement(
        MappingProxyType(
            {
                VersionId(version): _holders(version, holders, spill.get(version, ()))
                for version, holders in placed.items()
            }
        ),
        MappingProxyType({ReplicaId(one): _rank(one, rank) for one, rank in ranks.items()}),
    )


def _table(tree: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = tree.get(key, {})
    if not isinstance(value, dict):
        raise ValueError(f"not a plan: {key}: expected a JSON object")
    return value


def _holders(version: str, shares: Any, spill: Any) -> tuple[Holder, ...]:
    if not isinstance(shares, dict):
        raise ValueError(f"not a plan: holders of {version}: expected an object of shares by replica")
    for replica, share in shares.items():
        is_number = isinstance(share, int | float) and not isinstance(share, bool)
        if not is_number or (isinstance(share, int) and abs(share) > 1):
            raise ValueError(
                f"not a plan: the share of {version} on {replica}: expected a number from 0 to 1"
            )
    if not isinstance(spill, list | tuple) or not all(
        isinstance(one, str) and one in shares for one in spill
    ):
        raise ValueError(f"not a plan: spill of {version}: expected a list of its holders")
    return tuple(
        Holder(replica_id=ReplicaId(replica), share=float(share), spill=replica in spill)
        for replica, share in sorted(shares.items())
    )


def _rank(replica: str, rank: Any) -> int:
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise ValueError(f"not a plan: max_lora_ranks of {replica}: expected a whole number")
    return rank
