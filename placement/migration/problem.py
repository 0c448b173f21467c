"""dLoRA's reactive co-migration: which requests of overloaded replicas go where, with which adapters.

Owns the values, the detector, and what an assignment costs; `migration.choice` decides. Knows no clock and
moves nothing.

From dLoRA (OSDI'24): replicas are paired, one whose KV cache is 90 % full with one whose is not, else one
with 16 requests more than the mean with one below it; the requests of those paired are assigned anew so that
the replica that is busy the longest is so for as short as possible. Otherwise than there, a replica keeps the
copies that it has: they are the placement's, and only what it has room for beside them may come.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from placement.types import ReplicaId, VersionId

MigrationMethod = Literal["stay", "greedy", "program"]

GAIN_TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class MigratingRequest:
    """A request in a replica, running or waiting there.

    `version_id` None is the base model, which every replica has. `kv_blocks` is what it takes in the KV
    cache, or will when it runs; `expected_s` how long it still runs; `tokens` how many it has drawn so far.
    """

    request_id: str
    version_id: VersionId | None
    replica_id: ReplicaId
    kv_blocks: int
    expected_s: float = 5.0
    tokens: int = 0
    rank: int = 0
    is_running: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MigratingReplica:
    """A replica that may give or take requests.

    `kv_blocks` is the size of its KV cache, `kv_blocks_used` what is taken of it now. It `holds` adapters
    that take requests, and has room for `free_adapters` more, none above `max_lora_rank`.
    """

    replica_id: ReplicaId
    kv_blocks: int
    kv_blocks_used: int
    running: int
    waiting: int
    holds: frozenset[VersionId] = frozenset()
    free_adapters: int = 0
    max_lora_rank: int = 512

    @property
    def requests(self) -> int:
        """Running and waiting."""
        return self.running + self.waiting

    @property
    def kv_usage(self) -> float:
        """The part of its KV cache that is taken."""
        return self.kv_blocks_used / self.kv_blocks if self.kv_blocks else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationProblem:
    """What is to be decided: these requests over these replicas.

    A request that moves costs its new replica `move_s` (dLoRA: 0.05), an adapter that comes `load_s`; KV
    blocks that a replica has no room for are swapped at `swap_blocks_per_s`. ValueError for ids that repeat,
    and for a request in a replica that is not among these.
    """

    replicas: tuple[MigratingReplica, ...]
    requests: tuple[MigratingRequest, ...]
    move_s: float = 0.05
    load_s: float = 0.0
    swap_blocks_per_s: float = 10_000.0

    def __post_init__(self) -> None:
        ids = {one.replica_id for one in self.replicas}
        if len(ids) < len(self.replicas):
            raise ValueError("replicas: an id repeats; expected each once")
        if len({one.request_id for one in self.requests}) < len(self.requests):
            raise ValueError("requests: an id repeats; expected each once")
        for request in self.requests:
            if request.replica_id not in ids:
                raise ValueError(f"{request.request_id}: {request.replica_id} is not among the replicas")

    def may_go(self, request: MigratingRequest, replica: MigratingReplica) -> bool:
        """Whether the request could run there: it does, or its adapter is there, or there is room for it."""
        if request.replica_id == replica.replica_id or request.version_id is None:
            return True
        return request.version_id in replica.holds or (
            replica.free_adapters > 0 and request.rank <= replica.max_lora_rank
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationLimits:
    """When to look, and how much work that may be; the first two are dLoRA's.

    The program stops after `time_limit_s` with what it has found by then (dLoRA: 600 s); for results that do
    not depend on the machine's speed give `node_limit` and no time.
    """

    kv_usage: float = 0.9
    excess_requests: int = 16
    max_pairs: int = 4
    max_requests: int = 256
    time_limit_s: float | None = 0.5
    node_limit: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One request, from where to where."""

    request_id: str
    version_id: VersionId | None
    source: ReplicaId
    target: ReplicaId


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """What is to be moved, and first to be loaded where.

    The longest any replica is busy is `stay_s` if nothing moves, `busy_s` after the moves and by no
    assignment below `bound_s` (0: not known). `program_status` says how the program ended, '' where it was
    not run.
    """

    moves: tuple[Move, ...] = ()
    loads: tuple[tuple[ReplicaId, VersionId], ...] = ()
    stay_s: float = 0.0
    busy_s: float = 0.0
    bound_s: float = 0.0
    method: MigrationMethod = "stay"
    program_status: str = ""


