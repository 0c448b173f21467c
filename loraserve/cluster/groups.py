"""The placement groups of a cluster's replicas: one detached group of one bundle each.

One group per replica and not one for all: Ray 2.60 reschedules a lost bundle of a group that lives on in a
loop without a pause as long as there is no room for it, and a group cannot give one bundle back.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loraserve.cluster.names import group_name
from loraserve.cluster.nodes import Node, choose_node, listen_host, read_nodes, shortage, usable
from loraserve.errors import ReplicaStartError
from placement.types import NodeId, ReplicaId

logger = logging.getLogger(__name__)

NODE_LABEL = "ray.io/node-id"
PROBE_TIMEOUT_S = 1.0
# How long a request for room stands before the nodes are looked at anew.
ATTEMPT_S = 2.0
RELEASE_TIMEOUT_S = 10.0
POLL_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a replica goes: its group, the node, and the address to listen at."""

    group: Any
    node_id: NodeId
    host: str


class ReplicaGroups:
    """Reserves room for replicas, spread over the nodes, and gives it back."""

    def __init__(
        self, cluster: str, need: Mapping[str, float], *, home: str, insecure_listen: bool = False
    ) -> None:
        self._cluster = cluster
        self._need = dict(need)
        self._home = home
        self._insecure_listen = insecure_listen
        # One choice at a time, so that each sees the room that the one before has taken.
        self._choosing = asyncio.Lock()

    async def reserve(self, replica: ReplicaId, timeout_s: float) -> Place:
        """A node for the replica; waits for room and says so, ReplicaStartError after `timeout_s`."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        said = ""
        while True:
            round_s = loop.time()
            place = await self._take(replica) or await self._ask(replica, None)
            if place is not None:
                logger.info("%s goes to node %s at %s", replica, place.node_id, place.host)
                return place
            reason = shortage(await self._answering(), self._need, 1) or "Ray to give it free room"
            if loop.time() > deadline_s:
                await self.release(replica)
                raise ReplicaStartError(replica, f"waited {timeout_s:.0f} s for {reason}")
            if reason != said:
                logger.warning("%s waits for %s", replica, reason)
                said = reason
            # Room on a node that cannot be used is given at once, as often as it is asked for.
            await asyncio.sleep(round_s + ATTEMPT_S - loop.time())

    async def release(self, replica: ReplicaId) -> None:
        """Give the replica's room back, which ends what runs in it; no room is no error."""
        from ray.util.placement_group import remove_placement_group

        deadline_s = asyncio.get_running_loop().time() + RELEASE_TIMEOUT_S
        while (group := self._group(replica)) is not None:
            remove_placement_group(group)
            if asyncio.get_running_loop().time() > deadline_s:
                raise ReplicaStartError(replica, "Ray does not remove its placement group")
            await asyncio.sleep(POLL_S)

    async def _take(self, replica: ReplicaId) -> Place | None:
        """Room on the node that suits best, or None if no node has room as far as is known."""
        async with self._choosing:
            node = choose_node(await self._answering(), self._need, self._ours())
            return None if node is None else await self._ask(replica, node)

    async def _ask(self, replica: ReplicaId, node: Node | None) -> Place | None:
        """Ask Ray for room on this node; on any, for None, which also tells an autoscaler what is missing."""
        from ray.util.placement_group import placement_group, placement_group_table

        await self.release(replica)
        selector = None if node is None else [{NODE_LABEL: node.node_id}]
        group = placement_group(
            [self._need],
            name=group_name(self._cluster, replica),
            lifetime="detached",
            bundle_label_selector=selector,
        )
        if not await asyncio.to_thread(group.wait, ATTEMPT_S):
            return None
        node_id = placement_group_table(group)["bundles_to_node_id"][0]
        for found in await self._answering():
            host = listen_host(found.host, self._home, insecure_listen=self._insecure_listen)
            if found.node_id == node_id and host is not None:
                return Place(group=group, node_id=found.node_id, host=host)
        return None

    async def _answering(self) -> list[Node]:
        """The usable nodes whose Ray daemon takes a connection: Ray itself notices a dead one late."""
        nodes = usable(read_nodes(), self._home, insecure_listen=self._insecure_listen)
        alive = await asyncio.gather(*(_answers(node) for node in nodes))
        return [node for node, is_alive in zip(nodes, alive, strict=True) if is_alive]

    def _ours(self) -> Counter[NodeId]:
        from ray.util.placement_group import placement_group_table

        prefix = group_name(self._cluster, "")
        return Counter(
            NodeId(node_id)
            for group in placement_group_table().values()
            if group["name"].startswith(prefix) and group["state"] == "CREATED"
            for node_id in group["bundles_to_node_id"].values()
        )

    def _group(self, replica: ReplicaId) -> Any:
        from ray.util.placement_group import get_placement_group

        try:
            return get_placement_group(group_name(self._cluster, replica))
        except ValueError:
            return None


async def _answers(node: Node) -> bool:
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            _, writer = await asyncio.open_connection(node.host, node.port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True
