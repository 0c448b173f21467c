"""Ending what a cluster has left in a Ray cluster that goes on: its detached actors and placement groups.

Run by `loraserve down`, as `python -m loraserve.cluster.sweep ADDRESS CLUSTER`, when the head process, which
knows the order, is gone. Both are found by their names alone.
"""

import contextlib
import json
import sys
import time
from typing import Any

from loraserve.cluster.names import NAMESPACE, actor_name, group_name
from loraserve.errors import LoraServeError, WorkFailedError

SWEEP_TIMEOUT_S = 20.0
POLL_S = 0.05


def leftovers(cluster: str) -> tuple[list[str], list[str]]:
    """The names of the cluster's actors, the controller's first, and the ids of its placement groups."""
    import ray
    from ray.util.placement_group import placement_group_table

    prefix = actor_name(cluster, "")
    actors = [
        entry["name"]
        for entry in ray.util.list_named_actors(all_namespaces=True)
        if entry["namespace"] == NAMESPACE and entry["name"].startswith(prefix)
    ]
    groups = [
        group_id
        for group_id, group in placement_group_table().items()
        if group["name"].startswith(group_name(cluster, "")) and group["state"] != "REMOVED"
    ]
    # Sorted, the controller's name comes first: it would start the others again.
    return sorted(actors), sorted(groups)


def sweep(cluster: str) -> tuple[int, int]:
    """End them all and wait until they are gone; how many actors and groups there were."""
    first = left = leftovers(cluster)
    deadline_s = time.monotonic() + SWEEP_TIMEOUT_S
    while any(left):
        for name in left[0]:
            _kill_actor(name)
        for group_id in left[1]:
            _remove_group(group_id)
        if time.monotonic() > deadline_s:
            raise WorkFailedError(
                f"cluster {cluster}: {len(left[0])} actors and {len(left[1])} placement groups are still in"
                f" the Ray cluster after {SWEEP_TIMEOUT_S:.0f} s; run `loraserve down` again"
            )
        time.sleep(POLL_S)
        left = leftovers(cluster)
    return len(first[0]), len(first[1])


def _kill_actor(name: str) -> None:
    import ray

    # ValueError: it has gone since.
    with contextlib.suppress(ValueError, ray.exceptions.RayError):
        ray.kill(ray.get_actor(name, namespace=NAMESPACE), no_restart=True)


def _remove_group(group_id: str) -> None:
    from ray import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    group: Any = PlacementGroup(PlacementGroupID(bytes.fromhex(group_id)))
    remove_placement_group(group)


def main() -> int:
    """Connect, sweep, and say in one JSON object what was ended or what went wrong."""
    from loraserve.cluster.ray_session import join

    address, cluster = sys.argv[1:]
    try:
        join(address, {})
        actors, groups = sweep(cluster)
    except LoraServeError as error:
        print(json.dumps({"error": str(error)}))
        return 1
    print(json.dumps({"actors": actors, "groups": groups}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
