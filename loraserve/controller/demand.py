"""Demand as the controller sees it: from what replicas have counted to a forecast of the next epoch.

Replicas count the tokens they are asked for and never reset; the differences between two reports of one life
of a replica are what came in between, and what the first is compared to is told when the life is met. So a
report that is lost loses nothing but time.
"""

import logging
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from loraserve.clock import Clock
from loraserve.config import PlacementSection
from loraserve.controller.demand_memory import DemandMemory, Life, Part, Rates, Remembered
from loraserve.controller.served import ServiceBook
from loraserve.controller.store import Store
from loraserve.engines.description import ReplicaReport
from placement.demand import ForecastOptions, forecaster
from placement.demand.newcomers import with_newcomers
from placement.types import AdapterVersion, ReplicaId, VersionId

logger = logging.getLogger(__name__)

MAX_PARTS = 1000
MAX_LIVES = 2
"""Of each replica: a report of the one before the present one may still be on its way."""

MIN_WINDOW_S = 0.001


class TokenMeter:
    """What replicas were asked for since it was last asked. `met` once for each life of a replica, `heard`
    with its reports, which may come late, twice, in any order or not at all."""

    def __init__(self, lives: Iterable[Life] | None = None) -> None:
        """`lives` as they were when an earlier controller last took what they had counted, None if that is
        not known or too long ago to go on from."""
        self._lives: dict[ReplicaId, deque[Life]] = {}
        self._tokens: dict[VersionId, int] = {}
        self._goes_on = lives is not None
        for life in lives or ():
            self._keep(replace(life))

    def met(self, replica: ReplicaId, incarnation: str, tokens: Mapping[VersionId, int]) -> None:
        """A life of the replica is watched from now on, which has counted so much: before this meter's time,
        unless it goes on from another's, who has not known this life."""
        if self._life(replica, incarnation) is None:
            before = {} if self._goes_on else tokens
            self._keep(Life(replica, incarnation, 0, before))

    def heard(self, replica: ReplicaId, report: ReplicaReport) -> None:
        """Count what has come to the replica since the last report of this life."""
        life = self._life(replica, report.incarnation)
        if life is None:
            # Perhaps one of long ago: to count it might be to count it twice.
            self._keep(Life(replica, report.incarnation, report.sequence, report.tokens))
            return
        if report.sequence <= life.sequence:
            return
        for version, total in report.tokens.items():
            before = life.tokens.get(version, 0)
            # A replica that has forgotten a version counts it from nothing.
            served = total - before if total >= before else total
            if served:
                self._tokens[version] = self._tokens.get(version, 0) + served
        life.sequence, life.tokens = report.sequence, report.tokens

    def take(self) -> dict[VersionId, int]:
        """The tokens by version since the last call."""
        tokens, self._tokens = self._tokens, {}
        return tokens

    @property
    def lives(self) -> tuple[Life, ...]:
        """What the next difference of each is taken to."""
        return tuple(replace(life) for lives in self._lives.values() for life in lives)

    def _life(self, replica: ReplicaId, incarnation: str) -> Life | None:
        lives = self._lives.get(replica, ())
        return next((life for life in lives if life.incarnation == incarnation), None)

    def _keep(self, life: Life) -> None:
        self._lives.setdefault(life.replica_id, deque(maxlen=MAX_LIVES)).append(life)


