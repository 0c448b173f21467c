"""Adapters on their way to replicas, over the origin's link or that of a replica that holds them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from loraserve.simulator.agenda import Agenda
from loraserve.simulator.links import LinkSpeed, SharedLink
from loraserve.simulator.site import Site
from placement.latency import PS_PER_S
from placement.types import AdapterVersion

ORIGIN = -1
"""The place of the link that no replica owns."""

Arrived = Callable[[Site, AdapterVersion, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Transfer:
    site: Site
    adapter: AdapterVersion
    link: int


class Transfers:
    """Each replica sends over one link of its own, the origin over one; who receives has no limit.

    `arrived` is called when the last byte is there. What a lost replica was to receive is cancelled; what
    it sent begins anew from elsewhere.
    """

    def __init__(
        self, *, origin: LinkSpeed, peer: LinkSpeed | None, agenda: Agenda, arrived: Arrived
    ) -> None:
        self.num_begun = 0
        self._origin, self._peer = origin, peer
        self._agenda = agenda
        self._arrived = arrived
        self._links: dict[int, SharedLink] = {}
        self._armed_ps: dict[int, int] = {}
        self._under_way: dict[int, _Transfer] = {}
        self._landing: dict[int, _Transfer] = {}

    @property
    def bytes_moved(self) -> int:
        """The bytes of the transfers that have crossed a link."""
        return sum(link.bytes_done for link in self._links.values())

    def begin(self, site: Site, adapter: AdapterVersion, holders: list[Site], now_ps: int) -> None:
        """Fetch the adapter for this site: from the holder that sends least, else from the origin."""
        link = ORIGIN
        if self._peer is not None and holders:
            link = min(holders, key=lambda holder: (self._load(holder.index), holder.index)).index
        if link not in self._links:
            speed = self._speed(link)
            self._links[link] = SharedLink(speed.bytes_per_s)
        self.num_begun += 1
        self._under_way[self.num_begun] = _Transfer(site=site, adapter=adapter, link=link)
        self._links[link].begin(self.num_begun, adapter.size_bytes, now_ps)
        self._arm(link)

    def lose(self, site: Site, now_ps: int) -> list[tuple[Site, AdapterVersion]]:
        """A replica is gone: cancel what it receives and sends; returns what others were to get from it."""
        orphans = []
        for number, transfer in list(self._under_way.items()):
            if transfer.site is site or transfer.link == site.index:
                del self._under_way[number]
                self._links[transfer.link].cancel(number, now_ps)
                self._arm(transfer.link)
                if transfer.site is not site:
                    orphans.append((transfer.site, transfer.adapter))
        self._landing = {key: one for key, one in self._landing.items() if one.site is not site}
        return orphans

    def check_invariants(self, *, idle: bool = False) -> None:
        """AssertionError unless every byte is accounted for; with `idle`, unless nothing is on its way."""
        for link in self._links.values():
            link.check_invariants()
            assert not idle or len(link) == 0, "idle with a transfer on a link"
        assert sum(map(len, self._links.values())) == len(self._under_way), "a transfer is on no link"
        assert not idle or not self._landing, "idle with a transfer landing"

    def _speed(self, link: int) -> LinkSpeed:
        return self._origin if link == ORIGIN or self._peer is None else self._peer

    def _load(self, link: int) -> int:
        return len(self._links[link]) if link in self._links else 0

    def _arm(self, link: int) -> None:
        """Look at the link again when its next transfer ends, as far as is known now."""
        at_ps = self._links[link].next_ps()
        if at_ps is not None and self._armed_ps.get(link) != at_ps:
            self._armed_ps[link] = at_ps
            self._agenda.put(at_ps, partial(self._look, link))

    def _look(self, link: int, now_ps: int) -> None:
        if self._armed_ps.get(link) != now_ps:
            return
        del self._armed_ps[link]
        latency_ps = round(self._speed(link).latency_s * PS_PER_S)
        for number in self._links[link].take_ended(now_ps):
            self._landing[number] = self._under_way.pop(number)
            self._agenda.put(now_ps + latency_ps, partial(self._land, number))
        self._arm(link)

    def _land(self, number: int, now_ps: int) -> None:
        transfer = self._landing.pop(number, None)
        if transfer is not None:
            self._arrived(transfer.site, transfer.adapter, now_ps)
