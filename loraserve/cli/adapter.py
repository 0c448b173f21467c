"""`loraserve adapter add | set | remove | list`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from loraserve.cli.common import command, echo_json, resolve_addresses, run_async
from loraserve.errors import BadInputError

if TYPE_CHECKING:
    from loraserve.client import Client

adapter_app = typer.Typer(help="Register, remove and list adapters.", no_args_is_help=True)

CLUSTER = typer.Option("default", help="The cluster's name on this machine.")
ADDRESS = typer.Option(None, help="A router's HOST:PORT, instead of --cluster; may be repeated.")
JSON = typer.Option(False, "--json", help="Print one JSON object.")
WEIGHT = typer.Option(
    None,
    min=0.0,
    help="How many times its tokens count for the placement; 1 at first. Policy optimal weighs it.",
)
TTFT = typer.Option(
    None, "--slo-ttft-ms", min=0.0, help="Its own target for the first token; 0: the cluster's, slo.ttft_ms."
)
TBT = typer.Option(
    None, "--slo-tbt-ms", min=0.0, help="Its own target between two tokens; 0: the cluster's, slo.tbt_ms."
)
REGISTER_TIMEOUT_S = 900.0


def _client(address: list[str] | None, cluster: str) -> "Client":
    from loraserve.client import Client

    return Client(resolve_addresses(address, cluster))


@adapter_app.command("add")
@command
def add(
    name: str = typer.Argument(help="The name that requests will use."),
    source: str = typer.Argument(help="A PEFT folder, file:// URL, Hugging Face id or allowed URL."),
    replace: bool = typer.Option(False, "--replace", help="Replace the weights of a registered name."),
    weight: float | None = WEIGHT,
    slo_ttft_ms: float | None = TTFT,
    slo_tbt_ms: float | None = TBT,
    cluster: str = CLUSTER,
    address: list[str] = ADDRESS,
    json: bool = JSON,
) -> None:
    """Register an adapter; returns once a replica has loaded it and requests may name it."""

    async def run() -> Any:
        async with _client(address, cluster) as client:
            return await client.register_adapter(
                name,
                _absolute(source),
                replace=replace,
                weight=weight,
                slo_ttft_ms=slo_ttft_ms,
                slo_tbt_ms=slo_tbt_ms,
            )

    info = run_async(run)
    if json:
        echo_json(info)
    else:
        holders = ", ".join(holder.replica_id for holder in info.holders)
        print(f"{info.name}: rank {info.rank}, {info.size_bytes:,} bytes, {info.version}, on {holders}")


@adapter_app.command("set")
@command
def set_terms(
    name: str = typer.Argument(help="The adapter's name."),
    weight: float | None = WEIGHT,
    slo_ttft_ms: float | None = TTFT,
    slo_tbt_ms: float | None = TBT,
    cluster: str = CLUSTER,
    address: list[str] = ADDRESS,
    json: bool = JSON,
) -> None:
    """Change an adapter's weight and targets; what is not given stays."""
    if weight is slo_ttft_ms is slo_tbt_ms is None:
        raise BadInputError("nothing to set; expected --weight, --slo-ttft-ms or --slo-tbt-ms")

    async def run() -> Any:
        async with _client(address, cluster) as client:
            return await client.set_adapter(
                name, weight=weight, slo_ttft_ms=slo_ttft_ms, slo_tbt_ms=slo_tbt_ms
            )

    info = run_async(run)
    if json:
        echo_json(info)
    else:
        targets = f"TTFT {info.slo_ttft_ms:g} ms, TBT {info.slo_tbt_ms:g} ms"
        print(f"{info.name}: weight {info.weight:g}, {targets}{'' if info.has_own_slo else ', as usual'}")


@adapter_app.command("remove")
@command
def remove(
    name: str = typer.Argument(help="The adapter's name."),
    cluster: str = CLUSTER,
    address: list[str] = ADDRESS,
    json: bool = JSON,
) -> None:
    """Take an adapter out of service; its running requests end first."""

    async def run() -> int:
        async with _client(address, cluster) as client:
            return await client.remove_adapter(name)

    table_version = run_async(run)
    if json:
        echo_json({"name": name, "table_version": table_version})
    else:
        print(f"{name} is removed")


@adapter_app.command("list")
@command
def list_adapters(cluster: str = CLUSTER, address: list[str] = ADDRESS, json: bool = JSON) -> None:
    """List the registered adapters and their holders."""

    async def run() -> Any:
        async with _client(address, cluster) as client:
            return await client.list_adapters()

    adapters = run_async(run)
    if json:
        echo_json({"adapters": adapters})
        return
    from loraserve.cli.tables import adapter_table, show

    show(adapter_table(adapters))


def _absolute(source: str) -> str:
    """A local path as the controller must see it; anything else as it is."""
    local = source.startswith((".", "/", "~")) or Path(source).is_dir()
    return str(Path(source).expanduser().absolute()) if local else source
