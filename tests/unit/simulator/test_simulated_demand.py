"""What a simulated policy is told of demand: the forecast of the forecaster that the scenario names."""

from pathlib import Path

import numpy as np
import pytest

from loraserve.errors import BadInputError
from loraserve.simulator.result_files import read_result, write_result
from placement.demand import DEFAULT_FORECASTER, FORECASTERS, ForecastOptions, forecaster
from placement.types import VersionId
from tests.support.simulated import replicas_of, run_checked, scenario_of, trace_of_columns
from traces.columns import TraceColumns
from traces.demand import demand_tokens_per_s


def ramp() -> TraceColumns:
    """Adapter 0 has k requests of 10 tokens in the k-th ten seconds, adapter 1 one in each."""
    arrivals = [10.0 * epoch + 9.0 * turn / epoch for epoch in range(1, 7) for turn in range(epoch)]
    others = [10.0 * epoch + 5.0 for epoch in range(1, 7)]
    times = np.array(arrivals + others)
    order = np.argsort(times)
    adapter = np.array([0] * len(arrivals) + [1] * len(others))[order]
    return trace_of_columns(times[order], 6, 4, adapter, num_adapters=2)


@pytest.mark.parametrize("name", sorted(FORECASTERS))
def test_each_epoch_is_planned_for_the_forecast_of_the_windows_before_it(name: str) -> None:
    trace = ramp()
    scenario = scenario_of(trace, replicas_of(1), epoch_s=10.0, window_s=10.0, history_s=50.0, forecast=name)
    result = run_checked(scenario)
    expected = forecaster(name, ForecastOptions(epoch_s=10.0, window_s=10.0, history_s=50.0))
    planned_for = 0.0
    for number, epoch in enumerate(result.epochs[:6]):
        assert epoch.forecast_tokens_per_s == pytest.approx(planned_for)
        assert epoch.demand_tokens_per_s == pytest.approx(number + 1 if number else 0.0)
        expected.observe({VersionId("a"): float(number), VersionId("b"): float(number > 0)})
        planned_for = sum(expected.forecast().values())


def test_demand_and_forecast_are_kept_in_files(tmp_path: Path) -> None:
    result = run_checked(scenario_of(ramp(), replicas_of(1), epoch_s=10.0, window_s=10.0))
    write_result(result, tmp_path)
    assert read_result(tmp_path).epochs == result.epochs
    assert result.scenario["forecast"] == DEFAULT_FORECASTER


def test_a_forecaster_that_there_is_not_is_refused() -> None:
    with pytest.raises(BadInputError, match="forecast: 'oracle'; expected one of adaptive, ema, "):
        scenario_of(ramp(), replicas_of(1), forecast="oracle")


def test_the_demand_of_a_stretch_of_a_trace_worked_by_hand() -> None:
    trace = trace_of_columns(
        [0.0, 4.0, 6.0, 9.0, 10.0], [10, 20, 30, 40, 1], 5, [0, 0, 1, -1, 0], num_adapters=3
    )
    assert demand_tokens_per_s(trace, 2.0, 10.0).tolist() == [25 / 8, 35 / 8, 0.0]
    assert demand_tokens_per_s(trace, 0.0, 4.0).tolist() == [15 / 4, 0.0, 0.0]
    with pytest.raises(ValueError, match="expected an end after the beginning"):
        demand_tokens_per_s(trace, 4.0, 4.0)
