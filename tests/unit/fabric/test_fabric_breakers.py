"""A scheme's trial is not used up by an address that is left alone, and idle addresses are forgotten."""

from loraserve.clock import ManualClock
from loraserve.fabric.breakers import Breakers
from placement.fabric.attempts import Outcome
from placement.fabric.breaker import BreakerRules


def made(clock: ManualClock) -> Breakers:
    return Breakers(BreakerRules(failures=1, first_s=1, max_s=100), clock)


def learn(breakers: Breakers, address: bytes, outcome: Outcome) -> None:
    breakers.learn("ucx", address, address.decode(), outcome, is_missing=False)


def test_an_address_that_is_left_alone_leaves_the_schemes_trial_to_others() -> None:
    clock = ManualClock()
    breakers = made(clock)
    learn(breakers, b"bad", Outcome.UNREACHABLE)
    clock.advance(0.5)
    breakers.blame_scheme("ucx")
    learn(breakers, b"bad", Outcome.UNREACHABLE)
    assert breakers.not_closed() == {"ucx": "open", "bad/ucx": "open"}
    clock.advance(1)
    assert breakers.allows("ucx", b"bad", "bad"), "its trial, and the scheme's"
    learn(breakers, b"bad", Outcome.UNREACHABLE)
    assert not breakers.allows("ucx", b"bad", "bad")
    assert breakers.allows("ucx", b"good", "good")
    learn(breakers, b"good", Outcome.DONE)
    assert breakers.not_closed() == {"bad/ucx": "open"}


def test_a_peer_that_answers_at_all_is_no_failure() -> None:
    breakers = made(ManualClock())
    for outcome in (Outcome.NOT_PUBLISHED, Outcome.UNUSABLE, Outcome.STOPPED, Outcome.DONE):
        assert breakers.allows("ucx", b"one", "one")
        learn(breakers, b"one", outcome)
    assert breakers.not_closed() == {}
    learn(breakers, b"one", Outcome.BROKEN)
    assert breakers.not_closed() == {"ucx": "open"}, "it is the scheme that broke"


def test_no_more_addresses_are_kept_than_a_bound() -> None:
    breakers = made(ManualClock())
    for number in range(1100):
        learn(breakers, b"%d" % number, Outcome.GONE)
    assert len(breakers.not_closed()) == 1024
    assert "1099/ucx" in breakers.not_closed()
