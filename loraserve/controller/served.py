"""How adapters are served, as the controller sees it: what replicas have counted, added up.

Replicas count and never reset; the differences between two reports of one life of a replica are what came
in between. So a report that is lost loses nothing but time.
"""

from collections import deque
from collections.abc import Collection, Mapping

from loraserve.clock import Clock
from loraserve.engines.description import ReplicaReport, ServiceTotals
from placement.types import ReplicaId, VersionId

WINDOW_S = 300.0
BUCKET_S = 10.0

NOTHING = ServiceTotals()

_Counts = list[int]
"""Requests, those inside their targets, cold misses."""


class ServiceBook:
    """`heard` with every report. A version's figures: `total` since its replicas began, as far as this
    controller has heard of them, and `recent`, of about the last `WINDOW_S`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._seen: dict[ReplicaId, ReplicaReport] = {}
        self._totals: dict[VersionId, _Counts] = {}
        self._buckets: deque[tuple[float, dict[VersionId, _Counts]]] = deque()

    def heard(self, replica: ReplicaId, report: ReplicaReport) -> None:
        """Count what has come since the replica's last report; one that is not newer says nothing.

        What a life that an earlier controller has watched did before counts in all, and not as recent.
        """
        last = self._seen.get(replica)
        is_known = last is not None and last.incarnation == report.incarnation
        before: Mapping[VersionId, ServiceTotals] = {}
        if last is not None and is_known:
            if report.sequence <= last.sequence:
                return
            before = last.service
        self._seen[replica] = report
        recent = self._bucket() if is_known or report.sequence == 1 else {}
        for version, total in report.service.items():
            then = before.get(version, NOTHING)
            if total != then:
                for counts in (self._totals, recent):
                    _add(counts.setdefault(version, [0, 0, 0]), total, then)

    def total(self, version: VersionId) -> ServiceTotals:
        """All that is known of."""
        return _totals(self._totals.get(version, [0, 0, 0]))

    def recent(self, version: VersionId) -> ServiceTotals:
        """What came of late."""
        self._forget_buckets()
        found = [bucket[version] for _, bucket in self._buckets if version in bucket]
        return _totals([sum(column) for column in zip(*found, strict=True)] if found else [0, 0, 0])

    def keep_only(self, registered: Collection[VersionId]) -> None:
        """Forget the versions that are not registered any more."""
        for version in self._totals.keys() - set(registered):
            del self._totals[version]

    def _bucket(self) -> dict[VersionId, _Counts]:
        self._forget_buckets()
        now_s = self._clock.now_s()
        if not self._buckets or now_s - self._buckets[-1][0] >= BUCKET_S:
            self._buckets.append((now_s, {}))
        return self._buckets[-1][1]

    def _forget_buckets(self) -> None:
        first_s = self._clock.now_s() - WINDOW_S
        while self._buckets and self._buckets[0][0] < first_s:
            self._buckets.popleft()


def _row(totals: ServiceTotals) -> tuple[int, int, int]:
    return totals.requests, totals.in_slo, totals.cold_misses


def _add(counts: _Counts, total: ServiceTotals, before: ServiceTotals) -> None:
    now, then = _row(total), _row(before)
    if any(one < other for one, other in zip(now, then, strict=True)):
        # The replica had forgotten the version, and began anew.
        then = (0, 0, 0)
    for place, (one, other) in enumerate(zip(now, then, strict=True)):
        counts[place] += one - other


def _totals(counts: _Counts) -> ServiceTotals:
    requests, in_slo, cold_misses = counts
    return ServiceTotals(requests=requests, in_slo=in_slo, cold_misses=cold_misses)
