"""Fetches between two hosts over links of 1 and of 10 Gbit/s: which share of the link is used."""

from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from fetch_netns import BURST_BYTES, Host, has_tun, two_hosts, why_not

from loraserve.bench.fetch_processes import WorkerProcess, wanted_tree, worker
from loraserve.bench.fetch_subject import MIB, made, shape_of_size

TCP_SHARE = 1448 / 1514
"""Of an Ethernet frame of 1500 bytes and its header, what TCP over IPv4 with time stamps has for payload."""
DELAYS = (
    "netem is not in every kernel: links without a delay are veth with tbf, the one of 1 Gbit/s with 1 ms in"
    " each direction is a process between two TUN devices, too slow for 10 Gbit/s"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapedOptions:
    """The links in Gbit/s with their delay in each direction in ms, and how many bytes are fetched over each,
    how often."""

    links: tuple[tuple[int, float, int], ...] = ((1, 0.0, 32 * MIB), (1, 1.0, 32 * MIB), (10, 0.0, 128 * MIB))
    repetitions: int = 7


async def measure_shaped(options: ShapedOptions, folder: Path) -> dict[str, Any]:
    """`shaped_share` by link and scheme: the transport alone, of what TCP can carry over the link; and
    `shaped_fabric_share`, the whole fabric with verification."""
    if reason := why_not():
        return {"shaped_share": None, "shaped_skipped": reason}
    alone: dict[str, Any] = {}
    fabric: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for gbit_per_s, delay_ms, size_bytes in options.links:
        name = f"{gbit_per_s}_gbit_per_s" + (f"_{delay_ms:g}_ms" if delay_ms else "")
        if delay_ms and not has_tun():
            left_out[name] = "no /dev/net/tun here"
            continue
        with two_hosts(gbit_per_s, delay_ms) as (here, there):
            link = _Link(gbit_per_s * 1e9 / 8, size_bytes, options.repetitions)
            alone[name], fabric[name] = await link.measure(here, there, folder)
            left_out |= link.left_out
    return {
        "shaped_share": alone,
        "shaped_fabric_share": fabric,
        "shaped_left_out": left_out,
        "shaped_of_link": f"payload of TCP: {TCP_SHARE:.4f} of the link's rate",
        "shaped_delay": DELAYS,
    }


class _Link:
    """One link and what is fetched over it."""

    def __init__(self, link_bytes_per_s: float, size_bytes: int, repetitions: int) -> None:
        self._payload_bytes_per_s = link_bytes_per_s * TCP_SHARE
        self._size_bytes = size_bytes
        self._repetitions = repetitions
        self.left_out: dict[str, str] = {}

    async def measure(self, here: Host, there: Host, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """Shares by scheme, of the transport and of the fabric."""
        async with AsyncExitStack() as stack:
            ends: list[WorkerProcess] = []
            addresses: dict[str, str] = {}
            for name, host in (("shaped holder", here), ("shaped fetcher", there)):
                end = await stack.enter_async_context(worker(name, folder, prefix=host.prefix))
                opened = await end.ask(
                    "open",
                    host=host.address,
                    schemes=["tcp", "ucx"],
                    capacity_bytes=2 * self._size_bytes + 64 * MIB,
                )
                addresses = addresses or opened["addresses"]
                self.left_out |= opened["left_out"]
                ends.append(end)
            schemes = {scheme: one for scheme, one in addresses.items() if scheme not in self.left_out}
            holder, fetcher = ends
            alone = await self._alone(holder, fetcher, schemes)
            return alone, await self._fabric(holder, fetcher, schemes, folder)

    async def _alone(
        self, holder: WorkerProcess, fetcher: WorkerProcess, schemes: dict[str, str]
    ) -> dict[str, Any]:
        await holder.ask("publish", key="region", size_bytes=self._size_bytes)
        taken: dict[str, list[float]] = {scheme: [] for scheme in schemes}
        for number in range(-1, self._repetitions):
            for scheme, address in schemes.items():
                asked = {"scheme": scheme, "address": address, "key": "region", "times": 1}
                answer = await fetcher.ask("read", **asked, size_bytes=self._size_bytes)
                if number >= 0:
                    taken[scheme] += answer["seconds"]
        await holder.ask("withdraw", key="region")
        return {scheme: self._share(seconds) for scheme, seconds in taken.items()}

    async def _fabric(
        self, holder: WorkerProcess, fetcher: WorkerProcess, schemes: dict[str, str], folder: Path
    ) -> dict[str, Any]:
        with made(shape_of_size(self._size_bytes), folder) as subject:
            await holder.ask("hold", wanted=wanted_tree(subject, directory=subject.stored))
            taken: dict[str, list[float]] = {scheme: [] for scheme in schemes}
            for number in range(-1, self._repetitions):
                for scheme, address in schemes.items():
                    peers = [("peer", scheme, address)]
                    answer = await fetcher.ask("fetch", wanted=wanted_tree(subject, peers=peers))
                    if number >= 0:
                        taken[scheme].append(answer["resident_s"])
            await holder.ask("drop", version=str(subject.version))
        return {scheme: self._share(seconds) for scheme, seconds in taken.items()}

    def _share(self, seconds: list[float]) -> float:
        # The first burst passes unshaped.
        rate = (self._size_bytes - BURST_BYTES) / median(seconds)
        return round(rate / self._payload_bytes_per_s, 4)
