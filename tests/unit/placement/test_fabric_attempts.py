"""The order in which sources are tried follows from how the attempts end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.fabric.attempts import (
    AttemptCommand,
    Attempts,
    Begun,
    Ended,
    Finish,
    GiveUp,
    Outcome,
    PeerChoice,
    TryOrigin,
    TryPeer,
)

PEERS = (PeerChoice(peer_id="a", schemes=("ucx", "tcp")), PeerChoice(peer_id="b", schemes=("ucx", "tcp")))


def told(attempts: Attempts, *outcomes: Outcome) -> list[str]:
    """What is asked for, in short, when the attempts end so."""
    said = [*attempts.handle(Begun())]
    for outcome in outcomes:
        said += attempts.handle(Ended(outcome=outcome))
    return [_short(command) for command in said]


def _short(command: AttemptCommand) -> str:
    match command:
        case TryPeer(peer_id=peer, scheme=scheme):
            return f"{peer}:{scheme}"
        case TryOrigin():
            return "origin"
        case Finish():
            return "done"
        case GiveUp(reason=reason):
            return f"give up: {reason.value if reason else None}"


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (Outcome.UNREACHABLE, ["a:ucx", "a:tcp", "b:ucx", "b:tcp", "origin"]),
        (Outcome.BROKEN, ["a:ucx", "a:tcp", "b:ucx", "b:tcp", "origin"]),
        (Outcome.REFUSED, ["a:ucx", "a:tcp", "b:ucx", "b:tcp", "origin"]),
        (Outcome.GONE, ["a:ucx", "b:ucx", "a:tcp", "b:tcp", "origin"]),
        (Outcome.SLOW, ["a:ucx", "b:ucx", "a:tcp", "b:tcp", "origin"]),
        (Outcome.CORRUPT, ["a:ucx", "b:ucx", "origin"]),
        (Outcome.NOT_PUBLISHED, ["a:ucx", "b:ucx", "origin"]),
        (Outcome.UNUSABLE, ["a:ucx", "give up: cannot be used"]),
        (Outcome.STOPPED, ["a:ucx", "give up: stopped"]),
    ],
)
def test_what_comes_after_an_attempt_that_failed(outcome: Outcome, expected: list[str]) -> None:
    expected = [word.replace("cannot be used", "unusable") for word in expected]
    outcomes = [outcome] * (len(expected) - 1)
    assert told(Attempts(PEERS, has_origin=True), *outcomes) == expected


def test_it_is_done_when_one_succeeds_wherever() -> None:
    assert told(Attempts(PEERS, has_origin=True), Outcome.GONE, Outcome.DONE) == ["a:ucx", "b:ucx", "done"]
    assert told(Attempts((), has_origin=True), Outcome.DONE) == ["origin", "done"]


def test_it_gives_up_with_the_last_outcome_when_nothing_is_left() -> None:
    assert told(Attempts((), has_origin=False)) == ["give up: None"]
    assert told(Attempts((), has_origin=True), Outcome.FAILED) == ["origin", "give up: failed"]
    assert told(Attempts(PEERS[:1], has_origin=False), Outcome.CORRUPT) == ["a:ucx", "give up: corrupt"]


def test_attempts_that_began_are_bounded_and_those_a_breaker_refused_do_not_count() -> None:
    few = Attempts(PEERS, has_origin=True, max_attempts=2)
    assert told(few, Outcome.REFUSED, Outcome.GONE, Outcome.GONE) == ["a:ucx", "a:tcp", "b:ucx", "origin"]


def test_an_answer_that_nobody_asked_for_is_refused() -> None:
    attempts = Attempts(PEERS, has_origin=False)
    with pytest.raises(ValueError, match="no attempt was asked for"):
        attempts.handle(Ended(outcome=Outcome.DONE))
    attempts.handle(Begun())
    with pytest.raises(ValueError, match="has begun"):
        attempts.handle(Begun())


peer_lists = st.lists(
    st.builds(
        PeerChoice,
        peer_id=st.sampled_from("abcd"),
        schemes=st.lists(st.sampled_from(["ucx", "tcp", "memory"]), max_size=3, unique=True).map(tuple),
    ),
    max_size=5,
)


@given(
    peer_lists, st.booleans(), st.integers(0, 6), st.lists(st.sampled_from(Outcome), min_size=40, max_size=40)
)
def test_whatever_happens_it_ends_and_repeats_nothing(
    peers: list[PeerChoice], has_origin: bool, max_attempts: int, outcomes: list[Outcome]
) -> None:
    attempts = Attempts(peers, has_origin=has_origin, max_attempts=max_attempts)
    (command,) = attempts.handle(Begun())
    tried: list[tuple[str, str]] = []
    out: set[str] = set()
    num_begun, origins, outcome = 0, 0, None
    for outcome in outcomes:
        if isinstance(command, Finish | GiveUp):
            break
        if isinstance(command, TryPeer):
            pair = (command.peer_id, command.scheme)
            assert pair not in tried, "never the same twice"
            assert command.peer_id not in out, "who lied or has nothing is not asked again"
            assert origins == 0, "the origin comes last"
            tried.append(pair)
            num_begun += outcome is not Outcome.REFUSED
            if outcome in (Outcome.CORRUPT, Outcome.NOT_PUBLISHED):
                out.add(command.peer_id)
        else:
            origins += 1
        was_origin = isinstance(command, TryOrigin)
        (command,) = attempts.handle(Ended(outcome=outcome))
        assert isinstance(command, Finish) == (outcome is Outcome.DONE)
        if was_origin or outcome in (Outcome.STOPPED, Outcome.UNUSABLE):
            assert isinstance(command, Finish | GiveUp)
    assert isinstance(command, Finish | GiveUp), "it ends"
    assert num_begun <= max_attempts
    assert origins <= has_origin
