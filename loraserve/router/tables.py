"""The router's copy of the routing table, kept current by a subscription to the controller.

The controller's versions only grow, across its restarts too, so a version that is not higher than
the kept one is late news, whichever stream brings it, and is dropped. While the controller is away
the last table stays in use.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from random import Random

import grpc

from loraserve.errors import BadInputError
from loraserve.rpc.backoff import Backoff
from loraserve.rpc.codec import PROTOCOL_VERSION
from loraserve.rpc.internal.v1 import internal_pb2
from loraserve.rpc.table_codec import decode_table
from placement.table import RoutingTable

logger = logging.getLogger(__name__)

SERVICE = "loraserve.internal.v1.Control"

REFUSED_CODES = frozenset({grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED})
"""What a controller that speaks another protocol answers."""


class TableFollower:
    """Follows `Control.WatchTable` for as long as `run` runs, reconnecting for ever.

    `on_change` is awaited after each new table and whenever `compatible` changes.
    """

    def __init__(
        self,
        *,
        router_id: str,
        channel: grpc.aio.Channel,
        rng: Random,
        on_change: Callable[[], Awaitable[None]],
    ) -> None:
        self.table = RoutingTable()
        self.compatible = True
        self.connected = False
        self._router_id = router_id
        self._on_change = on_change
        self._backoff = Backoff(rng)
        self._next_table = asyncio.Event()
        self._watch: grpc.aio.UnaryStreamMultiCallable[
            internal_pb2.WatchTableRequest, internal_pb2.RoutingTable
        ] = channel.unary_stream(
            f"/{SERVICE}/WatchTable",
            request_serializer=internal_pb2.WatchTableRequest.SerializeToString,
            response_deserializer=internal_pb2.RoutingTable.FromString,
        )

    async def run(self) -> None:
        """Follow until cancelled."""
        request = internal_pb2.WatchTableRequest(protocol_version=PROTOCOL_VERSION, router_id=self._router_id)
        while True:
            try:
                async for message in self._watch(request):
                    await self._take(message)
                logger.info("the controller ended the table's stream; connecting again")
            except grpc.aio.AioRpcError as error:
                if error.code() in REFUSED_CODES:
                    logger.error("the controller refuses this router: %s", error.details())
                    await self._set_compatible(False)
                elif self.connected:
                    logger.warning(
                        "the controller is away (%s); serving on table %d",
                        error.code().name,
                        self.table.version,
                    )
            except Exception:
                # Without its follower a router would route by an old table for ever, in silence.
                logger.exception("a routing table could not be taken up; connecting again")
            self.connected = False
            await asyncio.sleep(self._backoff.next_s())

    async def reached(self, version: int, timeout_s: float) -> bool:
        """Wait for a table of at least this version; False when `timeout_s` pass without it."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.table.version < version:
                    await self._next_table.wait()
        except TimeoutError:
            return False
        return True

    async def _take(self, message: internal_pb2.RoutingTable) -> None:
        try:
            table = decode_table(message)
        except BadInputError as error:
            logger.error("routing table %d refused: %s", message.version, error)
            if message.protocol_version != PROTOCOL_VERSION:
                await self._set_compatible(False)
            return
        self.connected = True
        self._backoff.reset()
        await self._set_compatible(True)
        if table.version <= self.table.version:
            if table.version < self.table.version:
                logger.warning(
                    "routing table %d dropped: table %d is in use", table.version, self.table.version
                )
            return
        logger.info(
            "routing table %d: %d replicas, %d adapters",
            table.version,
            len(table.replicas),
            len(table.entries),
        )
        self.table = table
        waiters, self._next_table = self._next_table, asyncio.Event()
        waiters.set()
        await self._on_change()

    async def _set_compatible(self, compatible: bool) -> None:
        if compatible != self.compatible:
            self.compatible = compatible
            await self._on_change()
