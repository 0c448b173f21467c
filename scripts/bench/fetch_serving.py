"""A replica with real vLLM that takes adapters from a peer: the first token of a cold one, and what fetches
do to the requests that decode meanwhile.

This process is the replica, another one (`loraserve.bench.fetch_worker`) holds the adapters and publishes
them. Loads go the way of a live replica: `ReplicaServer.load_adapter`, from there fabric, engine, slot.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median, quantiles
from typing import Any, Generic, TypeVar

from loraserve.adapters import read_base
from loraserve.bench.fetch_processes import wanted_tree, worker
from loraserve.bench.fetch_subject import MIB, FetchSubject, made, shape_of_rank
from loraserve.bench.idle import Bystanders
from loraserve.config import Config, parse_config
from loraserve.engines.base import AdapterFiles
from loraserve.engines.factory import make_engine
from loraserve.fabric.fabric import Fabric
from loraserve.fabric.wanted import PeerAddress
from loraserve.replica.server import ReplicaServer
from loraserve.request import GenerationRequest, SamplingParams
from loraserve.samples import build_checkpoint
from loraserve.transport.base import Transport
from loraserve.transport.registry import open_transports
from placement.types import ReplicaId

HOST = "127.0.0.1"
CAPACITY_BYTES = 512 * MIB
STREAMS = 4
STREAM_TOKENS = 900
LOW_RANK = 8
_FIRST_TOKEN = 8
_WAIT_S = 60.0
_WARM_UPS = 2
MAX_OTHERS_CPU = 0.1
MAX_TRIES = 3
_LOOK_AGAIN_S = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingOptions:
    """The model, the adapter that is fetched, and how often; `engine` is vllm, or emulated to try it out."""

    hidden: int = 1024
    layers: int = 8
    rank: int = 64
    prompt_tokens: int = 256
    repetitions: int = 15
    windows: int = 6
    window_s: float = 3.0
    engine: str = "vllm"

    def config(self, model: Path) -> Config:
        """The replica's configuration."""
        longest = 1024
        return parse_config(
            {
                "model": {"path": str(model), "dtype": "bfloat16"},
                "engine": {
                    "kind": self.engine,
                    "max_lora_rank": self.rank,
                    "adapter_slots": 4,
                    "max_num_seqs": STREAMS + 2,
                    "max_model_len_tokens": longest,
                    "max_num_batched_tokens": longest,
                    "extra": {"enable_prefix_caching": False, "use_tqdm_on_load": False}
                    if self.engine == "vllm"
                    else {},
                },
            }
        )


