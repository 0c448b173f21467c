"""Peers in the order in which they are near, whatever the order in which they are named."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.fabric.topology import LinkSpeeds, Place, Topology, Transfer, make_topology
from placement.types import NodeId, ReplicaId

SPEEDS = LinkSpeeds(
    same_process_bytes_per_s=8000,
    same_host_bytes_per_s=4000,
    rack_bytes_per_s=1000,
    beyond_bytes_per_s=500,
)
ME, TWIN, MATE, OTHER, NEAR, FAR, NOWHERE = (
    ReplicaId(name) for name in ("me", "twin", "mate", "other", "near", "far", "nowhere")
)


def at(process: str, host: str, rack: str) -> Place:
    return Place(process=process, host=NodeId(host), rack=rack)


PLACES = {
    ME: at("1", "h1", "r1"),
    TWIN: at("1", "h1", "r1"),
    MATE: at("2", "h1", "r1"),
    OTHER: at("3", "h1", "r1"),
    NEAR: at("1", "h2", "r1"),
    FAR: at("1", "h3", "r2"),
}
TOPOLOGY = make_topology(PLACES, speeds=SPEEDS)


def moved(*pairs: tuple[ReplicaId, ReplicaId]) -> list[Transfer]:
    return [Transfer(source=source, destination=destination) for source, destination in pairs]


@pytest.mark.parametrize(
    ("source", "expected_s"), [(ME, 0), (TWIN, 1), (MATE, 2), (NEAR, 8), (FAR, 16), (NOWHERE, 16)]
)
def test_a_transfer_runs_at_the_slowest_hop(source: ReplicaId, expected_s: float) -> None:
    assert TOPOLOGY.transfer_s(8000, TOPOLOGY.path(source, ME)) == expected_s


def test_the_nearest_come_first_and_the_destination_is_no_peer_of_itself() -> None:
    holders = [FAR, ME, NOWHERE, MATE, NEAR, TWIN, OTHER]
    assert TOPOLOGY.order(ME, holders) == (TWIN, MATE, OTHER, NEAR, FAR, NOWHERE)


def test_of_equals_the_least_busy_comes_first() -> None:
    assert TOPOLOGY.order(ME, [MATE, OTHER], busy=moved((MATE, FAR))) == (OTHER, MATE)


def test_a_transfer_counts_for_the_holder_in_either_direction() -> None:
    assert TOPOLOGY.order(ME, [MATE, OTHER], busy=moved((FAR, MATE))) == (OTHER, MATE)


def test_a_shared_link_is_shared_in_one_direction_only() -> None:
    path = TOPOLOGY.path(NEAR, ME)
    assert TOPOLOGY.transfer_s(1000, path, moved((NEAR, MATE))) == 2
    assert TOPOLOGY.transfer_s(1000, path, moved((ME, NEAR), (MATE, FAR))) == 1


def test_a_busy_near_peer_falls_behind_a_free_one_that_is_farther() -> None:
    busy = moved(*[(TWIN, OTHER)] * 20)
    assert TOPOLOGY.order(ME, [TWIN, NEAR], busy=busy) == (NEAR, TWIN)


def test_what_was_measured_lies_over_what_was_laid_down() -> None:
    topology = make_topology(
        PLACES, speeds=SPEEDS, measured={(FAR, ME): 6000, (MATE, ME): 100, (NEAR, ME): 0}
    )
    assert topology.order(ME, [MATE, NEAR, FAR]) == (FAR, NEAR, MATE)
    path = topology.path(FAR, ME)
    assert topology.transfer_s(6000, path) == 1
    assert topology.transfer_s(6000, path, moved((FAR, MATE))) == 2


def test_pids_of_two_hosts_are_two_processes() -> None:
    assert TOPOLOGY.transfer_s(8000, TOPOLOGY.path(TWIN, NEAR)) == 8


def test_a_speed_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="rack_bytes_per_s: 0"):
        LinkSpeeds(rack_bytes_per_s=0)


REPLICAS = [ReplicaId(f"r{number}") for number in range(6)]


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    few = st.sampled_from(["0", "1"])
    places = {one: at(draw(few), draw(few), draw(few)) for one in REPLICAS if draw(st.booleans())}
    pairs = st.tuples(st.sampled_from(REPLICAS), st.sampled_from(REPLICAS))
    measured = draw(st.dictionaries(pairs, st.floats(1, 1e6), max_size=4))
    return make_topology(places, speeds=SPEEDS, measured=measured)


transfers = st.lists(
    st.builds(Transfer, source=st.sampled_from(REPLICAS), destination=st.sampled_from(REPLICAS)), max_size=6
)


@given(topologies(), st.permutations(REPLICAS), transfers, st.randoms())
def test_the_order_is_complete_and_depends_on_no_order(
    topology: Topology, holders: list[ReplicaId], busy: list[Transfer], random: Random
) -> None:
    order = topology.order(REPLICAS[0], holders, busy=busy)
    assert sorted(order) == REPLICAS[1:]
    random.shuffle(busy)
    assert topology.order(REPLICAS[0], sorted(holders), busy=busy) == order


@given(
    topologies(),
    transfers,
    st.builds(Transfer, source=st.sampled_from(REPLICAS), destination=st.just(REPLICAS[0])),
)
def test_more_transfers_never_make_one_faster(
    topology: Topology, busy: list[Transfer], one_more: Transfer
) -> None:
    path = topology.path(REPLICAS[1], REPLICAS[0])
    assert topology.transfer_s(1000, path, [*busy, one_more]) >= topology.transfer_s(1000, path, busy) > 0
