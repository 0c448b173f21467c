"""Replicas whose sizes follow from what is registered when they start."""

import logging
from collections.abc import Callable

import pytest

from loraserve.adapters import read_base
from loraserve.config import parse_config
from loraserve.controller.sizing import sized
from loraserve.errors import AdapterRejectedError
from loraserve.samples import SampleSet
from placement.types import AdapterName, AdapterVersion, ReplicaId, VersionId
from tests.support.controller_kit import TIMEOUT_S, Setup

R0, R1 = ReplicaId("replica-0"), ReplicaId("replica-1")
AUTO = {"max_lora_rank": "auto", "adapter_slots": "auto", "lora_execution": "padded", "pool_adapters": 0}


def test_what_is_given_is_left_as_it_is() -> None:
    config = parse_config({"engine": {"max_lora_rank": 16}})
    assert sized(config, None, ()) is config


@pytest.mark.parametrize(
    ("engine", "dtype", "slots"),
    [
        ({}, "bfloat16", 8),
        ({"gpus_per_replica": 1}, "bfloat16", 5),
        ({"lora_execution": "padded"}, "auto", 5),
        ({"lora_execution": "padded"}, "float32", 2),
        ({"lora_execution": "stock"}, "bfloat16", 2),
    ],
)
def test_a_slot_costs_what_the_execution_makes_of_it(
    samples: SampleSet, engine: dict[str, object], dtype: str, slots: int
) -> None:
    base = read_base(samples.model)
    own = AdapterVersion(version_id=VersionId("a@0"), name=AdapterName("a"), sha256="0", rank=8, size_bytes=1)
    many = [own] * 64
    one_slot = 64 * base.lora_values_per_rank(with_vocabulary=False) * 2
    tree = {"max_lora_rank": 64, "adapter_slots": "auto", "slot_bytes": 5 * one_slot}
    config = parse_config({"engine": tree | {"max_num_seqs": 8} | engine, "model": {"dtype": dtype}})
    assert sized(config, base, many).engine.adapter_slots == slots


async def test_each_start_of_a_replica_covers_what_is_registered_then(
    setup: Callable[..., Setup], samples: SampleSet, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="loraserve.controller.sizing")
    one = setup(engine=AUTO)
    controller = await one.start()
    first = one.fleet.links[R0].server.config.engine
    assert (first.max_lora_rank, first.adapter_slots, first.auto) == (64, 8, [])
    version = await controller.register("a", str(samples.adapters["rank-16"]), replace=False)
    with pytest.raises(AdapterRejectedError, match="its rank 128 is above 64, the highest that a replica"):
        await controller.register("b", str(samples.adapters["rank-128"]), replace=False)
    await one.fleet.lose(R0)
    await controller.wait_until(
        lambda: one.fleet.starts.count(R0) == 2 and R0 in controller.state.holders(version), TIMEOUT_S
    )
    again = one.fleet.links[R0].server.config.engine
    assert (again.max_lora_rank, again.adapter_slots, again.auto) == (16, 8, [])
    assert one.fleet.links[R1].server.config.engine == first
    assert "a replica starts with max_lora_rank 16, 8 slots" in caplog.text
