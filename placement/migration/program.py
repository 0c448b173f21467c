"""dLoRA's integer program for co-migration, solved with HiGHS.

With x_ij the part of request i that goes to replica j, y_kj whether replica j loads adapter k, blocks and
seconds as in `placement.migration.problem` (dLoRA, OSDI'24, as published in its artifact):

    minimise T
    subject to  sum_j x_ij = 1                                   every request somewhere
                sum_{i of k} x_ij <= n_k y_kj                    only where its adapter is or comes
                sum_k y_kj <= free adapters of j
                mem_j >= (sum_i blocks_i x_ij - kv_blocks_j) / (swapped blocks/s)
                T >= sum_i exec_i x_ij + move_s sum_{i moved} x_ij + load_s sum_k y_kj + mem_j

y is binary, x relaxed; a request goes where most of it is. Only adapters that a replica does not hold have a
y.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from placement.migration.problem import MigrationLimits, MigrationProblem

GAP = 0.01
"""How far from the best the program may stop, as a part of it."""

_STATUSES = {0: "optimal", 1: "limit reached", 2: "infeasible", 3: "unbounded"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """A replica's place for each request, None if none was found in time; `bound_s` holds for every
    assignment."""

    target: tuple[int, ...] | None
    bound_s: float
    status: str


@dataclass(slots=True)
class _Rows:
    """Constraints as triples, and the bounds of each row."""

    rows: list[int]
    columns: list[int]
    values: list[float]
    lower: list[float]
    upper: list[float]

    def open(self, lower: float, upper: float) -> int:
        self.lower.append(lower)
        self.upper.append(upper)
        return len(self.lower) - 1

    def put(self, row: int, column: int, value: float) -> None:
        self.rows.append(row)
        self.columns.append(column)
        self.values.append(value)


@dataclass(frozen=True, slots=True)
class _Columns:
    """Where each variable is: T, then mem_j, then x, then y."""

    num_replicas: int
    x: dict[tuple[int, int], int]
    y: dict[tuple[str, int], int]

    @property
    def num(self) -> int:
        return 1 + self.num_replicas + len(self.x) + len(self.y)


def solve(problem: MigrationProblem, limits: MigrationLimits, *, upper_s: float) -> Solution:
    """The program's assignment, by at most the limits' time and nodes; `upper_s` is the longest busy time of
    a known assignment, which T need not pass."""
    columns = _columns(problem)
    if not any(place != _source(problem)[index] for index, place in columns.x):
        return Solution(target=None, bound_s=0.0, status="")
    result = _run(problem, columns, limits, upper_s)
    status = _STATUSES.get(int(result.status), str(result.message))
    dual = getattr(result, "mip_dual_bound", None)
    bound_s = float(dual) if dual is not None and np.isfinite(dual) else 0.0
    if result.x is None:
        return Solution(target=None, bound_s=max(0.0, bound_s), status=status)
    return Solution(target=_rounded(problem, columns, result.x), bound_s=max(0.0, bound_s), status=status)


def _source(problem: MigrationProblem) -> list[int]:
    places = {one.replica_id: place for place, one in enumerate(problem.replicas)}
    return [places[request.replica_id] for request in problem.requests]


def _columns(problem: MigrationProblem) -> _Columns:
    num = len(problem.replicas)
    x: dict[tuple[int, int], int] = {}
    needed: set[tuple[str, int]] = set()
    for index, request in enumerate(problem.requests):
        for place, replica in enumerate(problem.replicas):
            if not problem.may_go(request, replica):
                continue
            x[index, place] = 1 + num + len(x)
            version = request.version_id
            if (
                version is not None
                and version not in replica.holds
                and request.replica_id != replica.replica_id
            ):
                needed.add((version, place))
    y = {key: 1 + num + len(x) + position for position, key in enumerate(sorted(needed))}
    return _Columns(num, x, y)


def _rows(problem: MigrationProblem, columns: _Columns) -> _Rows:
    rows = _Rows([], [], [], [], [])
    source = _source(problem)
    somewhere = [rows.open(1.0, 1.0) for _ in problem.requests]
    come = {key: rows.open(-np.inf, 0.0) for key in columns.y}
    capacity = [rows.open(-np.inf, float(max(0, one.free_adapters))) for one in problem.replicas]
    memory = [rows.open(-np.inf, one.kv_blocks / problem.swap_blocks_per_s) for one in problem.replicas]
    longest = [rows.open(-np.inf, 0.0) for _ in problem.replicas]
    counts: dict[tuple[str, int], int] = dict.fromkeys(columns.y, 0)
    for (index, place), column in columns.x.items():
        request = problem.requests[index]
        is_moved = source[index] != place
        rows.put(somewhere[index], column, 1.0)
        rows.put(memory[place], column, request.kv_blocks / problem.swap_blocks_per_s)
        rows.put(longest[place], column, request.expected_s + (problem.move_s if is_moved else 0.0))
        key = (request.version_id or "", place)
        if key in come and is_moved:
            rows.put(come[key], column, 1.0)
            counts[key] += 1
    for key, column in columns.y.items():
        rows.put(come[key], column, -float(counts[key]))
        rows.put(capacity[key[1]], column, 1.0)
        rows.put(longest[key[1]], column, problem.load_s)
    for place in range(columns.num_replicas):
        rows.put(memory[place], 1 + place, -1.0)
        rows.put(longest[place], 1 + place, 1.0)
        rows.put(longest[place], 0, -1.0)
    return rows


def _run(problem: MigrationProblem, columns: _Columns, limits: MigrationLimits, upper_s: float) -> Any:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    rows = _rows(problem, columns)
    shape = (len(rows.lower), columns.num)
    matrix = csr_matrix((rows.values, (rows.rows, rows.columns)), shape=shape)
    cost = np.zeros(columns.num)
    cost[0] = 1.0
    upper = np.full(columns.num, np.inf)
    # A little above, as the known assignment itself must stay inside.
    upper[0] = upper_s * (1 + 1e-6) + 1e-6
    for place in (*columns.x.values(), *columns.y.values()):
        upper[place] = 1.0
    is_binary = np.zeros(columns.num, dtype=np.int64)
    for place in columns.y.values():
        is_binary[place] = 1
    options: Any = {"mip_rel_gap": GAP}
    if limits.time_limit_s is not None:
        options["time_limit"] = limits.time_limit_s
    if limits.node_limit is not None:
        options["node_limit"] = limits.node_limit
    return milp(
        cost,
        integrality=is_binary,
        bounds=Bounds(np.zeros(columns.num), upper),
        constraints=LinearConstraint(matrix, np.array(rows.lower), np.array(rows.upper)),
        options=options,
    )


def _rounded(problem: MigrationProblem, columns: _Columns, values: Any) -> tuple[int, ...]:
    """Each request where most of it is; of equal parts at home, then in the first."""
    source = _source(problem)
    best: list[tuple[float, bool, int] | None] = [None] * len(problem.requests)
    for (index, place), column in columns.x.items():
        # Rounded, so that solvers that differ in the last digits agree on what is equal.
        key = (round(float(values[column]), 6), place == source[index], -place)
        before = best[index]
        if before is None or key > before:
            best[index] = key
    return tuple(-key[2] for key in best if key is not None)
