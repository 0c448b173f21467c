"""What the controller knows and a replica's cache does not."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from loraserve.fabric.wanted import Wanted
from placement.types import VersionId


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheAdvice:
    """For the segments that a replica keeps and no copy of it needs: what the forecast says of them, those
    that are kept nowhere else, those that are registered no more; and what the plan wants there soon."""

    demand_tokens_per_s: Mapping[VersionId, float] = field(default_factory=dict)
    last: frozenset[VersionId] = frozenset()
    gone: tuple[VersionId, ...] = ()
    soon: tuple[Wanted, ...] = ()
