"""The emulated engine takes the very steps that the simulator takes for the same arrivals."""

import asyncio
import random

import pytest

from loraserve.config import EmulatedSection, EngineSection
from loraserve.engines.emulated_model import limits_of, step_cost_of
from loraserve.engines.replica_model.model import ReplicaModel
from loraserve.engines.replica_model.sequence import Sequence
from loraserve.engines.virtual import VirtualTime
from placement.latency import PS_PER_S
from tests.support.engine_kit import adapter, collect, engine_on, request
from tests.support.replica_logs import step_ends, token_times

LATENCY = EmulatedSection(context_token_ms=0.003, adapter_ms=0.2, rank_token_ms=0.001, kernel="sum")
SETTINGS = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 48,
    "max_model_len_tokens": 160,
    "kv_cache_bytes": 300 * 4096,
    "adapter_slots": 2,
}
RANKS = {"low": 8, "middle": 32, "high": 128}


@pytest.mark.parametrize("seed", range(5))
async def test_the_schedule_is_the_simulator_s_for_recorded_arrivals(seed: int) -> None:
    rng, time = random.Random(seed), VirtualTime()
    engine = engine_on(time, LATENCY, **SETTINGS)
    await engine.start()
    for name, rank in RANKS.items():
        await time.run(engine.load_adapter(adapter(name, rank)))
    arrivals: list[tuple[int, int, int, str | None]] = []

    async def one(number: int) -> None:
        await time.sleep(rng.expovariate(20.0) * number)
        name = rng.choice([None, *RANKS])
        prompt_tokens, output_tokens = rng.randint(1, 100), rng.randint(1, 50)
        arrivals.append((round(time.now_s() * PS_PER_S), prompt_tokens, output_tokens, name))
        version = None if name is None else f"{name}@0"
        await collect(engine, request(str(number), (65,) * prompt_tokens, version, max_tokens=output_tokens))

    start_ps = round(time.now_s() * PS_PER_S)
    await time.run(asyncio.gather(*(one(number) for number in range(30))))
    await engine.close()

    config = EngineSection(kind="emulated", **SETTINGS)  # type: ignore[arg-type]
    model = ReplicaModel(limits_of(config, LATENCY), step_cost_of(config, LATENCY))
    for name, rank in RANKS.items():
        model.hold(adapter(name).version_id, rank, 1000, start_ps)
    for number, (at_ps, prompt_tokens, output_tokens, chosen) in enumerate(arrivals):
        version_id = None if chosen is None else adapter(chosen).version_id
        rank = 0 if chosen is None else RANKS[chosen]
        model.submit(Sequence(number, prompt_tokens, output_tokens, rank, version_id), at_ps)
    model.advance(1000 * PS_PER_S)
    assert step_ends(model.log) == step_ends(engine.replica.log)
    assert token_times(model.log) == token_times(engine.replica.log)
    assert len(token_times(model.log)) == 30
