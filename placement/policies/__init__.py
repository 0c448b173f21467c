"""Placement policies by name. A policy is one file and one line here."""

from collections.abc import Mapping
from types import MappingProxyType

from placement.policies.base import PlacementPolicy
from placement.policies.dlora import DLora
from placement.policies.least_loaded import LeastLoaded
from placement.policies.loraserve import LoraServe
from placement.policies.optimal import Optimal
from placement.policies.rendezvous import Rendezvous
from placement.policies.slora_contiguous import SloraContiguous
from placement.policies.slora_random import SloraRandom

POLICIES: Mapping[str, PlacementPolicy] = MappingProxyType(
    {
        policy.name: policy
        for policy in (
            LeastLoaded(),
            Optimal(),
            Optimal(name="optimal-from-scratch", keeps=False),
            SloraRandom(),
            SloraContiguous(),
            LoraServe(),
            Rendezvous(),
            DLora(),
            LeastLoaded(name="toppings"),
            LeastLoaded(name="rank-backlog"),
        )
    }
)
"""`toppings` and `rank-backlog` have every adapter everywhere; they are told apart by how they route.
`optimal-from-scratch` is there to be compared with."""


def policy(name: str) -> PlacementPolicy:
    """The policy of this name; KeyError lists the known ones."""
    try:
        return POLICIES[name]
    except KeyError:
        raise KeyError(f"unknown placement policy {name!r}; known: {', '.join(sorted(POLICIES))}") from None


__all__ = ["POLICIES", "PlacementPolicy", "policy"]
