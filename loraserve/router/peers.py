"""A router's connections to replicas: one channel and one load subscription for each in the table.

A replica that leaves the table keeps its channel until its last request has ended.
"""

import asyncio
import logging
from collections.abc import Mapping
from random import Random

import grpc

from loraserve.errors import BadInputError, UnavailableError
from loraserve.router.backoff import Backoff
from loraserve.router.loads import LoadBook
from loraserve.rpc.codec import PROTOCOL_VERSION
from loraserve.rpc.internal.v1 import internal_pb2
from loraserve.rpc.server import make_channel
from loraserve.rpc.table_codec import decode_load
from placement.table import TableReplica
from placement.types import ReplicaId

logger = logging.getLogger(__name__)

SERVICE = "loraserve.internal.v1.Replica"


class Peer:
    """One replica at one address. Requests and answers are bytes: the router does not read them."""

    def __init__(self, replica: TableReplica, max_message_bytes: int) -> None:
        self.replica_id = replica.replica_id
        self.address = replica.address
        self.calls = 0
        self.retired = False
        self.channel = make_channel(replica.address, max_message_bytes=max_message_bytes)
        self.execute: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = self.channel.unary_stream(
            f"/{SERVICE}/Execute"
        )
        self.execute_unary: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self.channel.unary_unary(
            f"/{SERVICE}/ExecuteUnary"
        )
        self.watch_load: grpc.aio.UnaryStreamMultiCallable[
            internal_pb2.WatchLoadRequest, internal_pb2.LoadReport
        ] = self.channel.unary_stream(
            f"/{SERVICE}/WatchLoad",
            request_serializer=internal_pb2.WatchLoadRequest.SerializeToString,
            response_deserializer=internal_pb2.LoadReport.FromString,
        )
        self.watcher: asyncio.Task[None] | None = None


class Peers:
    """All replicas of the present table, and those that have left it with requests still running."""

    def __init__(self, *, router_id: str, loads: LoadBook, max_message_bytes: int, rng: Random) -> None:
        self._router_id = router_id
        self._loads = loads
        self._max_message_bytes = max_message_bytes
        self._rng = rng
        self._peers: dict[ReplicaId, Peer] = {}
        self._retired: set[Peer] = set()
        self._closing: set[asyncio.Task[None]] = set()

    def update(self, replicas: Mapping[ReplicaId, TableReplica]) -> None:
        """Connect to what is new in the table, let go of what is no longer in it."""
        for replica_id, peer in list(self._peers.items()):
            listed = replicas.get(replica_id)
            if listed is None or listed.address != peer.address:
                self._retire(peer)
        for replica_id, replica in replicas.items():
            if replica_id not in self._peers:
                peer = Peer(replica, self._max_message_bytes)
                peer.watcher = asyncio.create_task(self._watch(peer), name=f"load of {replica_id}")
                self._peers[replica_id] = peer

    def take(self, replica_id: ReplicaId) -> Peer:
        """The replica's connection for one call, to be given back by `give_back`."""
        peer = self._peers.get(replica_id)
        if peer is None:
            raise UnavailableError(f"replica {replica_id} has left the cluster")
        peer.calls += 1
        return peer

    def give_back(self, peer: Peer) -> None:
        """The call has ended."""
        peer.calls -= 1
        if peer.retired and peer.calls == 0:
            self._close_soon(peer)

    async def close(self) -> None:
        """Cancel every call and every subscription."""
        for peer in list(self._peers.values()):
            self._retire(peer)
        for peer in list(self._retired):
            self._close_soon(peer)
        await asyncio.gather(*self._closing)

    def _retire(self, peer: Peer) -> None:
        del self._peers[peer.replica_id]
        peer.retired = True
        self._retired.add(peer)
        self._loads.forget(peer.replica_id)
        if peer.watcher is not None:
            peer.watcher.cancel()
        if peer.calls == 0:
            self._close_soon(peer)

    def _close_soon(self, peer: Peer) -> None:
        if peer in self._retired:
            self._retired.discard(peer)
            task = asyncio.create_task(self._close_peer(peer))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _close_peer(self, peer: Peer) -> None:
        if peer.watcher is not None:
            await asyncio.wait([peer.watcher])
        await peer.channel.close()

    async def _watch(self, peer: Peer) -> None:
        """Follow the replica's load for as long as it is in the table."""
        backoff = Backoff(self._rng)
        request = internal_pb2.WatchLoadRequest(protocol_version=PROTOCOL_VERSION, router_id=self._router_id)
        while True:
            try:
                async for message in peer.watch_load(request):
                    report = decode_load(message)
                    if report.replica_id != peer.replica_id:
                        raise BadInputError(f"{peer.address} answers for replica {report.replica_id}")
                    self._loads.record(report)
                    backoff.reset()
            except grpc.aio.AioRpcError as error:
                logger.debug("load of %s: %s %s", peer.replica_id, error.code().name, error.details())
            except BadInputError as error:
                # Requests to it are refused by the replica itself; its load counts as unknown.
                logger.error("load of %s refused: %s", peer.replica_id, error)
            await asyncio.sleep(backoff.next_s())
