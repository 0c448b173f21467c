"""`loraserve down`: end a cluster on this machine."""

import sys
from pathlib import Path

import typer

from loraserve.cli.common import command, echo_json


@command
def down(
    cluster: str = typer.Option(None, help="The cluster's name. [default: default]"),
    config: str = typer.Option(None, help="The TOML configuration it was started with, if any."),
    ray_address: str = typer.Option(
        None, help="Look in this Ray cluster, HOST:PORT or auto, if this machine has forgotten the cluster."
    ),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """End a cluster and every process it started; registered adapters are remembered."""
    from loraserve.cluster.launch import down as stop
    from loraserve.config import load_config

    flags = {"cluster.name": cluster, "cluster.ray_address": ray_address}
    parsed = load_config(
        Path(config) if config else None, {key: value for key, value in flags.items() if value is not None}
    )
    name = parsed.cluster.name
    stopped = stop(
        name,
        parsed.cluster.state_dir,
        ray_address=parsed.cluster.ray_address,
        on_step=lambda text: print(f"  {text}", file=sys.stderr, flush=True),
    )
    if json:
        echo_json({"cluster": name, "was_running": stopped})
    else:
        print(f"cluster {name} is down" if stopped else f"no cluster named {name} was running")
