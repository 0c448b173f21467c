"""dLoRA's reactive step, live: between epochs, requests of overloaded replicas move with their adapters.

It decides by `placement.migration.choice` from what replicas report, adds copies to the plan where adapters
have to come first, and has the replica end the streams that are to move, as a drain does at its deadline:
their routers go on elsewhere from the tokens so far, where their routing policy wants. So a move's target is
where room was found, and not an order.
"""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from loraserve.engines.description import ReplicaReport, RequestReport
from placement.cluster.messages import PlanGiven
from placement.migration.choice import migrate
from placement.migration.problem import (
    MigratingReplica,
    MigratingRequest,
    Migration,
    MigrationLimits,
    MigrationProblem,
    overloaded_pairs,
)
from placement.migration.view import Occupation, migrating_replicas, with_copies
from placement.types import ReplicaId, VersionId

if TYPE_CHECKING:
    from loraserve.controller.controller import Controller

logger = logging.getLogger(__name__)

KV_UNITS = 10_000
"""Replicas report the part of their KV cache in use; it is counted in so many parts."""

TOKEN_S = 0.02
"""What a token is taken to take; the same for all, so that it weighs only against what a move costs."""


class Migrator:
    """`look` every period. `num_moved` counts the requests that were ended to go on elsewhere."""

    def __init__(self, controller: "Controller", limits: MigrationLimits | None = None) -> None:
        self.num_moved = 0
        self._controller = controller
        self._limits = limits or MigrationLimits()

    async def look(self) -> int:
        """Move what makes the busiest replica less busy, if one is overloaded; how many requests it was."""
        found = await self._decide()
        if found.loads:
            await self._load(found)
            # What has come and gone while the copies came may need no move, or another.
            found = await self._decide()
        moved = await self._move(found)
        self.num_moved += moved
        return moved

    async def _decide(self) -> Migration:
        controller = self._controller
        await controller.refresh_reports()
        replicas = self._replicas(controller.reports)
        pairs = overloaded_pairs(replicas, self._limits)
        if not pairs:
            return Migration()
        paired = sorted({replica for pair in pairs for replica in pair})
        lists = await asyncio.gather(*(controller.keeper.in_flight(replica) for replica in paired))
        usages = {one.replica_id: one.kv_blocks_used for one in replicas}
        ranks = {version: adapter.rank for version, adapter in controller.state.adapters.items()}
        requests: list[MigratingRequest] = []
        for replica, listed in zip(paired, lists, strict=True):
            requests += _requests(replica, listed, usages[replica], ranks)
        problem = MigrationProblem(replicas=replicas, requests=tuple(requests))
        # The solver has its time; requests and reports go on meanwhile.
        return await asyncio.to_thread(migrate, problem, self._limits)

    def _replicas(self, reports: Mapping[ReplicaId, ReplicaReport]) -> tuple[MigratingReplica, ...]:
        state = self._controller.state
        occupations = {
            replica: Occupation(
                running=report.running,
                waiting=report.waiting,
                kv_usage=report.kv_cache_usage,
                kv_blocks=KV_UNITS,
            )
            for replica, report in reports.items()
        }
        found = migrating_replicas(
            state.replicas.values(), self._controller.table, state.adapters.values(), occupations
        )
        if state.book.frozen is None:
            return found
        # Copies would not come: what is moved goes where they are.
        return tuple(replace(one, free_adapters=0) for one in found)

    async def _load(self, found: Migration) -> None:
        """Bring the copies that the moves need, as far as they come within a period."""
        controller, state = self._controller, self._controller.state
        plan = with_copies(state.plan, found.loads, state.snapshot())
        logger.info("%d copies are added to the plan for requests that are to move", len(found.loads))
        controller.dispatch(PlanGiven(plan, frozen=False, is_reactive=True))
        try:
            await controller.wait_until(
                lambda: all(replica in state.holders(version) for replica, version in found.loads),
                controller.config.placement.migration_period_s,
            )
        except TimeoutError:
            logger.info("not all of them came in time")

    async def _move(self, found: Migration) -> int:
        holders = self._controller.state.holders
        by_source: dict[ReplicaId, list[str]] = {}
        for move in found.moves:
            if move.version_id is None or move.target in holders(move.version_id):
                request_id = move.request_id.removeprefix(f"{move.source}/")
                by_source.setdefault(move.source, []).append(request_id)
        moved = 0
        for replica, request_ids in sorted(by_source.items()):
            moved += await self._controller.keeper.move(replica, tuple(request_ids))
        if moved:
            text = "%d requests move: the busiest replica is busy for %.1f s instead of %.1f s (%s)"
            logger.info(text, moved, found.busy_s, found.stay_s, found.method)
        return moved


def _requests(
    replica: ReplicaId, listed: tuple[RequestReport, ...], kv_units: int, ranks: Mapping[VersionId, int]
) -> list[MigratingRequest]:
    """A replica's requests that may move; the memory in use is parted among all by their tokens."""
    tokens = sum(one.prompt_tokens + one.drawn_tokens for one in listed)
    return [
        MigratingRequest(
            # Of two replicas both may have one of this id, when a client has tried again.
            request_id=f"{replica}/{one.request_id}",
            version_id=one.version_id,
            replica_id=replica,
            kv_blocks=round(kv_units * (one.prompt_tokens + one.drawn_tokens) / max(1, tokens)),
            expected_s=one.remaining_tokens * TOKEN_S,
            tokens=one.drawn_tokens,
            rank=0 if one.version_id is None else ranks.get(one.version_id, 0),
            is_running=one.drawn_tokens > 0,
        )
        for one in listed
        if one.may_move
    ]
