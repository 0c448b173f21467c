"""`loraserve status`: the cluster at a glance."""

from typing import Any

import typer

from loraserve.cli.common import command, echo_json, resolve_addresses, run_async

ADDRESS = typer.Option(None, help="A router's HOST:PORT, instead of --cluster; may be repeated.")


@command
def status(
    cluster: str = typer.Option("default", help="The cluster's name on this machine."),
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
        echo_json(state)
        return
    from loraserve.cli.tables import adapter_table, replica_table, show

    print(f"cluster {state.cluster}: policy {state.policy}, routing table {state.table_version}")
    if not state.controller_reachable:
        print("the controller is away; this is the router's last table")
    for problem in state.problems:
        print(f"problem: {problem}")
    show(replica_table(state.replicas))
    show(adapter_table(state.adapters))
    counters = state.router
    print(
        f"{counters.router_id}: {counters.requests} requests, {counters.completed} completed,"
        f" {counters.failed} failed, {counters.refused} refused, {counters.cancelled} cancelled,"
        f" {counters.in_flight} in flight, {counters.failovers} failovers;"
        f" {counters.picks} replicas picked for clients"
    )
