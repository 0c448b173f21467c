"""Conservation of requests in the ledger, and what is kept of them."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from loraserve.errors import AlreadyExistsError, OverloadedError
from loraserve.router.ledger import Ledger, RequestOutcome
from placement.types import ReplicaId

LIMIT = 5


def outcome(request_id: str, status: str = "OK", attempts: int = 1) -> RequestOutcome:
    return RequestOutcome(
        request_id=request_id,
        adapter="",
        status=status,
        replica_id=None,
        version_id=None,
        reason=None,
        table_version=None,
        attempts=attempts,
        messages=0,
        started_s=0.0,
        first_message_s=None,
        ended_s=1.0,
    )


class LedgerMachine(RuleBasedStateMachine):
    """Any order of opening, assigning, releasing, refusing and closing conserves requests."""

    waiting = Bundle("waiting")
    assigned = Bundle("assigned")

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(max_in_flight=LIMIT)
        self.serial = 0
        self.model: set[str] = set()

    @rule(target=waiting)
    def open(self) -> str:
        self.serial += 1
        name = f"q{self.serial}"
        if len(self.model) < LIMIT:
            self.ledger.open(name)
            self.model.add(name)
            return name
        with pytest.raises(OverloadedError):
            self.ledger.open(name)
        self.ledger.refuse()
        return ""

    @rule(name=consumes(waiting), replica=st.sampled_from(["r0", "r1"]), target=assigned)
    def assign(self, name: str, replica: str) -> tuple[str, str]:
        if name:
            self.ledger.assign(ReplicaId(replica))
        return name, replica

    @rule(
        pair=consumes(assigned),
        status=st.sampled_from(["OK", "CANCELLED", "INTERNAL"]),
    )
    def finish(self, pair: tuple[str, str], status: str) -> None:
        name, replica = pair
        if name:
            self.ledger.release(ReplicaId(replica))
            self.ledger.close(outcome(name, status))
            self.model.discard(name)

    @invariant()
    def conserved(self) -> None:
        self.ledger.check_invariants(idle=not self.model)
        assert self.ledger.num_open == len(self.model)


LedgerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestLedger = LedgerMachine.TestCase


def test_each_end_is_counted_under_one_name() -> None:
    ledger = Ledger(max_in_flight=10)
    for name, status, attempts in (
        ("a", "OK", 1),
        ("b", "CANCELLED", 1),
        ("c", "INTERNAL", 2),
        ("d", "NOT_FOUND", 0),
    ):
        ledger.open(name)
        ledger.close(outcome(name, status, attempts))
    ledger.refuse()
    counters = ledger.counters()
    assert (counters.requests, counters.completed, counters.cancelled) == (5, 1, 1)
    assert (counters.failed, counters.refused, counters.in_flight) == (1, 2, 0)


def test_an_open_id_is_refused() -> None:
    ledger = Ledger(max_in_flight=10)
    ledger.open("same")
    with pytest.raises(AlreadyExistsError, match="same"):
        ledger.open("same")
    ledger.check_invariants()


def test_the_ring_of_outcomes_is_bounded() -> None:
    ledger = Ledger(max_in_flight=1, max_outcomes=3)
    for index in range(10):
        ledger.open(str(index))
        ledger.close(outcome(str(index)))
    assert [kept.request_id for kept in ledger.outcomes] == ["7", "8", "9"]


def test_the_checker_notices_a_leak() -> None:
    ledger = Ledger(max_in_flight=1)
    ledger.open("a")
    ledger.assign(ReplicaId("r0"))
    with pytest.raises(AssertionError, match="open requests"):
        ledger.check_invariants(idle=True)
    ledger.close(outcome("a"))
    with pytest.raises(AssertionError, match="more requests are assigned"):
        ledger.check_invariants()


async def test_idle_waits_for_the_last_request() -> None:
    ledger = Ledger(max_in_flight=1)
    assert await ledger.idle(0.0)
    ledger.open("a")
    assert not await ledger.idle(0.01)
    ledger.close(outcome("a"))
    assert await ledger.idle(0.0)
