"""How far replicas are from each other: the graph of links between them, and what a transfer takes over it.

A tree: replica, process, host, rack, and what joins the racks. Each link has two directions, which do not
share their speed. Transfers over one link in one direction share it evenly.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType

import networkx as nx

from placement.types import NodeId, ReplicaId

_Node = tuple[str, str]
Link = tuple[_Node, _Node]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a replica runs; those with the same `process` share memory. One rack unless named."""

    process: str
    host: NodeId
    rack: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpeeds:
    """Bytes per second of each kind of hop: a copy inside a process, between processes of a host, between
    a host and its rack, between a rack and the others. ValueError for one that is not above 0."""

    same_process_bytes_per_s: float = 8e9
    same_host_bytes_per_s: float = 4e9
    rack_bytes_per_s: float = 1.25e9
    beyond_bytes_per_s: float = 6.25e8

    def __post_init__(self) -> None:
        for name in self.__slots__:
            speed = getattr(self, name)
            if not 0 < speed < float("inf"):
                raise ValueError(f"{name}: {speed:g}; expected a number above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """One transfer that is running: from which replica to which."""

    source: ReplicaId
    destination: ReplicaId


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """The links from a source to a destination, with the speed of each as it was laid down, and the speed
    that this very pair was measured at, None if it never was."""

    links: tuple[Link, ...]
    speeds_bytes_per_s: tuple[float, ...]
    measured_bytes_per_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Topology:
    """Where replicas are and how fast the links between them are; `make_topology` builds it.

    `measured` lies over the defaults: the speed in bytes per second that a pair (source, destination) was
    seen at while it was alone.
    """

    places: Mapping[ReplicaId, Place]
    speeds: LinkSpeeds
    measured: Mapping[tuple[ReplicaId, ReplicaId], float]
    graph: "nx.DiGraph[_Node]" = field(repr=False)

    def path(self, source: ReplicaId, destination: ReplicaId) -> Path:
        """The way from one replica to another. A replica without a place is beyond all others."""
        measured = self.measured.get((source, destination))
        if source not in self.places or destination not in self.places:
            ends = (("replica", source), ("replica", destination))
            return Path(
                links=(ends,),
                speeds_bytes_per_s=(self.speeds.beyond_bytes_per_s,),
                measured_bytes_per_s=measured,
            )
        nodes = nx.shortest_path(self.graph, ("replica", source), ("replica", destination))
        links = tuple(pairwise(nodes))
        speeds = tuple(float(self.graph.edges[link]["bytes_per_s"]) for link in links)
        return Path(links=links, speeds_bytes_per_s=speeds, measured_bytes_per_s=measured)

    def transfer_s(self, size_bytes: int, path: Path, busy: Iterable[Transfer] = ()) -> float:
        """How long so many bytes take over the path beside the transfers that are on its links now."""
        return _transfer_s(size_bytes, path, self._load(busy))

    def order(
        self,
        destination: ReplicaId,
        holders: Iterable[ReplicaId],
        *,
        busy: Iterable[Transfer] = (),
        size_bytes: int = 1,
    ) -> tuple[ReplicaId, ...]:
        """The holders, nearest first: by the time that so many bytes from them would take now; the one that
        takes part in the fewest transfers of equals; then by id. Never the destination itself."""
        running = tuple(busy)
        load = self._load(running)
        involved = Counter(one for each in running for one in (each.source, each.destination))

        def rank(holder: ReplicaId) -> tuple[float, int, str]:
            return _transfer_s(size_bytes, self.path(holder, destination), load), involved[holder], holder

        return tuple(sorted(set(holders) - {destination}, key=rank))

    def _load(self, busy: Iterable[Transfer]) -> Mapping[Link, int]:
        """How many transfers are on each link."""
        return Counter(link for one in busy for link in self.path(one.source, one.destination).links)


def make_topology(
    places: Mapping[ReplicaId, Place],
    *,
    speeds: LinkSpeeds | None = None,
    measured: Mapping[tuple[ReplicaId, ReplicaId], float] | None = None,
) -> Topology:
    """The graph of these replicas. Values that are not above 0 among `measured` are left out: a link that
    moved nothing says nothing about its speed."""
    speeds = speeds or LinkSpeeds()
    graph: nx.DiGraph[_Node] = nx.DiGraph()
    for replica, place in sorted(places.items()):
        chain = (
            (("replica", replica), speeds.same_process_bytes_per_s),
            # The same name may be in use on several hosts, as a pid is.
            (("process", f"{place.rack}/{place.host}/{place.process}"), speeds.same_host_bytes_per_s),
            (("host", f"{place.rack}/{place.host}"), speeds.rack_bytes_per_s),
            (("rack", place.rack), speeds.beyond_bytes_per_s),
            (("core", ""), 0.0),
        )
        for (below, speed), (above, _) in pairwise(chain):
            graph.add_edge(below, above, bytes_per_s=speed)
            graph.add_edge(above, below, bytes_per_s=speed)
    known = {pair: speed for pair, speed in (measured or {}).items() if 0 < speed < float("inf")}
    return Topology(
        places=MappingProxyType(dict(places)), speeds=speeds, measured=MappingProxyType(known), graph=graph
    )


def _transfer_s(size_bytes: int, path: Path, load: Mapping[Link, int]) -> float:
    if not path.links:
        return 0.0
    measured = path.measured_bytes_per_s
    # What a pair was measured at, its links can carry, whatever they were laid down with.
    floor = measured or 0.0
    shared = (
        max(speed, floor) / (1 + load.get(link, 0))
        for link, speed in zip(path.links, path.speeds_bytes_per_s, strict=True)
    )
    alone = measured if measured is not None else min(path.speeds_bytes_per_s)
    return size_bytes / min(alone, *shared)
