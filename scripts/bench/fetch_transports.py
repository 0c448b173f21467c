"""The transports between two processes beside the barest loops over the same library, and the whole fabric.

Ours and the bare ones take turns, a few transfers each, so that what drifts drifts for both: a share is the
median of the rounds' ratios. All take and receive into memory that is there already, other memory in every
round, since some of it is slower; the fabric makes its own, hashes every byte twice (xxh3 and sha256) and
seals.
"""

import asyncio
import json
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from loraserve.bench.fetch_processes import WorkerProcess, wanted_tree, worker
from loraserve.bench.fetch_run import measure_floors
from loraserve.bench.fetch_subject import MIB, made, shape_of_size

HERE = Path(__file__).parent
HOST = "127.0.0.1"
KINDS = ("ucx_shm", "ucx_tcp", "tcp")
_BARE = {
    "ucx_shm": ("fetch_bare.py",),
    "ucx_tcp": ("fetch_bare.py", "--tls", "tcp"),
    "tcp": ("fetch_sockets.py",),
    "usual_tcp": ("fetch_sockets.py", "USUAL=1"),
}
_USUAL = "usual_tcp"
_TLS = {"ucx_tcp": "tcp"}
_BARE_TIMEOUT_S = 120.0
_WARM_UPS = 2
"""As many as the bare loops have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportsOptions:
    """The sizes, and in each round how many transfers each of ours and of the bare loops makes."""

    sizes_mib: tuple[int, ...] = (16, 256)
    rounds: int = 7
    transfers: int = 6


async def measure_transports(options: TransportsOptions, folder: Path) -> dict[str, Any]:
    """`bytes_per_s` of ours and `bare_bytes_per_s` by transport and size; `ucx_shm_share_of_bare`,
    `ucx_tcp_share_of_bare` and `tcp_share_of_bare` (the lower of the sizes'), `ucx_shm_over_tcp` (ours over
    ours, the lower one) and `ucx_shm_over_usual_tcp` (over sendall with the system's congestion control),
    `fabric_bytes_per_s`, and what one core of this machine can do (`floors`)."""
    bench = _Bench(options)
    async with AsyncExitStack() as stack:
        for kind in KINDS:
            ends = [
                await stack.enter_async_context(worker(f"{kind} {end}", folder))
                for end in ("holder", "fetcher")
            ]
            await bench.open(kind, ends[0], ends[1])
        for number in range(options.rounds):
            await bench.round(number)
        fabric = await bench.fabric(folder)
    figures = bench.figures()
    floors = await asyncio.to_thread(measure_floors)
    return figures | {
        "fabric_bytes_per_s": fabric,
        "floors": {key: round(one) for key, one in floors.items()},
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """A process that holds and one that fetches, and over what."""

    scheme: str
    address: str
    holder: WorkerProcess
    fetcher: WorkerProcess


class _Bench:
    """All pairs, and the rates of every round by kind and size."""

    def __init__(self, options: TransportsOptions) -> None:
        self._options = options
        self._pairs: dict[str, _Pair] = {}
        self._left_out: dict[str, str] = {}
        self._ours: dict[str, dict[int, list[float]]] = {}
        self._bare: dict[str, dict[int, list[float]]] = {}
        self._usual: dict[int, list[float]] = {size: [] for size in options.sizes_mib}

    async def open(self, kind: str, holder: WorkerProcess, fetcher: WorkerProcess) -> None:
        """Bring a pair up; what cannot be had is left out with its reason."""
        scheme = "tcp" if kind == "tcp" else "ucx"
        capacity_bytes = 2 * max(self._options.sizes_mib) * MIB + 64 * MIB
        opened: dict[str, Any] = {}
        for end in (fetcher, holder):
            opened = await end.ask(
                "open", host=HOST, schemes=[scheme], capacity_bytes=capacity_bytes, tls=_TLS.get(kind, "")
            )
        if opened["left_out"]:
            self._left_out[kind] = opened["left_out"][scheme]
            return
        self._pairs[kind] = _Pair(
            scheme=scheme, address=opened["addresses"][scheme], holder=holder, fetcher=fetcher
        )
        self._ours[kind] = {size: [] for size in self._options.sizes_mib}
        self._bare[kind] = {size: [] for size in self._options.sizes_mib}

    async def round(self, number: int) -> None:
        """A few transfers of each; who comes first changes."""
        for size_mib, rate in (await self._run_bare(_USUAL)).items():
            self._usual[size_mib].append(rate)
        for kind in self._pairs:
            for is_bare in (False, True) if number % 2 else (True, False):
                rates = await (self._run_bare(kind) if is_bare else self._run_ours(kind))
                for size_mib, rate in rates.items():
                    (self._bare if is_bare else self._ours)[kind][size_mib].append(rate)

    async def fabric(self, folder: Path) -> dict[str, dict[str, int]]:
        """Bytes/s of whole fetches until they are resident."""
        found: dict[str, dict[str, int]] = {kind: {} for kind in self._pairs}
        for size_mib in self._options.sizes_mib:
            with made(shape_of_size(size_mib * MIB), folder) as subject:
                for kind, pair in self._pairs.items():
                    await pair.holder.ask("hold", wanted=wanted_tree(subject, directory=subject.stored))
                    peers = [("peer", pair.scheme, pair.address)]
                    asked = wanted_tree(subject, peers=peers)
                    answers = [
                        await pair.fetcher.ask("fetch", wanted=asked) for _ in range(self._options.rounds + 1)
                    ]
                    seconds = median(one["resident_s"] for one in answers[1:])
                    found[kind][f"{size_mib}MiB"] = round(subject.body_bytes / seconds)
                    await pair.holder.ask("drop", version=str(subject.version))
        return found

    def figures(self) -> dict[str, Any]:
        """What was found, without the fabric."""
        shares = {
            kind: {
                f"{size}MiB": round(_ratio(self._ours[kind][size], self._bare[kind][size]), 4)
                for size in self._options.sizes_mib
            }
            for kind in self._pairs
        }
        over: dict[str, dict[str, float]] = {"tcp": {}, _USUAL: {}}
        for size in self._options.sizes_mib if "ucx_shm" in self._pairs else ():
            shm = self._ours["ucx_shm"][size]
            over["tcp"][f"{size}MiB"] = round(_ratio(shm, self._ours["tcp"][size]), 4)
            over[_USUAL][f"{size}MiB"] = round(_ratio(shm, self._usual[size]), 4)
        return {
            **{f"{kind}_share_of_bare": _least(shares.get(kind, {})) for kind in KINDS},
            **{f"ucx_shm_over_{name}": _least(found) for name, found in over.items()},
            "shares_of_bare": shares,
            "ucx_shm_over": over,
            "bytes_per_s": _medians(self._ours),
            "bare_bytes_per_s": _medians({**self._bare, _USUAL: self._usual}),
            "transports_left_out": self._left_out,
        }

    async def _run_ours(self, kind: str) -> dict[int, float]:
        pair = self._pairs[kind]
        rates = {}
        for size_mib in self._options.sizes_mib:
            await pair.holder.ask("publish", key=f"{size_mib}", size_bytes=size_mib * MIB)
            answer = await pair.fetcher.ask(
                "read",
                scheme=pair.scheme,
                address=pair.address,
                key=f"{size_mib}",
                size_bytes=size_mib * MIB,
                times=_WARM_UPS + self._options.transfers,
            )
            await pair.holder.ask("withdraw", key=f"{size_mib}")
            seconds = answer["seconds"][_WARM_UPS:]
            rates[size_mib] = size_mib * MIB / median(seconds)
        return rates

    async def _run_bare(self, kind: str) -> dict[int, float]:
        sizes = ",".join(str(one) for one in self._options.sizes_mib)
        script, *more = _BARE[kind]
        command = [sys.executable, str(HERE / script), *more, "--json", "--sizes-mib", sizes]
        process = await asyncio.create_subprocess_exec(
            *command,
            *("--repeats", str(self._options.transfers)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(_BARE_TIMEOUT_S):
                out, errors = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            last = errors.decode(errors="replace").strip().splitlines()[-1:]
            raise SystemExit(f"fetch: the bare loop of {kind} failed: {''.join(last)}")
        told = json.loads(out)
        return {size: median(told[str(size)]["gib_per_s"]) * 1024**3 for size in self._options.sizes_mib}


def _least(by_size: dict[str, float]) -> float | None:
    return min(by_size.values(), default=None)


def _ratio(tops: list[float], bottoms: list[float]) -> float:
    return median(top / bottom for top, bottom in zip(tops, bottoms, strict=True))


def _medians(rates: dict[str, dict[int, list[float]]]) -> dict[str, dict[str, int]]:
    return {
        kind: {f"{size}MiB": round(median(each)) for size, each in by_size.items()}
        for kind, by_size in rates.items()
    }
