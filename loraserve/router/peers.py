"""A router's links to replicas: one channel and one multiplexed stream for each in the table.

A replica that leaves the table keeps its link until its last request has ended.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from random import Random

from loraserve.errors import BadInputError, UnavailableError
from loraserve.router.loads import LoadBook
from loraserve.rpc.internal.v1 import internal_pb2
from loraserve.rpc.link_client import Link
from loraserve.rpc.link_server import SPARE_FRAME_BYTES
from loraserve.rpc.server import make_channel
from loraserve.rpc.table_codec import decode_load
from placement.table import TableReplica
from placement.types import ReplicaId

logger = logging.getLogger(__name__)


class Peer:
    """One replica at one address."""

    def __init__(self, replica: TableReplica, max_message_bytes: int) -> None:
        self.replica_id = replica.replica_id
        self.address = replica.address
        self.calls = 0
        self.retired = False
        self.channel = make_channel(replica.address, max_message_bytes=max_message_bytes + SPARE_FRAME_BYTES)
        self.link: Link
        self.keeper: asyncio.Task[None]


class Peers:
    """All replicas of the present table, and those that have left it with requests still running."""

    def __init__(
        self,
        *,
        router_id: str,
        loads: LoadBook,
        max_message_bytes: int,
        rng: Random,
        on_leases_ended: Callable[[list[str]], None] = lambda leases: None,
    ) -> None:
        self._router_id = router_id
        self._loads = loads
        self._max_message_bytes = max_message_bytes
        self._rng = rng
        self._on_leases_ended = on_leases_ended
        self._peers: dict[ReplicaId, Peer] = {}
        self._retired: set[Peer] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._down: frozenset[ReplicaId] = frozenset()

    @property
    def down(self) -> frozenset[ReplicaId]:
        """The replicas of the table that could not be reached last time."""
        return self._down

    def update(self, replicas: Mapping[ReplicaId, TableReplica]) -> None:
        """Connect to what is new in the table, let go of what is no longer in it."""
        for replica_id, peer in list(self._peers.items()):
            listed = replicas.get(replica_id)
            if listed is None or listed.address != peer.address:
                self._retire(peer)
        for replica_id, replica in replicas.items():
            if replica_id not in self._peers:
                self._peers[replica_id] = self._connect(replica)
        self._notify()

    def take(self, replica_id: ReplicaId) -> Peer:
        """The replica's connection for one request, to be given back by `give_back`."""
        peer = self._peers.get(replica_id)
        if peer is None:
            raise UnavailableError(f"replica {replica_id} has left the cluster")
        peer.calls += 1
        return peer

    def give_back(self, peer: Peer) -> None:
        """The request has ended."""
        peer.calls -= 1
        if peer.retired and peer.calls == 0:
            self._close_soon(peer)

    def find(self, replica_id: ReplicaId) -> Peer | None:
        """The replica's connection, if it is in the table."""
        return self._peers.get(replica_id)

    def changes(self) -> asyncio.Event:
        """Set at the next new table, and when a replica can be reached again."""
        return self._changed

    async def close(self) -> None:
        """Cancel every request and every link."""
        for peer in list(self._peers.values()):
            self._retire(peer)
        for peer in list(self._retired):
            self._close_soon(peer)
        await asyncio.gather(*self._closing)

    def _connect(self, replica: TableReplica) -> Peer:
        peer = Peer(replica, self._max_message_bytes)
        peer.link = Link(
            peer.channel,
            peer=f"replica {replica.replica_id}",
            router_id=self._router_id,
            rng=self._rng,
            on_load=lambda message: self._record(peer, message),
            on_leases_ended=self._on_leases_ended,
            on_state=lambda up: self._note_state(peer, up),
        )
        peer.keeper = asyncio.create_task(peer.link.run(), name=f"link to {replica.replica_id}")
        return peer

    def _record(self, peer: Peer, message: internal_pb2.LoadReport) -> None:
        try:
            report = decode_load(message)
        except BadInputError as error:
            logger.error("load of %s refused: %s", peer.replica_id, error)
            return
        if report.replica_id != peer.replica_id:
            logger.error("%s answers for replica %s", peer.address, report.replica_id)
        elif not peer.retired:
            self._loads.record(report)

    def _note_state(self, peer: Peer, up: bool) -> None:
        if peer.retired:
            return
        if up:
            self._down -= {peer.replica_id}
            self._notify()
        else:
            self._down |= {peer.replica_id}

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _retire(self, peer: Peer) -> None:
        del self._peers[peer.replica_id]
        peer.retired = True
        self._down -= {peer.replica_id}
        self._retired.add(peer)
        self._loads.forget(peer.replica_id)
        if peer.calls == 0:
            self._close_soon(peer)

    def _close_soon(self, peer: Peer) -> None:
        if peer in self._retired:
            self._retired.discard(peer)
            task = asyncio.create_task(self._close_peer(peer))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _close_peer(self, peer: Peer) -> None:
        peer.keeper.cancel()
        await asyncio.wait([peer.keeper])
        peer.link.close()
        await peer.channel.close()
