"""A scenario that cannot be simulated is refused in one line that names what is wrong."""

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from loraserve.engines.replica_model.sequence import ReplicaLimits
from loraserve.errors import BadInputError
from loraserve.simulator.scenario import Failure, versions_of
from placement.types import ReplicaId
from tests.support.simulated import poisson_trace, replicas_of, scenario_of, trace_of_columns
from traces.columns import TraceAdapter

TRACE = poisson_trace(10, 5.0)
SMALL_POOL = ReplicaLimits(kv_blocks=100, pool_adapters=2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"policy": "best"}, "policy: 'best'; expected one of dlora, least-loaded"),
        ({"routing": "best"}, "routing: 'best'; expected one of dlora, least-outstanding"),
        ({"epoch_s": 0.0}, "epoch_s: 0.0 s; expected"),
        ({"epoch_s": float("nan")}, "epoch_s: nan s; expected"),
        ({"holder_wait_s": -1.0}, "holder_wait_s: -1.0 s; expected"),
        ({"report_delay_s": 0.0001}, "report_delay_s: 0.0001 s; expected at least network_delay_s"),
        ({"num_routers": 0}, "num_routers: 0; expected from 1"),
        ({"max_waiting": 0}, "max_waiting: 0; expected at least 1"),
        ({"max_restarts": -1}, "max_restarts: -1; expected at least 0"),
        ({"replicas": ()}, "replicas: none; expected at least one"),
        ({"replicas": replicas_of(1) + replicas_of(1)}, "replicas: two of one id"),
        ({"replicas": replicas_of(1, limits=SMALL_POOL)}, "r0: limits.pool_adapters: 2; expected 0 or"),
        ({"adapters": ()}, "adapters: 0; expected one for each of the trace's 5"),
        (
            {"failures": (Failure(at_s=1, replica_id=ReplicaId("r9"), down_s=1),)},
            "failures: no replica 'r9'",
        ),
        (
            {"failures": (Failure(at_s=-1, replica_id=ReplicaId("r0"), down_s=1),)},
            "failures: at_s: -1 s; expected",
        ),
        ({"trace": trace_of_columns([], 1, 1, -1)}, "made: no requests"),
        ({"trace": trace_of_columns([0.0, 2.0, 1.0], 1, 1, -1)}, "made: arrivals go back in time"),
        ({"trace": trace_of_columns([0.0, np.nan, 1.0], 1, 1, -1)}, "made: arrivals go back in time"),
        ({"trace": trace_of_columns([0.0, 1e8], 1, 1, -1)}, "made: lasts 100000000 s"),
        ({"trace": trace_of_columns([0.0, 1.0], 1, [3, 0], -1)}, "made: row 1: output_tokens is 0"),
        ({"trace": trace_of_columns([0.0, 1.0], 1, 1, [0, 7])}, "an adapter's place is outside its 0"),
    ],
)
def test_what_cannot_be_simulated_is_refused(options: dict[str, Any], said: str) -> None:
    plain = scenario_of(TRACE, replicas_of(2))
    with pytest.raises(BadInputError) as refused:
        replace(plain, **options)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_adapter_of_unknown_rank_is_refused_with_the_option_that_gives_it_one() -> None:
    trace = replace(TRACE, adapters=(TraceAdapter(name="mystery"), *TRACE.adapters[1:]))
    with pytest.raises(BadInputError, match=r"adapter mystery: .*--my-ranks"):
        versions_of(trace, bytes_per_rank=1.0, option="--my-ranks")


def test_a_scenario_crosses_to_another_process_and_is_described_in_plain_values() -> None:
    scenario = scenario_of(TRACE, replicas_of(2), seed=3)
    again = pickle.loads(pickle.dumps(scenario))
    assert again.describe() == scenario.describe()
    assert scenario.describe()["seed"] == 3
    assert all(isinstance(value, str | int | float | list | None) for value in scenario.describe().values())
