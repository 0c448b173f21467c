"""How a replica serves each adapter: its requests, those inside their targets, those that met no active copy.

The same for requests that come through a router and for those that clients bring themselves. Counts only
grow, for the controller to compare, as in `loraserve.replica.tokens`. Knows no task and no report's way.
"""

from collections.abc import Collection

from loraserve.clock import Clock
from loraserve.engines.description import ServiceTotals
from loraserve.request import GenerationRequest, GenerationStep
from placement.profile import Slo
from placement.types import VersionId

FORGET_S = 600.0
"""Far longer than a replica may be silent towards the controller before it is taken for lost."""

LATE_GAPS = 20
"""One in so many gaps between two messages of a request may be above the target, as of a 95th percentile."""


class _Version:
    """One version's counts, its own targets if it has any, and when they last changed."""

    __slots__ = ("changed_s", "cold_misses", "in_slo", "requests", "slo")

    def __init__(self) -> None:
        self.requests = self.in_slo = self.cold_misses = 0
        self.slo: Slo | None = None
        self.changed_s = 0.0


class ServiceCounts:
    """Counts by version since the replica began; the base model's requests are not counted.

    `slo` are the targets of versions without their own. A version that the replica has not held for long is
    left out, and begins at 0 if it comes back.
    """

    def __init__(self, clock: Clock, slo: Slo) -> None:
        self._clock = clock
        self._slo = slo
        self._versions: dict[VersionId, _Version] = {}

    def set_slo(self, version: VersionId, slo: Slo | None) -> None:
        """The version's own targets from now on, None for the usual ones."""
        if slo is not None or version in self._versions:
            self._version(version).slo = slo

    def slo(self, version: VersionId) -> Slo:
        """The targets that the version's requests are held to now."""
        counts = self._versions.get(version)
        return (None if counts is None else counts.slo) or self._slo

    def begin(
        self, request: GenerationRequest, *, waited_s: float = 0.0, is_cold: bool = False
    ) -> "RequestService":
        """A request has come, `waited_s` after its router knew of it; `is_cold` if it met no active copy.
        Tell the answer of its steps, and leave it when the request has gone."""
        return RequestService(self, request, self._clock.now_s() - waited_s, is_cold=is_cold)

    def refused(self, version: VersionId) -> None:
        """A router had to turn away a request of the version, for nobody had room for it."""
        self._version(version).requests += 1

    def totals(self, held: Collection[VersionId]) -> dict[VersionId, ServiceTotals]:
        """The counts so far; `held` are the versions that the replica holds in whatever way."""
        last_s = self._clock.now_s() - FORGET_S
        silent = {version for version, counts in self._versions.items() if counts.changed_s < last_s}
        for version in silent.difference(held):
            del self._versions[version]
        return {
            version: ServiceTotals(
                requests=counts.requests, in_slo=counts.in_slo, cold_misses=counts.cold_misses
            )
            for version, counts in self._versions.items()
            if counts.requests or counts.cold_misses
        }

    def _version(self, version: VersionId) -> _Version:
        if (counts := self._versions.get(version)) is None:
            counts = self._versions[version] = _Version()
        counts.changed_s = self._clock.now_s()
        return counts


class RequestService:
    """One request's part in the counts, taken when it ends.

    It is inside its targets if its first token came in time, counted from when its router knew of it, and
    no more than one in `LATE_GAPS` of the gaps after that was too long. One that goes on here and began
    elsewhere was counted there; one that is ended before its first token, to go on elsewhere, will be. A
    client that gives up before its first token counts if that is late already.
    """

    __slots__ = (
        "_begun_s",
        "_counts",
        "_is_first",
        "_last_s",
        "_num_gaps",
        "_num_late",
        "_ttft_s",
        "_version",
    )

    def __init__(
        self, counts: ServiceCounts, request: GenerationRequest, begun_s: float, *, is_cold: bool
    ) -> None:
        self._counts = counts
        self._version = request.version_id
        self._is_first = not request.resumed_token_ids
        self._begun_s = self._last_s = begun_s
        self._ttft_s: float | None = None
        self._num_gaps = self._num_late = 0
        if self._version is not None and is_cold:
            counts._version(self._version).cold_misses += 1

    def __enter__(self) -> "RequestService":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        version = self._version
        if version is None or not self._is_first:
            return
        slo = self._counts.slo(version)
        counts = self._counts._version(version)
        if self._ttft_s is None:
            was_given_up = kind is not None and not issubclass(kind, Exception)
            waited_s = self._counts._clock.now_s() - self._begun_s
            counts.requests += was_given_up and waited_s * 1e3 > slo.ttft_ms
            return
        counts.requests += 1
        is_steady = self._num_late * LATE_GAPS <= self._num_gaps
        counts.in_slo += is_steady and self._ttft_s * 1e3 <= slo.ttft_ms

    def step(self, step: GenerationStep) -> None:
        """The engine gave the request something."""
        version = self._version
        if version is None or not self._is_first or not (step.token_ids or step.finish_reason):
            return
        counts = self._counts
        now_s = counts._clock.now_s()
        if self._ttft_s is None:
            self._ttft_s = now_s - self._begun_s
        elif step.token_ids:
            self._num_gaps += 1
            self._num_late += (now_s - self._last_s) * 1e3 > counts.slo(version).tbt_ms
        self._last_s = now_s
