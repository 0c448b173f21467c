"""What dLoRA's reactive step does: the best of staying, of a greedy search and of the integer program."""

from dataclasses import replace

from placement.migration.greedy import improve, put_back
from placement.migration.problem import (
    GAIN_TOLERANCE,
    Assignment,
    Migration,
    MigrationLimits,
    MigrationMethod,
    MigrationProblem,
    Move,
    narrowed,
    overloaded_pairs,
)
from placement.migration.program import solve


def migrate(problem: MigrationProblem, limits: MigrationLimits | None = None) -> Migration:
    """What dLoRA's reactive step does now: nothing unless a replica is overloaded and moving makes the
    longest any is busy shorter. The same for the same problem in any order, unless the program runs out of
    time."""
    limits = limits or MigrationLimits()
    pairs = overloaded_pairs(problem.replicas, limits)
    if not pairs:
        return Migration()
    return assign(narrowed(problem, pairs, limits), limits)


def assign(problem: MigrationProblem, limits: MigrationLimits) -> Migration:
    """The best of staying, the greedy search and the program, over all the problem's requests.

    The program's fractional requests go where most of them is, and what that breaks is mended by the greedy
    search from there. No request moves for which it would be no worse to stay.
    """
    problem = _ordered(problem)
    stay = Assignment.stay(problem)
    stay_s = stay.longest_s()
    best = stay
    method: MigrationMethod = "stay"
    greedy = improve(stay.copy())
    if greedy.longest_s() < stay_s - GAIN_TOLERANCE:
        best, method = greedy, "greedy"
    solution = solve(problem, limits, upper_s=best.longest_s())
    if solution.target is not None:
        found = Assignment(problem, list(solution.target))
        if found.is_valid() and improve(found).longest_s() < best.longest_s() - GAIN_TOLERANCE:
            best, method = found, "program"
    put_back(best)
    return _told(best, stay_s, solution.bound_s, method, solution.status)


def _ordered(problem: MigrationProblem) -> MigrationProblem:
    return replace(
        problem,
        replicas=tuple(sorted(problem.replicas, key=lambda one: one.replica_id)),
        requests=tuple(sorted(problem.requests, key=lambda one: one.request_id)),
    )


def _told(
    found: Assignment, stay_s: float, bound_s: float, method: MigrationMethod, program_status: str
) -> Migration:
    problem = found.problem
    moves = [
        Move(
            request_id=request.request_id,
            version_id=request.version_id,
            source=request.replica_id,
            target=problem.replicas[place].replica_id,
        )
        for request, place, source in zip(problem.requests, found.target, found.source, strict=True)
        if place != source
    ]
    loads = [
        (replica.replica_id, version)
        for replica, versions in zip(problem.replicas, found.per_version, strict=True)
        for version in sorted(versions)
    ]
    return Migration(
        moves=tuple(moves),
        loads=tuple(loads),
        stay_s=stay_s,
        busy_s=found.longest_s(),
        bound_s=bound_s,
        method=method if moves else "stay",
        program_status=program_status,
    )
