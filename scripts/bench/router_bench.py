"""Measures what the router adds to a request, beside a bare gRPC pass-through as the floor.

Three paths to one canned replica: direct, through `bare` (a dozen lines of grpc.aio) and through
the router (`python -m loraserve.router`). Each of bare and router runs in a process pinned to the
first core; client and replica share the second one, or have one each where there are three. On two
cores, then, latency and throughput include what client and replica take from each other, in all
three paths alike, and throughput can be bounded by them; CPU per request and per message counts the
router's process alone (user + system, from /proc) and does not depend on them. All processes use
gRPC's settings of `loraserve.rpc.tuning`, so the floor has them too.

  hop_added_p50_ms, _p99_ms    unary, one at a time: quantile through the router - quantile direct
  unary_per_s                  64 callers in a closed loop
  router_cpu_us_per_request    CPU of the router's process / requests, in that run
  stream_messages_per_s        64 streams as fast as they go
  router_cpu_us_per_message    64 streams, one message each every 20 ms, all in step
  tokens_per_message           in that run, as the client received them
  itl_added_p99_ms             in that run: p99 of the gaps through the router - p99 direct
  pick_per_s, pick_cpu_us      look-aside: 64 callers in a closed loop through the client's stream of picks
                               (PickMany), CPU of the router's process
  pick_call_per_s, _cpu_us     the same with a call of Pick for each
  lookaside_itl_added_p99_ms   streams as above, each after a Pick at the router, straight from the
                               replica: p99 of the gaps - p99 direct

Rates and CPU figures are medians over the rounds; bare_* are the same for the floor.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from loraserve.rpc.tuning import tune_grpc

tune_grpc()

import bench_common as common  # noqa: E402
import grpc  # noqa: E402
import uvloop  # noqa: E402

from loraserve.client.picks import PickStream  # noqa: E402
from loraserve.rpc.server import make_channel  # noqa: E402
from loraserve.rpc.v1 import inference_pb2, inference_pb2_grpc  # noqa: E402

PEERS = Path(__file__).with_name("router_peers.py")
ADAPTER = "tenant"
CALLERS = 64
TARGETS = {
    "hop_added_p50_ms": (0.6, "max"),
    "unary_per_s": (2000.0, "min"),
    "router_cpu_us_per_request": (450.0, "max"),
    "router_cpu_us_per_message": (50.0, "max"),
    "pick_per_s": (5000.0, "min"),
    "pick_cpu_us": (200.0, "max"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is measured."""

    rounds: int
    latency_calls: int
    unary_s: float
    paced_messages: int
    fast_messages: int


FULL = {"latency_calls": 600, "unary_s": 4.0, "paced_messages": 250, "fast_messages": 600}
QUICK = {"latency_calls": 100, "unary_s": 0.5, "paced_messages": 30, "fast_messages": 60}


class Route:
    """One way to the replica, and what was measured on it."""

    def __init__(self, name: str, port: int, pid: int | None) -> None:
        self.name = name
        self.pid = pid
        self.channel = make_channel(f"127.0.0.1:{port}")
        self.complete: Any = self.channel.unary_unary("/loraserve.v1.Inference/Complete")
        self.generate: Any = self.channel.unary_stream("/loraserve.v1.Inference/Generate")
        self.pick: Any = self.channel.unary_unary("/loraserve.v1.Inference/Pick")
        self.latencies_s: list[float] = []
        self.gaps_s: list[float] = []
        self.unary_per_s: list[float] = []
        self.cpu_us_per_request: list[float] = []
        self.messages_per_s: list[float] = []
        self.cpu_us_per_message: list[float] = []
        self.tokens_per_message: list[float] = []
        self.picks_per_s: dict[bool, list[float]] = {True: [], False: []}
        self.cpu_us_per_pick: dict[bool, list[float]] = {True: [], False: []}

    def cpu_s(self) -> float:
        """CPU seconds of the process in the middle so far, user and system."""
        return 0.0 if self.pid is None else common.cpu_s(self.pid)


def body(*, messages: int = 1, paced: bool = False) -> bytes:
    """A request of ordinary size; the canned replica reads how to answer from it."""
    return inference_pb2.GenerateRequest(
        adapter=ADAPTER,
        text="Once upon a time there was a router. " * 8,
        sampling=inference_pb2.SamplingParams(temperature=0.0, max_tokens=messages, ignore_eos=paced),
    ).SerializeToString()


async def measure_latency(paths: Sequence[Route], calls: int) -> None:
    """One call at a time, the paths in turn, so that all see the same machine."""
    request = body()
    for index in range(calls + 20):
        for path in paths:
            began_s = time.perf_counter()
            await path.complete(request)
            if index >= 20:
                path.latencies_s.append(time.perf_counter() - began_s)


