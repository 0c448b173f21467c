"""Prompts that begin alike go where their beginning is cached, unless the queue there costs more."""

import zlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.config import EngineSection
from loraserve.router.testing import table_of
from loraserve.rpc.internal.v1 import internal_pb2
from loraserve.rpc.prefix import BLOCK_BYTES, BLOCK_TOKENS, MAX_BLOCKS, prefix_blocks
from loraserve.rpc.v1 import inference_pb2
from placement.latency import LatencyModel
from placement.routing.replica_cost import ReplicaCost
from placement.table import RoutingTable
from tests.support.router_bench import Bench, MakeBench, ask, until

COST = ReplicaCost(latency=LatencyModel(base_ms=10.0, prefill_token_ms=1.0, decode_rank_ms=0.01))


def tokens(*ids: int) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=ids))


@given(
    first=st.lists(st.integers(0, 2**32 - 1), max_size=200),
    same=st.integers(0, 200),
    more=st.lists(st.integers(0, 2**32 - 1), max_size=200),
)
def test_names_are_equal_as_far_as_prompts_are(first: list[int], same: int, more: list[int]) -> None:
    second = [*first[:same], *more]
    common = next(
        (place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )
    left, right = prefix_blocks(tokens(*first)), prefix_blocks(tokens(*second))
    assert len(left) == len(first) // BLOCK_TOKENS
    whole = common // BLOCK_TOKENS
    assert left[:whole] == right[:whole]
    assert all(a != b for a, b in zip(left[whole:], right[whole:], strict=False))


def test_names_are_what_the_protocol_says_and_bounded() -> None:
    text = "".join(chr(97 + place % 26) for place in range(1000)) + "é" * 300
    names = prefix_blocks(ask(text=text))
    data = text.encode()
    assert names == tuple(zlib.crc32(data[:end]) for end in range(256, len(data) + 1, 256))
    assert len(prefix_blocks(ask(text="x" * 10**6))) == MAX_BLOCKS
    assert len(prefix_blocks(tokens(*[7] * 10**5))) == MAX_BLOCKS
    ids = [1, 2**31, *range(62)]
    assert prefix_blocks(tokens(*ids)) == (zlib.crc32(b"".join(one.to_bytes(4, "little") for one in ids)),)
    turns = [inference_pb2.ChatMessage(role="user", content="x" * BLOCK_BYTES)]
    chat = inference_pb2.GenerateRequest(chat=inference_pb2.Chat(messages=turns))
    assert prefix_blocks(chat) == (zlib.crc32(b"user\0" + b"x" * (BLOCK_BYTES - 5)),)
    assert prefix_blocks(ask(text="x" * (BLOCK_BYTES - 1))) == ()
    assert prefix_blocks(tokens(*range(BLOCK_TOKENS - 1))) == ()


@pytest.mark.parametrize(
    ("engine", "caches"),
    [
        (EngineSection(), True),
        (EngineSection(extra={"enable_prefix_caching": False}), False),
        (EngineSection(kind="emulated"), False),
    ],
)
def test_only_an_engine_that_caches_prefixes_is_routed_for(engine: EngineSection, caches: bool) -> None:
    assert engine.caches_prefixes is caches


def costed(bench: Bench) -> RoutingTable:
    addresses = {name: fake.address for name, fake in bench.replicas.items()}
    table = table_of(1, addresses, {"a": ("r0", "r1"), "b": ("r0", "r1")})
    return replace(table, replicas={name: replace(one, cost=COST) for name, one in table.replicas.items()})


async def report(bench: Bench, sequence: int, **running: int) -> None:
    for name, number in running.items():
        ranks = [internal_pb2.RankLoad(rank=8, running=number)]
        bench.replicas[name].report(sequence=sequence, running=number, ranks=ranks)

    def is_there() -> bool:
        loads = bench.router.loads.view().loads
        found = {str(name): load.running for name, load in loads.items() if load is not None}
        return found == running

    await until(is_there)


async def where(bench: Bench, adapter: str, text: str) -> tuple[str, str]:
    call = bench.inference.Complete(ask(adapter, text))
    await call
    trailers = dict(await call.trailing_metadata())
    return trailers["loraserve-replica"], trailers["loraserve-reason"]


async def test_the_same_long_prompt_goes_to_the_same_replica_until_that_is_busy(
    make_bench: MakeBench,
) -> None:
    bench: Bench = await make_bench(routing="marginal-cost", caches_prefixes=True)
    await bench.controller.publish(costed(bench))
    await bench.serving(True)
    await report(bench, 1, r0=2, r1=2)
    text = "All work and no play makes Jack a dull boy. " * 100
    first, _ = await where(bench, "a", text)
    for suffix in range(6):
        # What was sent since the last report is taken to wait there.
        number = 3 + suffix % 2
        await report(bench, 2 + suffix, r0=number, r1=number)
        assert await where(bench, "a", f"{text}{suffix}") == (first, "marginal-cost:prefix")
    await report(bench, 8, r0=2, r1=2)
    names = prefix_blocks(ask(text=text))
    pick = inference_pb2.PickRequest(adapter="a", prompt_tokens=1100, prefix_blocks=names)
    picked = await bench.inference.Pick(pick)
    assert (picked.replica_id, picked.reason) == (first, "marginal-cost:prefix")
    assert (await where(bench, "b", text))[1] == "marginal-cost", "another adapter has a cache of its own"
    busy = {name: 60 if name == first else 0 for name in ("r0", "r1")}
    await report(bench, 9, **busy)
    other, reason = await where(bench, "a", text)
    assert (other, reason) == ("r1" if first == "r0" else "r0", "marginal-cost")


async def test_blocks_are_not_looked_at_where_nothing_is_cached(make_bench: MakeBench) -> None:
    bench: Bench = await make_bench(routing="marginal-cost")
    await bench.controller.publish(costed(bench))
    await bench.serving(True)
    await report(bench, 1, r0=2, r1=2)
    found = {await where(bench, "a", "word " * 500) for _ in range(8)}
    assert {reason for _, reason in found} == {"marginal-cost"}
