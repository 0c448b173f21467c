"""dLoRA's co-migration: what is detected, and what program, greedy search and doing nothing come to."""

from dataclasses import replace
from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from placement.migration.choice import assign, migrate
from placement.migration.problem import (
    Assignment,
    MigratingReplica,
    MigratingRequest,
    Migration,
    MigrationLimits,
    MigrationProblem,
    narrowed,
    overloaded_pairs,
)
from placement.migration.program import solve
from placement.types import ReplicaId, VersionId

LIMITS = MigrationLimits(time_limit_s=None)


def _replica(name: str, *, used: int = 0, requests: int = 0, **more: object) -> MigratingReplica:
    given = MigratingReplica(
        replica_id=ReplicaId(name), kv_blocks=100, kv_blocks_used=used, running=requests, waiting=0
    )
    return replace(given, **more)  # type: ignore[arg-type]


def _request(
    number: int,
    replica: str,
    version: str | None,
    *,
    expected_s: float = 5.0,
    blocks: int = 1,
    tokens: int = 0,
) -> MigratingRequest:
    return MigratingRequest(
        request_id=f"r{number:03}",
        version_id=None if version is None else VersionId(version),
        replica_id=ReplicaId(replica),
        kv_blocks=blocks,
        expected_s=expected_s,
        tokens=tokens,
        rank=8,
    )


@st.composite
def problems(draw: st.DrawFn, max_requests: int = 5) -> MigrationProblem:
    """Up to three replicas, three adapters and so many requests, each where its adapter is held."""
    num = draw(st.integers(2, 3))
    versions = [VersionId(f"v{index}") for index in range(draw(st.integers(1, 3)))]
    replicas = [
        MigratingReplica(
            replica_id=ReplicaId(f"replica-{place}"),
            kv_blocks=draw(st.integers(0, 40)),
            kv_blocks_used=draw(st.integers(0, 40)),
            running=draw(st.integers(0, 40)),
            waiting=draw(st.integers(0, 40)),
            holds=draw(st.frozensets(st.sampled_from(versions))),
            free_adapters=draw(st.integers(0, 2)),
            max_lora_rank=draw(st.sampled_from([8, 64])),
        )
        for place in range(num)
    ]
    requests = []
    for number in range(draw(st.integers(0, max_requests))):
        replica = draw(st.sampled_from(replicas))
        version = draw(st.sampled_from([None, *versions]))
        requests.append(
            MigratingRequest(
                request_id=f"r{number}",
                version_id=version,
                replica_id=replica.replica_id,
                kv_blocks=draw(st.integers(1, 20)),
                expected_s=draw(st.floats(0.1, 10)),
                tokens=draw(st.integers(0, 100)),
                rank=draw(st.sampled_from([8, 64])) if version is not None else 0,
                is_running=draw(st.booleans()),
            )
        )
    load_s = draw(st.sampled_from([0.0, 0.5]))
    return MigrationProblem(
        replicas=tuple(replicas), requests=tuple(requests), load_s=load_s, swap_blocks_per_s=10.0
    )


def _applied(problem: MigrationProblem, found: Migration) -> Assignment:
    """The assignment that the moves make; AssertionError for a move from where the request is not."""
    result = Assignment.stay(problem)
    places = {one.replica_id: place for place, one in enumerate(problem.replicas)}
    index = {one.request_id: number for number, one in enumerate(problem.requests)}
    for move in found.moves:
        number = index[move.request_id]
        assert problem.requests[number].replica_id == move.source != move.target
        result.move(number, places[move.target])
    return result


@given(problems(), st.sampled_from([None, 0.0]))
@settings(max_examples=60, deadline=None)
def test_every_request_is_where_it_may_be_and_nothing_gets_worse(
    problem: MigrationProblem, time_limit_s: float | None
) -> None:
    found = assign(problem, replace(LIMITS, time_limit_s=time_limit_s))
    applied = _applied(problem, found)
    assert applied.is_valid()
    assert found.stay_s == Assignment.stay(problem).longest_s()
    assert found.busy_s <= found.stay_s + 1e-9
    assert abs(applied.longest_s() - found.busy_s) < 1e-6
    for replica in problem.replicas:
        coming = {version for target, version in found.loads if target == replica.replica_id}
        assert len(coming) <= replica.free_adapters
        for move in found.moves:
            if move.target == replica.replica_id and move.version_id is not None:
                assert move.version_id in replica.holds | coming
        for version in coming:
            ranks = {one.rank for one in problem.requests if one.version_id == version and one.rank}
            assert min(ranks) <= replica.max_lora_rank