async def measure_unary(path: Route, seconds: float) -> None:
    """`CALLERS` callers in a closed loop."""
    request = body()
    done = 0
    end_s = time.perf_counter() + seconds

    async def call() -> None:
        nonlocal done
        while time.perf_counter() < end_s:
            await path.complete(request)
            done += 1

    cpu_s, began_s = path.cpu_s(), time.perf_counter()
    await asyncio.gather(*(call() for _ in range(CALLERS)))
    path.unary_per_s.append(done / (time.perf_counter() - began_s))
    path.cpu_us_per_request.append((path.cpu_s() - cpu_s) / done * 1e6)


async def measure_picks(path: Route, seconds: float, *, stream: bool) -> None:
    """`CALLERS` callers in a closed loop, over one stream or by one call each."""
    picks = PickStream(inference_pb2_grpc.InferenceStub(path.channel))
    request = inference_pb2.PickRequest(adapter=ADAPTER, max_tokens=64, remaining_s=60.0)
    body = request.SerializeToString()
    done = 0
    end_s = time.perf_counter() + seconds

    async def call() -> None:
        nonlocal done
        while time.perf_counter() < end_s:
            await (picks.pick(request, 60.0) if stream else path.pick(body))
            done += 1

    cpu_s, began_s = path.cpu_s(), time.perf_counter()
    await asyncio.gather(*(call() for _ in range(CALLERS)))
    path.picks_per_s[stream].append(done / (time.perf_counter() - began_s))
    path.cpu_us_per_pick[stream].append((path.cpu_s() - cpu_s) / done * 1e6)
    await picks.close()


async def measure_streams(path: Route, messages: int, *, paced: bool, picker: Route | None = None) -> None:
    """`CALLERS` streams of so many messages each; with a `picker`, each after a pick there."""
    request = body(messages=messages, paced=paced)
    tokens = 0

    async def read() -> None:
        nonlocal tokens
        last_s: float | None = None
        if picker is not None:
            await picker.pick(inference_pb2.PickRequest(adapter=ADAPTER).SerializeToString())
        async for message in path.generate(request):
            if paced:
                now_s = time.perf_counter()
                if last_s is not None:
                    path.gaps_s.append(now_s - last_s)
                last_s = now_s
                tokens += len(inference_pb2.GenerateResponse.FromString(message).token_ids)

    total = messages * CALLERS
    cpu_s, began_s = path.cpu_s(), time.perf_counter()
    await asyncio.gather(*(read() for _ in range(CALLERS)))
    if paced:
        path.cpu_us_per_message.append((path.cpu_s() - cpu_s) / total * 1e6)
        path.tokens_per_message.append(tokens / total)
    else:
        path.messages_per_s.append(total / (time.perf_counter() - began_s))


async def measure(paths: Sequence[Route], aside: Route, sizes: Sizes) -> None:
    """All of it, the paths in turn within each round; `aside` is the direct path after a pick."""
    for path in paths:
        await asyncio.wait_for(_until_served(path), 10.0)
    for number in range(sizes.rounds):
        await measure_latency(paths, sizes.latency_calls)
        for path in paths:
            print(f"round {number + 1} of {sizes.rounds}: {path.name}", file=sys.stderr, flush=True)
            if path.pid is not None:
                await measure_unary(path, sizes.unary_s)
                await measure_streams(path, sizes.fast_messages, paced=False)
            await measure_streams(path, sizes.paced_messages, paced=True)
        for stream in (True, False):
            await measure_picks(paths[-1], sizes.unary_s, stream=stream)
        await measure_streams(aside, sizes.paced_messages, paced=True, picker=paths[-1])


async def _until_served(path: Route) -> None:
    while True:
        try:
            await path.complete(body(), wait_for_ready=True)
            return
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            await asyncio.sleep(0.05)


@dataclass
class Processes:
    """What the benchmark started."""

    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, core: int, *arguments: str) -> tuple[int, int]:
        """Start a Python process on this core; its pid and the port that it prints."""
        command = [sys.executable, *arguments]
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {core})
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        finally:
            os.sched_setaffinity(0, before)
        self.started.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            _, errors = process.communicate(timeout=10)
            raise SystemExit(f"router: {' '.join(arguments)} did not start:\n{errors}")
        return process.pid, int(json.loads(line)["port"])


@contextmanager
def processes() -> Iterator[Processes]:
    """End everything that was started, whatever happens."""
    running = Processes()
    try:
        yield running
    finally:
        for process in running.started:
            process.kill()
            process.communicate()


def quantile_ms(values_s: Sequence[float], share: float) -> float:
    """The quantile, nearest rank, in milliseconds."""
    ordered = sorted(values_s)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e3


