"""Which node a replica goes to, when there is too little room, and where replicas may listen."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.cluster.nodes import (
    Node,
    check_listening,
    choose_node,
    is_loopback,
    listen_host,
    replica_need,
    shortage,
    usable,
)
from loraserve.errors import BadInputError
from placement.types import NodeId

HOME = "10.0.0.1"


def node(number: int, free: dict[str, float], total: dict[str, float] | None = None) -> Node:
    return Node(
        node_id=NodeId(f"n{number}"),
        host=f"10.0.0.{number}",
        port=1,
        total=total or free,
        free=free,
    )


nodes = st.lists(
    st.builds(
        lambda cpus, gpus: {"CPU": cpus / 2, "GPU": float(gpus)}, st.integers(0, 12), st.integers(0, 4)
    ),
    max_size=6,
).map(lambda frees: [node(number, free) for number, free in enumerate(frees)])
needs = st.builds(replica_need, st.sampled_from([0.0, 0.5, 1.0, 1.5, 4.0]), st.integers(0, 2))


def fill(cluster: list[Node], need: dict[str, float]) -> Counter[NodeId]:
    """Place replicas until no node takes one more."""
    ours: Counter[NodeId] = Counter()
    while True:
        left = [
            node(
                int(one.node_id[1:]),
                {name: one.free[name] - ours[one.node_id] * need.get(name, 0.0) for name in one.free},
            )
            for one in cluster
        ]
        chosen = choose_node(left, need, ours)
        if chosen is None or ours.total() > 200:
            return ours
        ours[chosen.node_id] += 1


@given(nodes, needs)
def test_room_is_used_up_and_never_exceeded(cluster: list[Node], need: dict[str, float]) -> None:
    rooms = {one.node_id: one.rooms(need) for one in cluster}
    ours = fill(cluster, need)
    if ours.total() <= 200:
        assert {key: ours[key] for key in rooms} == rooms


@given(nodes, needs, st.integers(1, 20))
def test_a_shortage_is_said_exactly_when_there_is_one(
    cluster: list[Node], need: dict[str, float], count: int
) -> None:
    text = shortage(cluster, need, count)
    assert (text is None) == (sum(one.rooms(need) for one in cluster) >= count)
    assert text is None or "\n" not in text


def test_replicas_are_spread_before_a_node_gets_a_second_one() -> None:
    cluster = [node(number, {"CPU": cpus}) for number, cpus in enumerate([2.0, 8.0, 2.0])]
    need = replica_need(1.0, 0)
    ours: Counter[NodeId] = Counter()
    for _ in cluster:
        chosen = choose_node(cluster, need, ours)
        assert chosen is not None
        ours[chosen.node_id] += 1
    assert set(ours.values()) == {1}
    first = choose_node(cluster, need, {})
    assert first is not None
    assert first.node_id == "n1", "the one with the most room"


def test_a_shortage_names_what_is_needed_and_what_is_free() -> None:
    cluster = [node(number, {"CPU": 0.5}, {"CPU": 4.0, "GPU": 1.0}) for number in range(1, 7)]
    assert shortage(cluster, replica_need(1.0, 1), 2) == (
        "room for 0 of 2 replicas at 1 CPU and 1 GPU each; the Ray cluster has free:"
        " 10.0.0.1: 0.5 of 4 CPU, 0 of 1 GPU; 10.0.0.2: 0.5 of 4 CPU, 0 of 1 GPU;"
        " 10.0.0.3: 0.5 of 4 CPU, 0 of 1 GPU; 10.0.0.4: 0.5 of 4 CPU, 0 of 1 GPU; 2 more nodes"
    )
    assert "no node that can be used" in (shortage([], replica_need(1.0, 0), 1) or "")


def test_a_replica_always_reserves_something() -> None:
    assert all(amount > 0 for amount in replica_need(0.0, 0).values())
    assert replica_need(0.0, 0)
    assert replica_need(0.0, 2) == {"GPU": 2.0}


@pytest.mark.parametrize(
    ("host", "insecure", "expected"),
    [
        ("127.0.0.1", False, "127.0.0.1"),
        ("127.0.0.3", False, "127.0.0.3"),
        (HOME, False, "127.0.0.1"),
        (HOME, True, HOME),
        ("10.0.0.2", False, None),
        ("10.0.0.2", True, "10.0.0.2"),
    ],
)
def test_replicas_listen_beyond_their_machine_only_if_told_so(
    host: str, insecure: bool, expected: str | None
) -> None:
    assert listen_host(host, HOME, insecure_listen=insecure) == expected
    assert insecure or expected is None or is_loopback(expected)


def test_nodes_on_other_machines_are_refused_by_address_or_left_out() -> None:
    cluster = [node(number, {"CPU": 1.0}) for number in (1, 2, 3)]
    with pytest.raises(BadInputError, match=r"10\.0\.0\.2, 10\.0\.0\.3.*--insecure-listen"):
        check_listening(cluster, HOME, insecure_listen=False)
    check_listening(cluster, HOME, insecure_listen=True)
    check_listening(cluster[:1], HOME, insecure_listen=False)
    assert [one.host for one in usable(cluster, HOME, insecure_listen=False)] == [HOME]