@given(problems(max_requests=4))
@settings(max_examples=40, deadline=None)
def test_the_best_of_all_assignments_lies_between_the_programs_bound_and_what_is_found(
    problem: MigrationProblem,
) -> None:
    found = assign(problem, LIMITS)
    places = range(len(problem.replicas))
    every = (Assignment(problem, list(choice)) for choice in product(places, repeat=len(problem.requests)))
    best_s = min(one.longest_s() for one in every if one.is_valid())
    assert found.bound_s <= best_s * (1 + 1e-6) + 1e-6
    assert best_s <= found.busy_s + 1e-9


@given(problems(), st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None)
def test_the_order_of_replicas_and_requests_does_not_matter(
    problem: MigrationProblem, random: object
) -> None:
    replicas, requests = list(problem.replicas), list(problem.requests)
    random.shuffle(replicas)  # type: ignore[attr-defined]
    random.shuffle(requests)  # type: ignore[attr-defined]
    shuffled = replace(problem, replicas=tuple(replicas), requests=tuple(requests))
    assert assign(shuffled, LIMITS) == assign(problem, LIMITS)


def test_the_program_finds_what_a_greedy_search_does_not() -> None:
    """Four long and six short requests of two adapters, room for one of them: only the whole view pays."""
    requests = [_request(number, "a", "long", expected_s=10.0) for number in range(4)]
    requests += [_request(10 + number, "a", "short", expected_s=4.0) for number in range(10)]
    problem = MigrationProblem(
        replicas=(
            _replica("a", holds=frozenset({VersionId("long"), VersionId("short")})),
            _replica("b", free_adapters=1),
        ),
        requests=tuple(requests),
        load_s=0.0,
    )
    found = assign(problem, LIMITS)
    assert found.stay_s == 80.0
    assert found.busy_s <= 40.5
    assert found.loads == ((ReplicaId("b"), found.moves[0].version_id),)
    assert found.bound_s <= found.busy_s <= 1.02 * found.bound_s


def test_without_time_the_greedy_search_decides() -> None:
    requests = tuple(_request(number, "a", None) for number in range(8))
    problem = MigrationProblem(replicas=(_replica("a"), _replica("b")), requests=requests)
    # A bound below what is possible leaves the program without a solution, as a lack of time may.
    assert solve(problem, LIMITS, upper_s=1.0).target is None
    found = assign(problem, replace(LIMITS, time_limit_s=0.0))
    assert (len(found.moves), round(found.busy_s, 6)) == (4, 20.2)


def test_pairs_are_by_memory_first_and_else_by_requests() -> None:
    full = _replica("full", used=95, requests=3)
    fuller = _replica("fuller", used=99, requests=1)
    half, empty = _replica("half", used=50, requests=30), _replica("empty", requests=2)
    assert overloaded_pairs([full, half, empty, fuller], LIMITS) == (
        ("fuller", "empty"),
        ("full", "half"),
    )
    assert overloaded_pairs([full, fuller], LIMITS) == ()
    # The mean is 16: with 32 requests one is 16 above it, with 31 it is not.
    crowd = _replica("crowd", requests=32)
    assert overloaded_pairs([crowd, replace(empty, running=0)], LIMITS) == (("crowd", "empty"),)
    assert overloaded_pairs([replace(crowd, running=31), replace(empty, running=1)], LIMITS) == ()
    assert len(overloaded_pairs([full, half, empty, fuller], replace(LIMITS, max_pairs=1))) == 1


def test_nothing_moves_without_overload_and_what_is_cheap_moves_first() -> None:
    calm = MigrationProblem(
        replicas=(_replica("a"), _replica("b")),
        requests=tuple(_request(number, "a", None) for number in range(8)),
    )
    assert migrate(calm, LIMITS) == Migration()
    waiting = [_request(number, "a", None, tokens=0) for number in range(6)]
    running = [replace(_request(10 + number, "a", None, tokens=50), is_running=True) for number in range(6)]
    problem = MigrationProblem(
        replicas=(_replica("a", used=95), _replica("b"), _replica("c", used=40)),
        requests=(*running, *waiting),
    )
    found = migrate(problem, LIMITS)
    assert {move.target for move in found.moves} == {ReplicaId("b")}
    assert {move.request_id for move in found.moves} <= {request.request_id for request in waiting}


def test_what_is_left_out_is_taken_off_the_memory() -> None:
    requests = tuple(_request(number, "a", None, blocks=10, tokens=number) for number in range(6))
    problem = MigrationProblem(replicas=(_replica("a"), _replica("b"), _replica("c")), requests=requests)
    pairs = [(ReplicaId("a"), ReplicaId("b"))]
    part = narrowed(problem, pairs, replace(LIMITS, max_requests=4))
    assert [request.tokens for request in part.requests] == [0, 1, 2, 3]
    assert [(one.replica_id, one.kv_blocks) for one in part.replicas] == [("a", 80), ("b", 100)]