@dataclass(slots=True)
class Assignment:
    """A replica for every request, and how long each replica is then busy: the program's constraints, in one
    place.

    Places are indices into the problem's replicas and requests. `move` keeps everything up to date.
    """

    problem: MigrationProblem
    target: list[int]
    exec_s: list[float] = field(init=False)
    blocks: list[int] = field(init=False)
    per_version: list[dict[VersionId, int]] = field(init=False)
    coming: list[int] = field(init=False)
    """Adapters that each replica has to load."""
    source: list[int] = field(init=False)

    def __post_init__(self) -> None:
        places = {one.replica_id: place for place, one in enumerate(self.problem.replicas)}
        num = len(places)
        self.source = [places[request.replica_id] for request in self.problem.requests]
        self.exec_s, self.blocks, self.coming = [0.0] * num, [0] * num, [0] * num
        self.per_version = [{} for _ in range(num)]
        for index, place in enumerate(self.target):
            self._add(index, place, 1)

    @classmethod
    def stay(cls, problem: MigrationProblem) -> "Assignment":
        """Every request where it is."""
        places = {one.replica_id: place for place, one in enumerate(problem.replicas)}
        return cls(problem, [places[request.replica_id] for request in problem.requests])

    def copy(self) -> "Assignment":
        """Another of the same targets."""
        return Assignment(self.problem, list(self.target))

    def move(self, index: int, place: int) -> None:
        """Send the request to another replica."""
        self._add(index, self.target[index], -1)
        self.target[index] = place
        self._add(index, place, 1)

    def fits(self, index: int, place: int) -> bool:
        """Whether the request may go there as things are now, with its adapter if that is not there."""
        request, replica = self.problem.requests[index], self.problem.replicas[place]
        if not self.problem.may_go(request, replica):
            return False
        version = request.version_id
        is_free = version is None or version in replica.holds or version in self.per_version[place]
        return is_free or self.source[index] == place or self.coming[place] < replica.free_adapters

    def is_valid(self) -> bool:
        """Whether every request is somewhere it may be and no replica gets more adapters than it has room
        for."""
        return all(
            self.problem.may_go(request, self.problem.replicas[place])
            for request, place in zip(self.problem.requests, self.target, strict=True)
        ) and all(
            coming <= max(0, replica.free_adapters)
            for coming, replica in zip(self.coming, self.problem.replicas, strict=True)
        )

    def busy_s(self, place: int) -> float:
        """How long this replica is busy with what it is given."""
        problem = self.problem
        over_blocks = self.blocks[place] - problem.replicas[place].kv_blocks
        swap_s = max(0, over_blocks) / problem.swap_blocks_per_s
        return self.exec_s[place] + swap_s + problem.load_s * self.coming[place]

    def longest_s(self) -> float:
        """How long the busiest is: what is minimised."""
        return max((self.busy_s(place) for place in range(len(self.problem.replicas))), default=0.0)

    def _add(self, index: int, place: int, sign: int) -> None:
        request, replica = self.problem.requests[index], self.problem.replicas[place]
        is_moved = self.source[index] != place
        self.exec_s[place] += sign * (request.expected_s + (self.problem.move_s if is_moved else 0.0))
        self.blocks[place] += sign * request.kv_blocks
        version = request.version_id
        if version is None or version in replica.holds or not is_moved:
            return
        counts = self.per_version[place]
        counts[version] = counts.get(version, 0) + sign
        if counts[version] == 0:
            del counts[version]
        self.coming[place] = len(counts)


def overloaded_pairs(
    replicas: Sequence[MigratingReplica], limits: MigrationLimits
) -> tuple[tuple[ReplicaId, ReplicaId], ...]:
    """The overloaded replicas, worst first, each with the least loaded that is left; at most `max_pairs`.

    By KV cache if any is that full, else by requests; () when nothing is to be done.
    """
    full = [one for one in replicas if one.kv_usage >= limits.kv_usage]
    if full:
        givers = sorted(full, key=lambda one: (-one.kv_usage, -one.requests, one.replica_id))
        takers = [one for one in replicas if one.kv_usage < limits.kv_usage]
        takers.sort(key=lambda one: (one.kv_usage, one.requests, one.replica_id))
    else:
        mean = sum(one.requests for one in replicas) / max(1, len(replicas))
        givers = [one for one in replicas if one.requests >= mean + limits.excess_requests]
        givers.sort(key=lambda one: (-one.requests, one.replica_id))
        takers = [one for one in replicas if one.requests < mean]
        takers.sort(key=lambda one: (one.requests, one.replica_id))
    pairs = zip(givers, takers, strict=False)
    return tuple((giver.replica_id, taker.replica_id) for giver, taker in pairs)[: limits.max_pairs]


def narrowed(
    problem: MigrationProblem, pairs: Sequence[tuple[ReplicaId, ReplicaId]], limits: MigrationLimits
) -> MigrationProblem:
    """The part of a problem that these pairs have: their replicas, and of their requests at most
    `max_requests`, those that wait before those that run and the ones with the fewest tokens first, as they
    are moved for least.

    What the others do to their replicas is taken off the KV cache.
    """
    places = {replica for pair in pairs for replica in pair}
    ours = [one for one in problem.requests if one.replica_id in places]
    ours.sort(key=lambda one: (one.is_running, one.tokens, one.request_id))
    kept, left = ours[: limits.max_requests], ours[limits.max_requests :]
    left_blocks: dict[ReplicaId, int] = {}
    for request in left:
        left_blocks[request.replica_id] = left_blocks.get(request.replica_id, 0) + request.kv_blocks
    replicas = [
        replace(one, kv_blocks=max(0, one.kv_blocks - left_blocks.get(one.replica_id, 0)))
        for one in problem.replicas
        if one.replica_id in places
    ]
    replicas.sort(key=lambda one: one.replica_id)
    kept.sort(key=lambda one: one.request_id)
    return replace(problem, replicas=tuple(replicas), requests=tuple(kept))
