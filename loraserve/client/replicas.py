"""Channels to the replicas that answer a client directly: shared, bounded, closed when unused."""

from collections import OrderedDict
from typing import TYPE_CHECKING

from loraserve.clock import Clock
from loraserve.errors import UnavailableError
from loraserve.rpc.server import make_channel
from loraserve.rpc.v1 import inference_pb2_grpc

if TYPE_CHECKING:
    from loraserve.rpc.v1.inference_pb2_grpc import InferenceAsyncStub

CONNECT_TIMEOUT_S = 1.0
UNREACHABLE_S = 30.0
IDLE_S = 60.0
MAX_IDLE = 64
MAX_UNREACHABLE = 1024


class ReplicaChannel:
    """The connection to one replica; `calls` of this client run on it."""

    def __init__(self, address: str, *, max_message_bytes: int) -> None:
        self.address = address
        self.channel = make_channel(
            address, max_message_bytes=max_message_bytes, connect_timeout_s=CONNECT_TIMEOUT_S
        )
        self.inference: InferenceAsyncStub = inference_pb2_grpc.InferenceStub(self.channel)
        self.calls = 0
        self.used_s = 0.0


class Replicas:
    """At most `MAX_IDLE` channels without calls, none of them unused for longer than `IDLE_S` once
    another one is asked for; and which addresses this client cannot reach."""

    def __init__(self, *, max_message_bytes: int, clock: Clock) -> None:
        self._max_message_bytes = max_message_bytes
        self._clock = clock
        # Least recently used first.
        self._channels: OrderedDict[str, ReplicaChannel] = OrderedDict()
        self._retired: list[ReplicaChannel] = []
        self._unreachable_until_s: dict[str, float] = {}
        self._reached = False
        self._sweep_s = 0.0
        self._closed = False

    def __len__(self) -> int:
        return len(self._channels) + len(self._retired)

    @property
    def hopeless(self) -> bool:
        """Whether an attempt has failed lately and none has ever succeeded: this client probably stands
        where it reaches routers only."""
        return not self._reached and any(map(self.is_unreachable, self._unreachable_until_s))

    def is_unreachable(self, address: str) -> bool:
        """Whether this replica could not be reached a short time ago."""
        until_s = self._unreachable_until_s.get(address)
        return until_s is not None and until_s > self._clock.now_s()

    async def acquire(self, address: str) -> ReplicaChannel:
        """The replica's channel, for one call; `release` it when the call has ended.

        UnavailableError once this is closed.
        """
        if self._closed:
            raise UnavailableError("the client is closed")
        now_s = self._clock.now_s()
        replica = self._channels.get(address)
        if replica is None:
            replica = ReplicaChannel(address, max_message_bytes=self._max_message_bytes)
            self._channels[address] = replica
        self._channels.move_to_end(address)
        replica.calls += 1
        replica.used_s = now_s
        try:
            await self._close_unused(now_s)
        except BaseException:
            self.release(replica)
            raise
        return replica

    def release(self, replica: ReplicaChannel) -> None:
        """One call on it has ended."""
        replica.calls -= 1
        replica.used_s = self._clock.now_s()

    def note_reached(self, address: str) -> None:
        """It has answered."""
        self._reached = True
        self._unreachable_until_s.pop(address, None)

    def note_unreachable(self, address: str) -> None:
        """It cannot be connected to; the next try makes a connection of its own."""
        now_s = self._clock.now_s()
        if len(self._unreachable_until_s) >= MAX_UNREACHABLE:
            self._unreachable_until_s = {
                one: until_s for one, until_s in self._unreachable_until_s.items() if until_s > now_s
            }
        self._unreachable_until_s[address] = now_s + UNREACHABLE_S
        replica = self._channels.pop(address, None)
        if replica is not None:
            self._retired.append(replica)

    async def close(self) -> None:
        """Close all channels, cancelling what still runs; safe to call twice."""
        self._closed = True
        channels = [*self._channels.values(), *self._retired]
        self._channels.clear()
        self._retired.clear()
        for replica in channels:
            await replica.channel.close()

    async def _close_unused(self, now_s: float) -> None:
        if now_s < self._sweep_s and len(self._channels) <= MAX_IDLE and not self._retired:
            return
        self._sweep_s = now_s + IDLE_S / 2
        unused = [one for one in self._retired if one.calls == 0]
        self._retired = [one for one in self._retired if one.calls > 0]
        for address, replica in list(self._channels.items()):
            old = now_s - replica.used_s > IDLE_S
            if replica.calls == 0 and (old or len(self._channels) > MAX_IDLE):
                unused.append(self._channels.pop(address))
        for replica in unused:
            await replica.channel.close()