class DemandBook:
    """Measures, forecasts and remembers; `heard` with every report, `end_epoch` at the end of each epoch.

    `measured` and `forecast` are tokens per second by version, as of the end of the last epoch; who is in
    neither has none. What a window saw is kept in the store, and the counts that it ended with, so that a
    controller that comes back within a window goes on from the end of the last epoch: what came meanwhile to
    replicas that are still there is part of the next. After longer it is not known and not missed.
    """

    def __init__(
        self,
        section: PlacementSection,
        store: Store,
        clock: Clock,
        registered: Collection[AdapterVersion] = (),
    ) -> None:
        self.measured: Rates = {}
        self.forecast: Rates = {}
        self._options = ForecastOptions(
            epoch_s=section.epoch_s,
            window_s=max(section.window_s, section.epoch_s),
            history_s=section.history_s,
            season_s=section.season_s,
        )
        self._forecaster = forecaster(section.forecast, self._options)
        self._num_parts = min(MAX_PARTS, max(1, round(section.window_s / section.epoch_s)))
        self._parts: deque[Part] = deque(maxlen=self._num_parts)
        self._windows: deque[Rates] = deque(maxlen=self._options.history_windows)
        self._meter = TokenMeter()
        self.service = ServiceBook(clock)
        """How what was asked for was served."""
        self._memory = DemandMemory(store, self._options.history_windows)
        self._clock = clock
        self._begun_s = clock.now_s()
        self._registered = {adapter.version_id for adapter in registered}
        self._restore(self._memory.load(), registered)

    @property
    def history(self) -> tuple[Rates, ...]:
        """What the last windows measured, the newest last, as many as `placement.history_s` has epochs."""
        return tuple(self._windows)

    def met(self, replica: ReplicaId, incarnation: str, tokens: Mapping[VersionId, int]) -> None:
        """A replica was started or found that has counted so much."""
        self._meter.met(replica, incarnation, tokens)

    def heard(self, replica: ReplicaId, report: ReplicaReport) -> None:
        """A replica's report."""
        self._meter.heard(replica, report)
        self.service.heard(replica, report)

    def end_epoch(self, adapters: Collection[AdapterVersion]) -> Rates:
        """The forecast for the epoch that begins now; `adapters` are those registered now."""
        now_s = self._clock.now_s()
        seconds, self._begun_s = now_s - self._begun_s, now_s
        self._parts.append((seconds, self._meter.take()))
        self._observe(self._window())
        new = {adapter.version_id for adapter in adapters} - self._registered
        self.forecast = with_newcomers(self._forecaster.forecast(), adapters, new)
        self._registered = {adapter.version_id for adapter in adapters}
        self.service.keep_only(self._registered)
        # The oldest epoch is in no window to come.
        left = tuple(self._parts)[-self._num_parts + 1 :] if self._num_parts > 1 else ()
        self._memory.save(
            Remembered(
                forecaster=self._forecaster.export(),
                parts=left,
                lives=self._meter.lives,
                ended_s=now_s,
            ),
            self.measured,
        )
        return self.forecast

    def _window(self) -> Rates:
        """The mean of the epochs in the window."""
        # An epoch that was ended by hand may have taken no time.
        seconds = max(MIN_WINDOW_S, sum(part_s for part_s, _ in self._parts))
        tokens: dict[VersionId, int] = {}
        for _, part in self._parts:
            for version, served in part.items():
                tokens[version] = tokens.get(version, 0) + served
        return {version: served / seconds for version, served in sorted(tokens.items())}

    def _observe(self, window: Rates) -> None:
        self.measured = window
        self._windows.append(window)
        self._forecaster.observe(window)

    def _restore(self, remembered: Remembered | None, registered: Collection[AdapterVersion]) -> None:
        if remembered is None:
            return
        try:
            self._forecaster.restore(remembered.forecaster)
        except ValueError as error:
            # Another forecaster than before, or other epochs: it begins from what it would have seen of late.
            logger.info("the forecaster begins from the windows that were kept: %s", error)
            for window in remembered.windows:
                self._forecaster.observe(window)
        self._parts.extend(remembered.parts)
        self._windows.extend(remembered.windows)
        self.measured = self._windows[-1] if self._windows else {}
        self.forecast = with_newcomers(self._forecaster.forecast(), registered, ())
        if 0 <= self._begun_s - remembered.ended_s <= self._options.window_s:
            self._begun_s = remembered.ended_s
            self._meter = TokenMeter(remembered.lives)
