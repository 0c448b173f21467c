"""The emulated engine takes the very steps that the simulator takes for the same arrivals."""

import asyncio
import random
from typing import Any

import pytest

from loraserve.config import EmulatedSection, EngineSection
from loraserve.engines.emulated_model import limits_of, step_cost_of
from loraserve.engines.replica_model.log import ReplicaLog
from loraserve.engines.replica_model.model import ReplicaModel
from loraserve.engines.replica_model.sequence import Sequence
from loraserve.engines.virtual import VirtualTime
from placement.latency import PS_PER_S
from tests.support.engine_kit import adapter, collect, engine_on, request, tokens_of
from tests.support.replica_logs import step_ends, token_times

LATENCY = EmulatedSection(context_token_ms=0.003, adapter_ms=0.2, rank_token_ms=0.001, kernel="sum")
SETTINGS: dict[str, Any] = {
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
    log = ReplicaLog()
    engine = engine_on(time, LATENCY, log=log, **SETTINGS)
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

    config = EngineSection(kind="emulated", **SETTINGS)
    model = ReplicaModel(limits_of(config, LATENCY), step_cost_of(config, LATENCY))
    for name, rank in RANKS.items():
        model.hold(adapter(name).version_id, rank, 1000, start_ps)
    for number, (at_ps, prompt_tokens, output_tokens, chosen) in enumerate(arrivals):
        version_id = None if chosen is None else adapter(chosen).version_id
        rank = 0 if chosen is None else RANKS[chosen]
        model.submit(Sequence(number, prompt_tokens, output_tokens, rank, version_id), at_ps)
    model.advance(1000 * PS_PER_S)
    assert step_ends(model.log) == step_ends(log)
    assert token_times(model.log) == token_times(log)
    assert len(token_times(model.log)) == 30


class JumpingClock:
    """The virtual time, ahead by what a busy event loop has missed."""

    def __init__(self, time: VirtualTime) -> None:
        self.time = time
        self.missed_s = 0.0

    def now_s(self) -> float:
        return self.time.now_s() + self.missed_s


async def test_an_engine_that_falls_behind_forgets_the_rest_and_serves_on() -> None:
    time = VirtualTime()
    clock = JumpingClock(time)
    engine = engine_on(time, clock=clock)
    await engine.start()
    took_s: list[float] = []

    async def one(number: int) -> None:
        await time.sleep(0.003 * number)
        if number % 10 == 9:
            clock.missed_s += 5.0
        begun_s = time.now_s()
        assert len(tokens_of(await collect(engine, request(str(number), max_tokens=20)))) == 20
        took_s.append(time.now_s() - begun_s)

    await time.run(asyncio.gather(*(one(number) for number in range(60))))
    engine.check_invariants()
    await engine.close()
    assert max(took_s) < 1.0, "nobody waits for what the loop has missed"


async def test_steps_of_no_time_at_all_give_their_tokens() -> None:
    time = VirtualTime()
    engine = engine_on(time, EmulatedSection(base_step_ms=0, decode_seq_ms=0, prefill_token_ms=0))
    await engine.start()
    answers = await time.run(
        asyncio.gather(*(collect(engine, request(str(number), max_tokens=30)) for number in range(5)))
    )
    await engine.close()
    assert [len(tokens_of(answer)) for answer in answers] == [30] * 5


async def test_an_engine_that_serves_for_ever_keeps_nothing_of_what_is_done() -> None:
    time = VirtualTime()
    engine = engine_on(time)
    await engine.start()
    await time.run(collect(engine, request("only", max_tokens=50)))
    await engine.close()
    log = engine.replica.log
    assert log.num_steps == 50
    assert (len(log.run_ps), len(log.run_rows), len(log.stretch_request)) == (0, 0, 0)
