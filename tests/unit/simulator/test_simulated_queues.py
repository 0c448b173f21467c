"""The simulated cluster where it reduces to queues whose waiting times are known."""

import heapq
import math
from typing import Any

import numpy as np
import pytest

from loraserve.engines.replica_model.sequence import ReplicaLimits
from placement.latency import PS_PER_S, LatencyModel
from tests.support.simulated import NO_DELAYS, replicas_of, run_checked, scenario_of, trace_of_columns


def lindley(gaps: np.ndarray, service: float) -> np.ndarray:
    """Waiting times before one server, by Lindley's recursion in closed form; the first gap is not used."""
    walk = np.concatenate([np.zeros(1), np.cumsum(service - gaps[1:])])
    waits: np.ndarray = walk - np.minimum.accumulate(walk)
    return waits


def central_queue(gaps: np.ndarray, services: np.ndarray, servers: int) -> np.ndarray:
    """Waiting times in one queue before several servers (Kiefer and Wolfowitz)."""
    free, now, waits = [0.0] * servers, -float(gaps[0]), []
    for gap, service in zip(gaps.tolist(), services.tolist(), strict=True):
        now += gap
        begun = max(now, free[0])
        heapq.heapreplace(free, begun + service)
        waits.append(begun - now)
    return np.array(waits)


def waits_s(gaps_s: np.ndarray, outputs: Any, step_ms: float, servers: int) -> np.ndarray:
    """How long requests wait for a replica of so many sequences, whose steps take as long whatever is in
    them, in front of the step that draws their first token."""
    replicas = replicas_of(
        1,
        latency=LatencyModel(base_ms=step_ms),
        limits=ReplicaLimits(kv_blocks=100_000, max_num_seqs=servers),
    )
    trace = trace_of_columns(np.cumsum(gaps_s) - gaps_s[0], 1, outputs, -1)
    result = run_checked(scenario_of(trace, replicas, max_waiting=None, **NO_DELAYS))
    waits: np.ndarray = (result.first_ps - result.arrival_ps) / PS_PER_S - step_ms / 1000
    return waits


def test_one_server_with_a_fixed_service_time_waits_as_m_d_1_says() -> None:
    """A random walk of a million steps is within 1 % of the theory, and the simulator walks the same way."""
    load, service_s = 0.6, 0.02
    gaps_s = np.random.default_rng(1).exponential(service_s / load, 1_000_000)
    theory_s = load * service_s / (2 * (1 - load))
    assert float(lindley(gaps_s, service_s).mean()) == pytest.approx(theory_s, rel=0.01)
    waits = waits_s(gaps_s[:40_000], 1, 1000 * service_s, servers=1)
    assert waits == pytest.approx(lindley(gaps_s[:40_000], service_s), abs=1e-7)


def test_as_many_servers_as_sequences_wait_as_m_m_c_says() -> None:
    """A replica has a server for each sequence, and an output of geometrically many steps is nearly
    exponential; a request joins with the next step, so that half a step is waited for besides."""
    servers, load, steps, step_ms = 4, 0.7, 500, 1.0
    service_s = steps * step_ms / 1000
    rng = np.random.default_rng(1)
    gaps_s = rng.exponential(service_s / (servers * load), 2_000_000)
    outputs = rng.geometric(1 / steps, len(gaps_s))
    offered = servers * load
    last = offered**servers / math.factorial(servers) / (1 - load)
    must_wait = last / (sum(offered**k / math.factorial(k) for k in range(servers)) + last)
    theory_s = must_wait * service_s / (servers * (1 - load))
    walked = central_queue(gaps_s, outputs * step_ms / 1000, servers)
    assert float(walked.mean()) == pytest.approx(theory_s, rel=0.015)
    waits = waits_s(gaps_s[:40_000], outputs[:40_000], step_ms, servers)
    assert float(waits.mean()) == pytest.approx(float(walked[:40_000].mean()), rel=0.005)
    assert np.abs(waits - walked[:40_000]).max() < 20 * step_ms / 1000


def test_without_load_a_request_takes_the_latency_models_own_time_and_two_network_delays() -> None:
    latency = LatencyModel(base_ms=7, row_ms=0.5, prefill_token_ms=0.1, context_token_ms=0.01, adapter_ms=0.2)
    trace = trace_of_columns([0.0, 50.0], [100, 30], [1, 3], [-1, 0], num_adapters=1)
    result = run_checked(scenario_of(trace, replicas_of(1, latency=latency), network_delay_s=0.001))
    first_ms = (result.first_ps - result.arrival_ps) / 1e9
    end_ms = (result.end_ps - result.arrival_ps) / 1e9
    assert first_ms[0] == end_ms[0] == pytest.approx(2 + 7.5 + 10)
    assert first_ms[1] == pytest.approx(2 + 7.5 + 3 + 0.2)
    assert end_ms[1] == pytest.approx(first_ms[1] + 2 * (7.5 + 0.2) + 0.01 * (31 + 32))
