"""The load of `scripts/bench/overload`: a closed loop that finds the capacity, and Poisson arrivals."""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from statistics import fmean
from typing import Any

from loraserve.rpc.tuning import tune_grpc

tune_grpc()

import grpc  # noqa: E402

from loraserve.rpc.server import make_channel  # noqa: E402
from loraserve.rpc.v1 import inference_pb2  # noqa: E402

MIN_TOKENS, MAX_TOKENS = 10, 40
STOP_TOKEN_IDS = range(10, 900, 15)
"""About one in 15 of the tokens that the emulated engine says. What they end, like what a model ends,
nobody knows before: an output has 23 tokens on average, and a router knows MAX_TOKENS."""

PATIENCE_S = 60.0


class Caller:
    """Draws requests and sends them to the routers in turn."""

    def __init__(self, addresses: Sequence[str], adapters: Sequence[str], seed: int) -> None:
        self._channels = [make_channel(address) for address in addresses]
        self._methods: list[Any] = [
            channel.unary_unary("/loraserve.v1.Inference/Complete") for channel in self._channels
        ]
        self._adapters = adapters
        self._turn = 0
        self.rng = Random(seed)

    async def call(self, timeout_s: float, *, longest: bool = False) -> str:
        """Send one request, on demand one with the longest output; the name of its status."""
        body = inference_pb2.GenerateRequest(
            adapter=self.rng.choice(self._adapters),
            text=f"Story {self.rng.random()}: " + "once upon a time. " * self.rng.randint(1, 8),
            sampling=inference_pb2.SamplingParams(
                max_tokens=MAX_TOKENS,
                min_tokens=MAX_TOKENS if longest else MIN_TOKENS,
                stop_token_ids=STOP_TOKEN_IDS,
            ),
        ).SerializeToString()
        self._turn = (self._turn + 1) % len(self._methods)
        try:
            await self._methods[self._turn](body, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            return str(error.code().name)
        return "OK"

    async def close(self) -> None:
        """Close the connections."""
        for channel in self._channels:
            await channel.close()


async def alone_s(caller: Caller, calls: int) -> float:
    """Mean seconds of a request with the longest output when it is the only one."""
    times_s = []
    for _ in range(calls):
        began_s = time.perf_counter()
        status = await caller.call(PATIENCE_S, longest=True)
        if status != "OK":
            raise SystemExit(f"overload: a request to the idle cluster ended with {status}")
        times_s.append(time.perf_counter() - began_s)
    return fmean(times_s)


async def closed_loop(caller: Caller, callers: int, seconds: float) -> float:
    """Requests finished per second with so many always in flight, the first third not counted."""
    began_s = time.perf_counter()
    count_from_s, end_s = began_s + seconds / 3, began_s + seconds
    done = 0

    async def loop() -> None:
        nonlocal done
        while time.perf_counter() < end_s:
            status = await caller.call(PATIENCE_S)
            if status != "OK":
                # A capacity without these would be too small, and the levels after it too low.
                raise SystemExit(f"overload: a request of the closed loop ended with {status}")
            if count_from_s <= time.perf_counter() < end_s:
                done += 1

    await asyncio.gather(*(loop() for _ in range(callers)))
    return done / (end_s - count_from_s)


@dataclass(slots=True)
class Level:
    """What came of one open loop. `good` and `window_s` leave out the time in which the cluster fills:
    the first deadline."""

    per_s: float
    window_s: float
    sent: int = 0
    good: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    refusals_s: list[float] = field(default_factory=list)
    latest_send_s: float = 0.0

    def figures(self) -> dict[str, float]:
        """Goodput and where the other requests went."""
        refused = self.statuses["RESOURCE_EXHAUSTED"]
        late = self.statuses["DEADLINE_EXCEEDED"]
        finished = self.statuses["OK"]
        return {
            "offered_per_s": self.per_s,
            "goodput_per_s": self.good / self.window_s,
            "sent": self.sent,
            "finished": finished,
            "refused": refused,
            "late": late,
            "failed": self.sent - finished - refused - late,
            "mean_refusal_ms": fmean(self.refusals_s) * 1e3 if self.refusals_s else 0.0,
            "latest_send_ms": self.latest_send_s * 1e3,
        }


async def open_loop(caller: Caller, per_s: float, seconds: float, deadline_s: float) -> Level:
    """Poisson arrivals for so long, whatever becomes of them; returns when the last one has ended."""
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    count_from_s, end_s = began_s + deadline_s, began_s + deadline_s + seconds
    level = Level(per_s=per_s, window_s=seconds)
    running: set[asyncio.Task[None]] = set()

    async def send() -> None:
        sent_s = loop.time()
        status = await caller.call(deadline_s)
        now_s = loop.time()
        level.statuses[status] += 1
        if status == "OK" and count_from_s <= now_s < end_s:
            level.good += 1
        elif status == "RESOURCE_EXHAUSTED":
            level.refusals_s.append(now_s - sent_s)

    due_s = began_s
    while (due_s := due_s + caller.rng.expovariate(per_s)) < end_s:
        await asyncio.sleep(max(0.0, due_s - loop.time()))
        level.latest_send_s = max(level.latest_send_s, loop.time() - due_s)
        level.sent += 1
        task = asyncio.create_task(send())
        running.add(task)
        task.add_done_callback(running.discard)
    if running:
        await asyncio.wait(running)
    return level
