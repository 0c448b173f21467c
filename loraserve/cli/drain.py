"""`loraserve drain` and `loraserve undrain`: take replicas out in order, and bring them back."""

import sys
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING

import typer

from loraserve.cli.common import command, echo_json, resolve_addresses, run_async
from loraserve.errors import BadInputError

if TYPE_CHECKING:
    from loraserve.client import Client
    from loraserve.client_types import DrainStatus

REPLICAS = typer.Argument(None, help="The replicas, such as replica-0.")
NODE = typer.Option("", help="All replicas of this node, instead of naming them.")
CLUSTER = typer.Option("default", help="The cluster's name on this machine.")
ADDRESS = typer.Option(None, help="A router's HOST:PORT, instead of --cluster; may be repeated.")
JSON = typer.Option(False, "--json", help="Print one JSON object at the end.")


@command
def drain(
    replicas: list[str] = REPLICAS,
    node: str = NODE,
    deadline: float = typer.Option(
        None, metavar="SECONDS", help="What running work gets before it goes on elsewhere. [default: 30]"
    ),
    force: bool = typer.Option(
        False, "--force", help="Go on although adapters without another home, or the last replica, are lost."
    ),
    cluster: str = CLUSTER,
    address: list[str] = ADDRESS,
    json: bool = JSON,
) -> None:
    """Drain replicas: what only they hold is copied, running work ends or goes on elsewhere, they end.

    They stay down until `loraserve undrain`, or until the next `loraserve up`.
    """
    _refuse_unnamed(replicas, node)
    _follow(
        lambda client: client.drain(replicas or (), node=node, deadline_s=deadline, force=force),
        (cluster, address),
        json=json,
    )


@command
def undrain(
    replicas: list[str] = REPLICAS,
    node: str = NODE,
    cluster: str = CLUSTER,
    address: list[str] = ADDRESS,
    json: bool = JSON,
) -> None:
    """Bring drained replicas back; returns when they are ready. Starts failed ones again, too."""
    _refuse_unnamed(replicas, node)
    _follow(lambda client: client.undrain(replicas or (), node=node), (cluster, address), json=json)


def _refuse_unnamed(replicas: list[str] | None, node: str) -> None:
    if bool(replicas) == bool(node):
        raise BadInputError("name the replicas, or a node by --node NODE")


def _follow(
    begin: "Callable[[Client], AsyncGenerator[tuple[DrainStatus, ...], None]]",
    where: tuple[str, list[str] | None],
    *,
    json: bool,
) -> None:
    """Show each news on stderr, and how it ended on stdout."""
    from loraserve.client import Client

    cluster, address = where

    async def run() -> "tuple[DrainStatus, ...]":
        last: tuple[DrainStatus, ...] = ()
        async with Client(resolve_addresses(address, cluster)) as client:
            async for statuses in begin(client):
                for status in statuses:
                    if status not in last:
                        print(f"  {_line(status)}", file=sys.stderr, flush=True)
                last = statuses
        return last

    ended = run_async(run)
    if json:
        echo_json({"replicas": ended})
    else:
        print("; ".join(f"{one.replica_id} is {one.state}" for one in ended))


def _line(status: "DrainStatus") -> str:
    parts = [f"{status.replica_id} is {status.state}"]
    if status.waiting_for:
        parts.append(f"copying {', '.join(status.waiting_for)}")
    if status.running:
        parts.append(f"{status.running} requests run")
    if status.moved:
        parts.append(f"{status.moved} requests moved")
    if status.reason:
        parts.append(status.reason)
    return ", ".join(parts)
