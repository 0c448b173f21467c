"""Live replicas that are restarted with the `max_lora_rank` that is planned, under load and over crashes."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from loraserve.client import Client
from loraserve.config import parse_config
from loraserve.controller.controller import Controller
from loraserve.controller.ranks import resizer_of, with_max_lora_rank
from loraserve.request import SamplingParams
from loraserve.samples import SampleSet
from placement.cluster.messages import EpochElapsed
from placement.cluster.records import ReplicaPhase
from placement.latency import LatencyModel, RankKernel
from placement.profile import EngineFacts, LoadSpeeds, OperatingPoint, Profile
from placement.types import ReplicaId
from tests.support.controller_kit import TIMEOUT_S, Setup
from tests.support.local_cluster import local_cluster

R0, R1 = ReplicaId("replica-0"), ReplicaId("replica-1")
PROFILE = Profile(
    name="kind",
    source="made up",
    engine=EngineFacts(kind="emulated", model="m", kv_blocks=1000),
    latency=LatencyModel(kernel=RankKernel.PADDED_CONFIG),
    latency_basis="derived",
    operating_points=(OperatingPoint(rank=8, tokens_per_s=4e5), OperatingPoint(rank=128, tokens_per_s=1e5)),
)
PLANNED: dict[str, dict[str, object]] = {
    "placement": {
        "max_lora_ranks": "planned",
        "epoch_s": 0.5,
        "window_s": 0.5,
        "restart_s": 0.1,
        "restart_horizon_epochs": 400,
        "forecast": "last",
    },
    "emulated": {"kernel": "padded_config", "rank_seq_ms": 0.05},
    "engine": {"max_lora_rank": 128},
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


def _settings(controller: Controller) -> list[int]:
    """What the replicas that serve really run with."""
    return sorted(
        record.spec.max_lora_rank
        for record in controller.state.replicas.values()
        if record.spec is not None and record.phase is ReplicaPhase.READY
    )


async def test_under_load_one_replica_comes_to_a_low_setting_and_no_request_fails(
    tmp_path: Path, samples: SampleSet
) -> None:
    async with (
        local_cluster(tmp_path, samples, profile=PROFILE, sections=PLANNED) as cluster,
        Client(cluster.address) as client,
    ):
        controller, served = cluster.controller, dict.fromkeys(samples.adapters, 0)
        is_over = asyncio.Event()

        async def ask(adapter: str) -> None:
            while not is_over.is_set():
                answer = await client.complete("Once upon a time", adapter=adapter, sampling=GREEDY)
                assert len(answer.step.token_ids) == GREEDY.max_tokens
                served[adapter] += 1

        names = ["rank-8"] * 6 + ["rank-128"]
        asking = [asyncio.ensure_future(ask(name)) for name in names]
        try:
            await controller.wait_until(lambda: _settings(controller) in ([8, 128], [16, 128]), TIMEOUT_S)
            before = dict(served)
            await controller.wait_until(
                lambda: all(served[name] > before[name] + 3 for name in set(names)), TIMEOUT_S
            )
        finally:
            is_over.set()
            await asyncio.gather(*asking)
        held = [record.replica_id for record in controller.state.replicas.values() if record.spec is not None]
        assert sorted(held) == [R0, R1]
        assert sorted(info.max_lora_rank for info in controller.engines.values())[0] in (8, 16)


async def test_what_was_chosen_outlives_the_controller_and_the_replica(
    setup: Callable[..., Setup], samples: SampleSet
) -> None:
    one = setup(profile=PROFILE, **{**PLANNED, "placement": {**PLANNED["placement"], "epoch_s": 1e6}})
    controller = await one.start()
    low = await controller.register("low", str(samples.adapters["rank-8"]), replace=False)
    high = await controller.register("high", str(samples.adapters["rank-128"]), replace=False)
    controller.dispatch(EpochElapsed({low: 3e4, high: 1e3}))
    await controller.wait_until(lambda: _settings(controller) == [8, 128], TIMEOUT_S)
    (lowered,) = [key for key, record in controller.state.replicas.items() if record.max_lora_rank == 8]
    assert controller.state.resizer.sizing.reason == "the gain repays the restarts"
    controller = await one.restart()
    assert controller.state.replicas[lowered].max_lora_rank == 8
    assert _settings(controller) == [8, 128]
    await one.fleet.lose(lowered)
    await controller.wait_until(lambda: _settings(controller) == [128], TIMEOUT_S)
    await controller.wait_until(lambda: _settings(controller) == [8, 128], TIMEOUT_S)
    await controller.wait_until(lambda: controller.is_served(high) and controller.is_served(low), TIMEOUT_S)


def test_a_rank_that_the_configuration_names_keeps_a_replica() -> None:
    named = parse_config({"placement": {"max_lora_ranks": "planned"}, "engine": {"max_lora_rank": 64}})
    limits = resizer_of(named).limits
    assert limits is not None
    assert (limits.kept, limits.highest) == (64, 64)
    chosen = parse_config({"placement": {"max_lora_ranks": "planned"}, "engine": {"max_lora_rank": "auto"}})
    limits = resizer_of(chosen).limits
    assert limits is not None
    assert (limits.kept, limits.highest) == (0, 512)
    measured = resizer_of(chosen, LoadSpeeds(origin_bytes_per_s=3e8)).limits
    assert measured == replace(limits, load_bytes_per_s=3e8)
    assert resizer_of(parse_config({})).limits is None
    started = with_max_lora_rank(chosen, 16)
    assert (started.engine.max_lora_rank, started.engine.auto) == (16, [])
    assert with_max_lora_rank(chosen, None) is chosen