@dataclass(kw_only=True, slots=True)
class Replica:
    """The replica, the peer that has its adapters, and the scheme over which they come."""

    server: ReplicaServer
    fabric: Fabric
    transport: Transport
    peer: PeerAddress
    vocab_size: int
    requests: int = 0

    async def load(self, subject: FetchSubject) -> None:
        """Fetch it from the peer and make it usable; AssertionError if it came from elsewhere."""
        files = AdapterFiles(
            version_id=subject.version,
            directory=subject.stored,
            rank=subject.shape.rank,
            size_bytes=subject.body_bytes,
            digest=subject.digest,
            head_sha256=subject.head_sha256,
        )
        fetched = await self.server.load_adapter(files, (self.peer,))
        source = fetched.source if fetched else "nowhere"
        assert source == self.transport.scheme, f"it came from {source}"

    async def unload(self, subject: FetchSubject) -> None:
        """Take it out of the engine and of the fabric's cache."""
        await self.server.unload_adapter(subject.version)
        assert self.fabric.forget(subject.version)

    def request(
        self, subject: FetchSubject | None, drawn: Random, *, prompt: int, output: int
    ) -> GenerationRequest:
        """A greedy request with a prompt that nobody has seen."""
        self.requests += 1
        return GenerationRequest(
            request_id=f"fetch-{self.requests}",
            prompt=tuple(drawn.randrange(_FIRST_TOKEN, self.vocab_size) for _ in range(prompt)),
            version_id=subject.version if subject else None,
            sampling=SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True),
        )

    async def first_token(self, request: GenerationRequest) -> None:
        """Run the request until its first token is here."""
        async with aclosing(self.server.generate(request)) as steps:
            async for step in steps:
                if step.token_ids:
                    return

    async def transfer_s(self, subject: FetchSubject) -> float:
        """The bare transfer's own time: the transport alone, into memory that is there already."""
        place = memoryview(bytearray(subject.body_bytes))
        address = dict(self.peer.addresses)[self.transport.scheme]

        def fetch() -> float:
            began_s = time.perf_counter()
            self.transport.fetch(
                address,
                subject.version,
                place,
                on_bytes=lambda begin, end: None,
                idle_timeout_s=_WAIT_S,
                stop=lambda: False,
            )
            return time.perf_counter() - began_s

        return await asyncio.to_thread(fetch)

    async def settle(self) -> None:
        """Wait until nothing runs."""
        async with asyncio.timeout(_WAIT_S):
            while self.server.in_flight() or not self.fabric.is_idle:  # noqa: ASYNC110
                await asyncio.sleep(_LOOK_AGAIN_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A replica and the adapters that its peer has: one that stays, and those that come and go."""

    replica: Replica
    steady: FetchSubject
    moving: FetchSubject
    pids: tuple[int, ...]


@asynccontextmanager
async def stage(options: ServingOptions, folder: Path) -> AsyncIterator[Stage]:
    """Bring everything up; it is gone with the `with`."""
    model = build_checkpoint(folder / "model", hidden_size=options.hidden, num_layers=options.layers)
    base = read_base(model)
    config = options.config(model)
    async with AsyncExitStack() as stack:
        steady = stack.enter_context(made(shape_of_rank(base, LOW_RANK), folder))
        moving = stack.enter_context(made(shape_of_rank(base, options.rank), folder))
        holder = await stack.enter_async_context(worker("holding process", folder))
        opened = await holder.ask("open", host=HOST, schemes=["ucx", "tcp"], capacity_bytes=CAPACITY_BYTES)
        for subject in (steady, moving):
            await holder.ask("hold", wanted=wanted_tree(subject, directory=subject.stored))
        transports = open_transports(("ucx", "tcp"), host=HOST).transports
        fabric = Fabric(transports, capacity_bytes=CAPACITY_BYTES)
        server = ReplicaServer(ReplicaId("r0"), config, make_engine(config), fabric=fabric)
        stack.push_async_callback(server.stop, 0.0)
        described = await server.start()
        addresses = {scheme: bytes.fromhex(one) for scheme, one in opened["addresses"].items()}
        replica = Replica(
            server=server,
            fabric=fabric,
            transport=next(one for one in transports if one.scheme in addresses),
            peer=PeerAddress(replica_id="holder", addresses=tuple(addresses.items())),
            vocab_size=described.engine.vocab_size,
        )
        await replica.load(steady)
        pids = (holder.pid, *described.engine.pids)
        yield Stage(replica=replica, steady=steady, moving=moving, pids=pids)


T = TypeVar("T")


class Calm(Generic[T]):
    """Repetitions, of which those count during which other work disturbed least."""

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self._found: list[tuple[float, T]] = []

    def add(self, others_cpu: float | None, value: T) -> None:
        """One more; None: nobody knows."""
        self._found.append((others_cpu or 0.0, value))

    @property
    def is_enough(self) -> bool:
        """Whether so many were left alone, or there is an end to waiting for that."""
        calm = sum(others <= MAX_OTHERS_CPU for others, _ in self._found)
        return calm >= self._wanted or len(self._found) >= MAX_TRIES * self._wanted

    @property
    def _kept(self) -> list[tuple[float, T]]:
        return sorted(self._found, key=lambda one: one[0])[: self._wanted]

    @property
    def values(self) -> list[T]:
        """What counts."""
        return [value for _, value in self._kept]

    @property
    def others_cpu(self) -> float:
        """The most that other work had while these were made."""
        return max(others for others, _ in self._kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cold:
    """Seconds of one repetition: the cold request with its load, and the warm one; and the transfer alone."""

    cold_s: float
    load_s: float
    warm_s: float
    transfer_s: float


async def measure_first_token(on: Stage, options: ServingOptions) -> dict[str, Any]:
    """`cold_first_token`: from the moment that a request's adapter is ordered from the peer until its first
    token, over a warm one's first token plus the bare transfer's own time; medians, one of each in turn."""
    drawn = Random(0)
    for _ in range(_WARM_UPS):
        await _cold(on, options, drawn)
    calm: Calm[Cold] = Calm(options.repetitions)
    while not calm.is_enough:
        bystanders = Bystanders(on.pids)
        found = await _cold(on, options, drawn)
        calm.add(bystanders.share(), found)
    cold_s, load_s, warm_s, transfer_s = (
        median(getattr(one, name) for one in calm.values)
        for name in ("cold_s", "load_s", "warm_s", "transfer_s")
    )
    return {
        "cold_first_token": round(cold_s / (warm_s + transfer_s), 4),
        "cold_first_token_ms": round(cold_s * 1e3, 2),
        "cold_load_ms": round(load_s * 1e3, 2),
        "warm_first_token_ms": round(warm_s * 1e3, 2),
        "cold_transfer_ms": round(transfer_s * 1e3, 2),
        "cold_adapter_bytes": on.moving.body_bytes,
        "cold_scheme": on.replica.transport.scheme,
        "cold_repetitions": len(calm.values),
        "cold_others_cpu": calm.others_cpu,
    }


async def _cold(on: Stage, options: ServingOptions, drawn: Random) -> Cold:
    replica, subject = on.replica, on.moving

    def request() -> GenerationRequest:
        return replica.request(subject, drawn, prompt=options.prompt_tokens, output=1)

    first = request()
    began_s = time.perf_counter()
    await replica.load(subject)
    load_s = time.perf_counter() - began_s
    await replica.first_token(first)
    cold_s = time.perf_counter() - began_s
    await replica.settle()
    second = request()
    began_s = time.perf_counter()
    await replica.first_token(second)
    warm_s = time.perf_counter() - began_s
    await replica.settle()
    await replica.unload(subject)
    transfer_s = await replica.transfer_s(subject)
    return Cold(cold_s=cold_s, load_s=load_s, warm_s=warm_s, transfer_s=transfer_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """TBT p95 of a window without and of one with fetches, and how many these were."""

    calm_s: float
    busy_s: float
    fetches: int


async def measure_tbt(on: Stage, options: ServingOptions) -> dict[str, Any]:
    """`tbt_with_fetch`: TBT p95 of four requests that decode while an adapter is fetched, loaded and dropped
    over and over, over the same without; windows of both in turn, the median of their pairs' ratios."""
    await _beside(on, options, 0)
    calm: Calm[Beside] = Calm(options.windows)
    number = 0
    while not calm.is_enough:
        number += 1
        bystanders = Bystanders(on.pids)
        found = await _beside(on, options, number)
        calm.add(bystanders.share(), found)
    ratios = [one.busy_s / one.calm_s for one in calm.values]
    return {
        "tbt_with_fetch": round(median(ratios), 4),
        "tbt_p95_ms": round(median(one.calm_s for one in calm.values) * 1e3, 2),
        "tbt_p95_with_fetch_ms": round(median(one.busy_s for one in calm.values) * 1e3, 2),
        "tbt_with_fetch_pairs": [round(one, 3) for one in ratios],
        "tbt_fetches_per_s": round(median(one.fetches for one in calm.values) / options.window_s, 2),
        "tbt_others_cpu": calm.others_cpu,
    }


async def _beside(on: Stage, options: ServingOptions, number: int) -> Beside:
    """One window of each kind; which one comes first changes: what drifts drifts for both."""
    p95_s: dict[bool, float] = {}
    fetches = 0
    for is_busy in (False, True) if number % 2 else (True, False):
        gaps, loads = await _window(on.replica, on.steady, on.moving if is_busy else None, options, number)
        p95_s[is_busy] = quantiles(gaps, n=20)[-1]
        fetches += loads
    return Beside(calm_s=p95_s[False], busy_s=p95_s[True], fetches=fetches)


async def _window(
    replica: Replica, steady: FetchSubject, moving: FetchSubject | None, options: ServingOptions, seed: int
) -> tuple[list[float], int]:
    """The gaps of all streams in one window, and how many loads it had."""
    gaps: list[float] = []
    started = asyncio.Semaphore(0)
    drawn = Random(seed)
    began_s = 0.0

    async def stream(number: int) -> None:
        while True:
            request = replica.request(steady, drawn, prompt=8 + number, output=STREAM_TOKENS)
            last_s = 0.0
            async with aclosing(replica.server.generate(request)) as steps:
                async for step in steps:
                    now_s = time.perf_counter()
                    if not last_s:
                        started.release()
                    elif began_s and step.token_ids:
                        gaps.extend([(now_s - last_s) / len(step.token_ids)] * len(step.token_ids))
                    last_s = now_s

    streams = [asyncio.create_task(stream(number)) for number in range(STREAMS)]
    try:
        async with asyncio.timeout(_WAIT_S):
            for _ in streams:
                await started.acquire()
        began_s = time.perf_counter()
        loads = 0
        if moving is None:
            await asyncio.sleep(options.window_s)
        else:
            while time.perf_counter() - began_s < options.window_s:
                await replica.load(moving)
                await replica.unload(moving)
                loads += 1
    finally:
        for one in streams:
            one.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    await replica.settle()
    return gaps, loads