def figures(direct: Route, bare: Route, router: Route, aside: Route) -> dict[str, float]:
    """The keys of the module's docstring, for router and floor, and their ratios."""
    found: dict[str, float] = {}
    for prefix, cpu_prefix, path in (("", "router_", router), ("bare_", "bare_", bare)):
        for name, share in (("p50", 0.5), ("p99", 0.99)):
            added = quantile_ms(path.latencies_s, share) - quantile_ms(direct.latencies_s, share)
            found[f"{prefix}hop_added_{name}_ms"] = added
        found[f"{prefix}unary_per_s"] = median(path.unary_per_s)
        found[f"{prefix}stream_messages_per_s"] = median(path.messages_per_s)
        found[f"{cpu_prefix}cpu_us_per_request"] = median(path.cpu_us_per_request)
        found[f"{cpu_prefix}cpu_us_per_message"] = median(path.cpu_us_per_message)
        found[f"{prefix}tokens_per_message"] = median(path.tokens_per_message)
        found[f"{prefix}itl_added_p99_ms"] = quantile_ms(path.gaps_s, 0.99) - quantile_ms(direct.gaps_s, 0.99)
    for stream, name in ((True, "pick"), (False, "pick_call")):
        found[f"{name}_per_s"] = median(router.picks_per_s[stream])
        found[f"{name}_cpu_us"] = median(router.cpu_us_per_pick[stream])
    found["lookaside_itl_added_p99_ms"] = quantile_ms(aside.gaps_s, 0.99) - quantile_ms(direct.gaps_s, 0.99)
    found["direct_p50_ms"] = quantile_ms(direct.latencies_s, 0.5)
    for key in ("cpu_us_per_request", "cpu_us_per_message"):
        found[f"ratio_{key}"] = found[f"router_{key}"] / found[f"bare_{key}"]
    return {key: round(value, 4) for key, value in found.items()}


def conditions(cores: Sequence[int], sizes: Sizes) -> dict[str, Any]:
    """What the figures hold for."""
    return common.conditions(
        "router",
        router_core=cores[0],
        replica_core=cores[1],
        client_core=cores[2],
        grpcio=grpc.__version__,
        uvloop=uvloop.__version__,
        grpc_experiments=os.environ.get("GRPC_EXPERIMENTS", ""),
        rounds=sizes.rounds,
        seed=None,
    )


def print_table(found: dict[str, float], told: dict[str, Any]) -> None:
    """The figures for a person."""
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "router", "bare pass-through", "target")
    for key, value in found.items():
        if key.startswith(("bare_", "ratio_", "direct_")):
            continue
        bound, kind = TARGETS.get(key, (None, ""))
        met = bound is None or (value <= bound if kind == "max" else value >= bound)
        shown = (
            "" if bound is None else f"{'≤' if kind == 'max' else '≥'} {bound:g} {'met' if met else 'MISSED'}"
        )
        bare = found.get("bare_" + key.removeprefix("router_"))
        table.add_row(key, f"{value:,.2f}", "" if bare is None else f"{bare:,.2f}", shown)
    console = Console()
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in told.items()), highlight=False)


def main() -> int:
    """Measure and print."""
    parser = common.parser("router", __doc__, quick="a few seconds, to see that it works")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions (3)")
    options = parser.parse_args()
    scale: dict[str, Any] = QUICK if options.quick else FULL
    sizes = Sizes(rounds=1 if options.quick else max(1, options.rounds), **scale)
    available = sorted(os.sched_getaffinity(0))
    if len(available) < 2:
        print("router: this machine lends one core only; two are needed", file=sys.stderr)
        return 2
    cores = (available[0], available[1], available[2] if len(available) > 2 else available[1])
    told = conditions(cores, sizes)
    with processes() as running:
        _, replica_port = running.start(cores[1], str(PEERS), "replica")
        upstream = f"127.0.0.1:{replica_port}"
        bare_pid, bare_port = running.start(cores[0], str(PEERS), "bare", upstream)
        arguments = ("-m", "loraserve.router", "--controller", upstream, "--port", "0")
        router_pid, router_port = running.start(cores[0], *arguments)
        os.sched_setaffinity(0, {cores[2]})

        async def run() -> dict[str, float]:
            direct = Route("direct", replica_port, None)
            bare = Route("bare", bare_port, bare_pid)
            router = Route("router", router_port, router_pid)
            aside = Route("look-aside", replica_port, None)
            await measure((direct, bare, router), aside, sizes)
            for path in (direct, bare, router, aside):
                await path.channel.close()
            return figures(direct, bare, router, aside)

        found = uvloop.run(run())
    if options.json:
        print(json.dumps({**found, **told}))
    else:
        print_table(found, told)
    return 0


if __name__ == "__main__":
    sys.exit(main())
