"""What replicas are told, once an epoch, of the adapters that they cache and of those that they will want."""

import logging
from typing import TYPE_CHECKING

from loraserve.errors import LoraServeError
from loraserve.fabric.advice import CacheAdvice
from loraserve.fabric.wanted import Wanted
from placement.cluster.records import ReplicaPhase
from placement.types import ReplicaId

if TYPE_CHECKING:
    from loraserve.controller.controller import Controller

logger = logging.getLogger(__name__)

MAX_SOON = 32
"""More are not fetched ahead within an epoch: what a plan wants at once is loaded, not fetched ahead."""


def advise_replicas(controller: "Controller") -> None:
    """Tell every replica that has a fabric."""
    for replica, record in controller.state.replicas.items():
        if record.phase is ReplicaPhase.READY and replica in controller.reports:
            controller.keeper.advise(replica, advice_for(controller, replica))


def advice_for(controller: "Controller", replica: ReplicaId) -> CacheAdvice:
    """What is known here of the replica's cache, by its last report."""
    state, sources = controller.state, controller.keeper.sources
    cached = controller.reports[replica].fabric.cached
    known = [version for version in cached if version in state.adapters]
    return CacheAdvice(
        demand_tokens_per_s={version: controller.demand.forecast.get(version, 0.0) for version in known},
        last=frozenset(version for version in known if sources.keeps_last(replica, version)),
        gone=tuple(version for version in cached if version not in state.adapters),
        soon=_soon(controller, replica),
    )


def _soon(controller: "Controller", replica: ReplicaId) -> tuple[Wanted, ...]:
    """What the plan has there and nobody has been asked to load yet, from those that have it: the origin is
    left to the first load."""
    state, keeper = controller.state, controller.keeper
    copies = state.replicas[replica].copies
    soon: list[Wanted] = []
    for version in state.plan.holders:
        adapter = state.adapters.get(version)
        if adapter is None or version in copies or replica not in state.plan.replicas_of(version):
            continue
        if peers := keeper.sources.peers(replica, version, adapter.size_bytes):
            try:
                files = keeper.files_of(adapter)
            except LoraServeError as error:
                # Its load says so too; the others' advice is not to wait for it.
                logger.info("%s is not fetched ahead: %s", version, error)
                continue
            soon.append(
                Wanted(
                    version_id=version,
                    digest=files.digest,
                    rank=files.rank,
                    size_bytes=files.size_bytes,
                    head_sha256=files.head_sha256,
                    peers=peers,
                )
            )
        if len(soon) >= MAX_SOON:
            break
    return tuple(soon)
