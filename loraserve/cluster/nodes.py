"""The nodes of a Ray cluster, and which of them a replica goes to: decisions over plain values.

`read_nodes` is the only function here that asks Ray.
"""

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loraserve.errors import BadInputError
from placement.types import NodeId

LOOPBACK = "127.0.0.1"
# Ray counts resources in ten-thousandths.
TOLERANCE = 1e-4
MAX_NODES_SHOWN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One live node: where its Ray daemon listens, and its resources, of which `free` is unreserved."""

    node_id: NodeId
    host: str
    port: int
    total: Mapping[str, float]
    free: Mapping[str, float]

    def rooms(self, need: Mapping[str, float]) -> int:
        """How many times `need` fits into what is free."""
        return max(
            0, min(int((self.free.get(name, 0.0) + TOLERANCE) / amount) for name, amount in need.items())
        )


def replica_need(cpus: float, gpus: int) -> dict[str, float]:
    """What one replica reserves; never nothing, because Ray refuses an empty reservation."""
    need = {name: float(amount) for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}
    return need or {"CPU": 0.001}


def choose_node(nodes: Sequence[Node], need: Mapping[str, float], ours: Mapping[NodeId, int]) -> Node | None:
    """The node with room that has the fewest replicas of this cluster (`ours`), then the most room."""
    fitting = [node for node in nodes if node.rooms(need) > 0]
    return min(
        fitting,
        key=lambda node: (ours.get(node.node_id, 0), -node.rooms(need), node.node_id),
        default=None,
    )


def shortage(nodes: Sequence[Node], need: Mapping[str, float], count: int) -> str | None:
    """Why `count` replicas do not fit on these nodes, or None if they do."""
    rooms = sum(node.rooms(need) for node in nodes)
    if rooms >= count:
        return None
    wanted = " and ".join(f"{amount:g} {name}" for name, amount in need.items())
    shown = [
        f"{node.host}: " + ", ".join(_of_total(node, name) for name in need)
        for node in nodes[:MAX_NODES_SHOWN]
    ]
    if len(nodes) > MAX_NODES_SHOWN:
        shown.append(f"{len(nodes) - MAX_NODES_SHOWN} more nodes")
    has = "; ".join(shown) or "no node that can be used"
    return (
        f"room for {rooms} of {count} replica{'s' if count > 1 else ''} at {wanted} each;"
        f" the Ray cluster has free: {has}"
    )


def _of_total(node: Node, name: str) -> str:
    return f"{node.free.get(name, 0.0):g} of {node.total.get(name, 0.0):g} {name}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen_host(node: str, home: str, *, insecure_listen: bool) -> str | None:
    """Where a replica on `node` listens so that a router on `home` reaches it (both addresses), or None
    if that would be open to other machines and the operator has not allowed it."""
    if insecure_listen or is_loopback(node):
        return node
    return LOOPBACK if node == home else None


def usable(nodes: Sequence[Node], home: str, *, insecure_listen: bool) -> list[Node]:
    """The nodes on which a replica may listen."""
    return [node for node in nodes if listen_host(node.host, home, insecure_listen=insecure_listen)]


def check_listening(nodes: Sequence[Node], home: str, *, insecure_listen: bool) -> None:
    """BadInputError if replicas on some node would have to listen at an address that is not loopback."""
    open_nodes = usable(nodes, home, insecure_listen=insecure_listen)
    closed = {node.host for node in nodes} - {node.host for node in open_nodes}
    if closed:
        shown = ", ".join(sorted(closed)[:MAX_NODES_SHOWN])
        raise BadInputError(
            f"the Ray cluster has nodes on other machines ({shown}), where replicas must listen at the node's"
            " address, without encryption or authentication; pass --insecure-listen to allow that"
        )


def read_nodes() -> list[Node]:
    """The live nodes of the Ray cluster that this process is connected to."""
    import ray
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    return [
        Node(
            node_id=NodeId(entry["NodeID"]),
            host=entry["NodeManagerAddress"],
            port=entry["NodeManagerPort"],
            total=entry["Resources"],
            free=free.get(entry["NodeID"], {}),
        )
        for entry in sorted(ray.nodes(), key=lambda entry: str(entry["NodeID"]))
        if entry["Alive"]
    ]
