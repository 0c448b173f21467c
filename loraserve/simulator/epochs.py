"""The controller's epochs in simulated time: demand, its forecast, and a record of what came of each."""

from collections.abc import Mapping, Sequence
from math import fsum

import numpy as np

from loraserve.simulator.dispatch import Dispatch
from loraserve.simulator.ledger import Ledger
from loraserve.simulator.result import EpochRecord
from loraserve.simulator.scenario import Scenario
from loraserve.simulator.shell import Shell
from loraserve.simulator.site import Site
from placement.cluster.messages import EpochElapsed
from placement.demand import ForecastOptions, forecaster
from placement.latency import PS_PER_S
from placement.types import VersionId
from traces.columns import BASE


class Epochs:
    """What elapses every `period_ps`; `records` has one for each epoch."""

    def __init__(
        self, scenario: Scenario, shell: Shell, dispatch: Dispatch, sites: Sequence[Site], ledger: Ledger
    ) -> None:
        self.records: list[EpochRecord] = []
        self._scenario = scenario
        self._shell = shell
        self._dispatch = dispatch
        self._sites = sites
        self._ledger = ledger
        self.period_ps = round(scenario.epoch_s * PS_PER_S)
        self._totals = (0, 0, 0)
        options = ForecastOptions(
            epoch_s=scenario.epoch_s, window_s=scenario.window_s, history_s=scenario.history_s
        )
        self._forecaster = forecaster(scenario.forecast, options)
        self._forecast_tokens_per_s = 0.0
        self._size_bytes = {adapter.version_id: adapter.size_bytes for adapter in scenario.adapters}

    def elapse(self, now_ps: int) -> None:
        """One epoch is over: the controller plans the next for what it forecasts."""
        demand = self.demand(now_ps)
        self._record(now_ps, demand)
        self._forecaster.observe(demand)
        forecast = self._forecaster.forecast()
        self._forecast_tokens_per_s = fsum(forecast.values())
        self._shell.dispatch(EpochElapsed(forecast), now_ps)

    def demand(self, now_ps: int) -> dict[VersionId, float]:
        """Tokens per second, prompt and output, of the requests of the last window, by version."""
        scenario, arrival_ps = self._scenario, self._ledger.arrival_ps
        window_ps = min(round(scenario.window_s * PS_PER_S), now_ps)
        first, last = np.searchsorted(arrival_ps, (now_ps - window_ps, now_ps))
        trace = scenario.trace
        place = trace.adapter[first:last]
        tokens = trace.prompt_tokens[first:last].astype(np.int64) + trace.output_tokens[first:last]
        named = place != BASE
        sums = np.bincount(place[named], weights=tokens[named], minlength=len(scenario.adapters))
        return {
            scenario.adapters[index].version_id: float(sums[index]) * PS_PER_S / window_ps
            for index in np.flatnonzero(sums).tolist()
        }

    def close(self, end_ps: int) -> None:
        """Record the last epoch, which ends with the simulation."""
        last_ps = self.records[-1].time_ps if self.records else -1
        # Even at the very end of an epoch something may have happened after it.
        if end_ps > last_ps or self._now() != self._totals:
            time_ps = max(end_ps, last_ps)
            self._record(time_ps, self.demand(time_ps))

    def _now(self) -> tuple[int, int, int]:
        transfers = self._shell.transfers
        return transfers.bytes_moved, transfers.num_begun, self._dispatch.cold_misses

    def _record(self, now_ps: int, demand: Mapping[VersionId, float]) -> None:
        totals = self._now()
        bytes_moved, loads, cold_misses = (
            now - before for now, before in zip(totals, self._totals, strict=True)
        )
        self._totals = totals
        self.records.append(
            EpochRecord(
                time_ps=now_ps,
                table_version=self._shell.state.table.version,
                copies=tuple(len(site.held) for site in self._sites),
                resident_bytes=sum(self._size_bytes[one] for site in self._sites for one in site.held),
                bytes_moved=bytes_moved,
                loads=loads,
                cold_misses=cold_misses,
                demand_tokens_per_s=fsum(demand.values()),
                forecast_tokens_per_s=self._forecast_tokens_per_s,
            )
        )
