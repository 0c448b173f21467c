"""The routing that goes with a placement policy."""

import pytest

from loraserve.config import parse_config
from placement.policies import POLICIES
from placement.routing.chooser import ROUTING_POLICIES
from placement.routing.pairing import AUTO, routing_for


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_placement_policy_has_a_routing_policy_that_there_is(policy: str) -> None:
    assert routing_for(policy) in ROUTING_POLICIES
    assert routing_for(policy, "round-robin") == "round-robin"


def test_what_authors_meant_for_each_other_go_together() -> None:
    assert routing_for("least-loaded") == "least-outstanding"
    assert routing_for("loraserve") == "weighted-share"
    assert routing_for("optimal") == routing_for("optimal-from-scratch") == "marginal-cost"
    for name in ("dlora", "toppings", "rank-backlog"):
        assert routing_for(name) == name


def test_the_configuration_s_routing_follows_its_placement_policy_unless_it_names_one() -> None:
    assert parse_config({}).router.routing == "least-outstanding"
    placement = {"policy": "loraserve"}
    assert parse_config({"placement": placement}).router.routing == "weighted-share"
    assert (
        parse_config({"placement": placement, "router": {"routing": AUTO}}).router.routing == "weighted-share"
    )
    named = {"placement": placement, "router": {"routing": "round-robin", "routers": 2}}
    assert parse_config(named).router.routing == "round-robin"
