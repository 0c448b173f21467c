"""`loraserve status` and `loraserve top`: the cluster at a glance, once or again and again."""

import math
from typing import TYPE_CHECKING, Any

import typer

from loraserve.cli.common import command, echo_json, plain, resolve_addresses, run_async
from loraserve.errors import BadInputError, LoraServeError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from loraserve.client_types import ClusterStatus

CLUSTER = typer.Option("default", help="The cluster's name on this machine.")
ADDRESS = typer.Option(None, help="A router's HOST:PORT, instead of --cluster; may be repeated.")
MIN_INTERVAL_S = 0.1
MAX_INTERVAL_S = 3600.0


@command
def status(
    cluster: str = CLUSTER,
    address: list[str] = ADDRESS,
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Show replicas, adapters and the router's counters."""
    from loraserve.client import Client

    async def run() -> Any:
        async with Client(resolve_addresses(address, cluster)) as client:
            return await client.status()

    state = run_async(run)
    if json:
        echo_json(_tree(state))
        return
    _print(state)


def _tree(state: "ClusterStatus") -> dict[str, Any]:
    from placement.plans.skew import FORMULA

    skew = {"total": state.skew.total, **plain(state.skew), "formula": FORMULA}
    return {**plain(state), "skew": skew}


@command
def top(
    cluster: str = CLUSTER,
    address: list[str] = ADDRESS,
    interval: float = typer.Option(1.0, metavar="SECONDS", help="How often to look."),
    once: bool = typer.Option(False, "--once", help="Look once and exit."),
    json: bool = typer.Option(
        False, "--json", help="Print one JSON object per look: status's with time_s, or time_s and problem."
    ),
) -> None:
    """Show what `status` shows, refreshed until Ctrl-C; while the cluster is away, the last of it."""
    if not (math.isfinite(interval) and MIN_INTERVAL_S <= interval <= MAX_INTERVAL_S):
        raise BadInputError(
            f"--interval: {interval:g}; expected seconds from {MIN_INTERVAL_S:g} to {MAX_INTERVAL_S:g}"
        )
    addresses = resolve_addresses(address, cluster)
    if json:
        run_async(lambda: _stream(addresses, interval, once=once))
    else:
        run_async(lambda: _watch(addresses, interval, once=once))


async def _stream(addresses: tuple[str, ...], interval_s: float, *, once: bool) -> None:
    """One line per look; a look that fails says why in a line of its own, the first one as an error."""
    import asyncio
    import time

    from loraserve.client import Client

    async with Client(addresses) as client:
        tree = _tree(await client.status())
        while True:
            echo_json({"time_s": time.time(), **tree})
            if once:
                return
            await asyncio.sleep(interval_s)
            try:
                tree = _tree(await client.status())
            except LoraServeError as error:
                tree = {"problem": str(error)}


async def _watch(addresses: tuple[str, ...], interval_s: float, *, once: bool) -> None:
    import asyncio

    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from loraserve.client import Client

    async with Client(addresses) as client:
        state = await client.status()
        if once:
            _print(state)
            return
        with Live(Group(*_parts(state)), auto_refresh=False, screen=True) as live:
            while True:
                await asyncio.sleep(interval_s)
                problem = ""
                try:
                    state = await client.status()
                except LoraServeError as error:
                    problem = f"no answer: {error}"
                live.update(Group(*_parts(state), Text(problem)), refresh=True)


def _print(state: "ClusterStatus") -> None:
    from loraserve.cli.tables import show

    for part in _parts(state):
        show(part)


def _parts(state: "ClusterStatus") -> "list[RenderableType]":
    """What is shown, from the top down."""
    from rich.text import Text

    from loraserve.cli.tables import adapter_table, fabric_line, replica_table
    from placement.plans.skew import FORMULA

    frozen = ", plan frozen" if state.plan_frozen else ""
    lines = [f"cluster {state.cluster}: policy {state.policy}, routing table {state.table_version}{frozen}"]
    if not state.controller_reachable:
        lines.append("the controller is away; this is the router's last table")
    lines += [f"problem: {problem}" for problem in state.problems]
    skew = state.skew
    lines.append(f"skew {skew.total:.2f} = {skew.load:.2f} (load) x {skew.rank:.2f} (rank); {FORMULA}")
    counters = state.router
    last = (
        f"{counters.router_id}: {counters.requests} requests, {counters.completed} completed,"
        f" {counters.failed} failed, {counters.refused} refused, {counters.cancelled} cancelled,"
        f" {counters.in_flight} in flight, {counters.failovers} failovers;"
        f" {counters.picks} replicas picked for clients"
    )
    return [
        Text("\n".join(lines)),
        replica_table(state.replicas),
        adapter_table(state.adapters),
        Text("\n".join(filter(None, (fabric_line(state.replicas), last)))),
    ]
