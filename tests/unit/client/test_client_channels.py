"""Which router is next, and how many connections to replicas a client keeps."""

from random import Random

import pytest

from loraserve.client.replicas import IDLE_S, MAX_IDLE, UNREACHABLE_S, Replicas
from loraserve.client.routers import LONGEST_SKIP_S, NO_PICK_S, Routers
from loraserve.clock import ManualClock
from loraserve.errors import BadInputError, UnavailableError

MAX_BYTES = 2**20


def make_routers(clock: ManualClock, *addresses: str) -> Routers:
    return Routers(addresses, max_message_bytes=MAX_BYTES, clock=clock, rng=Random(0))


async def test_routers_take_turns_and_the_lost_ones_are_skipped_for_longer_each_time() -> None:
    clock = ManualClock()
    routers = make_routers(clock, "a:1", "b:1", "c:1", "a:1")
    a, b, c = routers.in_order()
    turn = [routers.next(()) for _ in range(6)]
    assert turn[:3] == turn[3:]
    assert set(turn) == {a, b, c}
    skips = []
    for _ in range(9):
        routers.note_lost(a)
        routers.note_lost(a)
        skips.append(a.skip_until_s - clock.now_s())
        assert a not in [routers.next(()) for _ in range(6)]
        assert routers.in_order() == (b, c, a)
        assert routers.next({"b:1", "c:1"}) is a, "a lost one is better than none"
        clock.advance(skips[-1])
        assert a in [routers.next(()) for _ in range(6)]
    assert skips[0] <= 0.5
    assert LONGEST_SKIP_S / 2 <= skips[-1] <= LONGEST_SKIP_S
    assert routers.next({"a:1", "b:1", "c:1"}) is None
    assert not routers.reached
    routers.note_answered(a)
    assert (routers.reached, a.losses) == (True, 0)
    await routers.close()


async def test_a_router_that_does_not_know_pick_is_asked_again_later() -> None:
    clock = ManualClock(5.0)
    routers = make_routers(clock, "a:1")
    (router,) = routers.in_order()
    assert routers.may_pick(router)
    routers.note_no_pick(router)
    assert not routers.may_pick(router)
    clock.advance(NO_PICK_S)
    assert routers.may_pick(router)
    await routers.close()


def test_a_client_needs_a_router() -> None:
    with pytest.raises(BadInputError, match="at least one router"):
        make_routers(ManualClock())


async def test_channels_are_shared_bounded_and_closed_when_unused() -> None:
    clock = ManualClock()
    replicas = Replicas(max_message_bytes=MAX_BYTES, clock=clock)
    busy = await replicas.acquire("busy:1")
    assert await replicas.acquire("busy:1") is busy
    replicas.release(busy)
    for index in range(MAX_IDLE + 9):
        replicas.release(await replicas.acquire(f"r{index}:1"))
        assert len(replicas) <= MAX_IDLE + 1
    clock.advance(IDLE_S + 1)
    replicas.release(await replicas.acquire("one:1"))
    assert len(replicas) == 2, "the busy one and the one just used"
    assert await replicas.acquire("busy:1") is busy
    await replicas.close()
    with pytest.raises(UnavailableError, match="the client is closed"):
        await replicas.acquire("one:1")


async def test_an_unreachable_replica_is_left_alone_for_a_while() -> None:
    clock = ManualClock()
    replicas = Replicas(max_message_bytes=MAX_BYTES, clock=clock)
    replica = await replicas.acquire("a:1")
    assert not replicas.hopeless
    replicas.note_unreachable("a:1")
    assert replicas.is_unreachable("a:1")
    assert replicas.hopeless, "none has ever been reached"
    again = await replicas.acquire("a:1")
    assert again is not replica, "a new connection, without the old one's waiting times"
    assert len(replicas) == 2, "its call still has to end"
    replicas.release(replica)
    replicas.release(again)
    await replicas.acquire("b:1")
    assert len(replicas) == 2
    replicas.note_reached("b:1")
    assert replicas.is_unreachable("a:1")
    assert not replicas.hopeless
    clock.advance(UNREACHABLE_S)
    assert not replicas.is_unreachable("a:1")
    await replicas.close()
