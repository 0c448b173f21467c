"""The routers that a client may use: their channels, and which one is worth trying next.

A router that is lost is skipped while another is up, for longer each time; an answer clears it.
"""

import itertools
from collections.abc import Container, Sequence
from random import Random
from typing import TYPE_CHECKING

from grpc_health.v1 import health_pb2

from loraserve.client.picks import PickStream
from loraserve.clock import Clock
from loraserve.errors import BadInputError
from loraserve.rpc.server import make_channel
from loraserve.rpc.v1 import inference_pb2_grpc, management_pb2_grpc

if TYPE_CHECKING:
    from loraserve.rpc.v1.inference_pb2_grpc import InferenceAsyncStub
    from loraserve.rpc.v1.management_pb2_grpc import ManagementAsyncStub

CONNECT_TIMEOUT_S = 1.0
FIRST_SKIP_S = 0.5
LONGEST_SKIP_S = 30.0
NO_PICK_S = 60.0
"""How long a router that does not know Pick is not asked again: it may have been replaced since."""


class Router:
    """One router and what is known of it; `Routers` alone writes the latter."""

    def __init__(self, address: str, *, max_message_bytes: int) -> None:
        self.address = address
        self.channel = make_channel(
            address, max_message_bytes=max_message_bytes, connect_timeout_s=CONNECT_TIMEOUT_S
        )
        self.inference: InferenceAsyncStub = inference_pb2_grpc.InferenceStub(self.channel)
        self.picks = PickStream(self.inference)
        self.management: ManagementAsyncStub = management_pb2_grpc.ManagementStub(self.channel)
        self.check_health = self.channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        self.reached = False
        self.losses = 0
        self.skip_until_s = 0.0
        self.no_pick_until_s = 0.0


class Routers:
    """All routers of one client, used in turn."""

    def __init__(
        self, addresses: Sequence[str], *, max_message_bytes: int, clock: Clock, rng: Random
    ) -> None:
        if not addresses:
            raise BadInputError("address: give the HOST:PORT of at least one router")
        self.addresses = tuple(dict.fromkeys(addresses))
        self._clock = clock
        self._rng = rng
        self._all = tuple(Router(one, max_message_bytes=max_message_bytes) for one in self.addresses)
        # Clients that are given the same list begin at different routers.
        self._turn = itertools.count(rng.randrange(len(self._all)))
        self.closed = False

    @property
    def reached(self) -> bool:
        """Whether any router has ever answered: if none has, waiting for one to come back is vain."""
        return any(router.reached for router in self._all)

    def in_order(self) -> tuple[Router, ...]:
        """As they were given, those to be skipped last."""
        now_s = self._clock.now_s()
        return tuple(sorted(self._all, key=lambda router: router.skip_until_s > now_s))

    def next(self, tried: Container[str]) -> Router | None:
        """The next router in turn that was not tried, one that is lost only if there is no other."""
        now_s = self._clock.now_s()
        start = next(self._turn)
        lost: Router | None = None
        for offset in range(len(self._all)):
            router = self._all[(start + offset) % len(self._all)]
            if router.address in tried:
                continue
            if router.skip_until_s <= now_s:
                return router
            lost = lost or router
        return lost

    def may_pick(self, router: Router) -> bool:
        """Whether this router is worth asking where a request should go."""
        return router.no_pick_until_s == 0.0 or router.no_pick_until_s <= self._clock.now_s()

    def note_answered(self, router: Router) -> None:
        """It is up."""
        router.reached = True
        router.losses = 0
        router.skip_until_s = 0.0

    def note_lost(self, router: Router) -> None:
        """It could not be reached, or went away; many requests that saw the same loss count once."""
        now_s = self._clock.now_s()
        if router.skip_until_s > now_s:
            return
        skip_s = min(LONGEST_SKIP_S, FIRST_SKIP_S * 2.0**router.losses)
        router.losses = min(router.losses + 1, 16)
        router.skip_until_s = now_s + skip_s * self._rng.uniform(0.5, 1.0)

    def note_no_pick(self, router: Router) -> None:
        """It does not know Pick."""
        router.no_pick_until_s = self._clock.now_s() + NO_PICK_S

    async def close(self) -> None:
        """Close all channels, cancelling what still runs; safe to call twice."""
        self.closed = True
        for router in self._all:
            await router.picks.close()
            await router.channel.close()
