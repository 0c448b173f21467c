"""`loraserve down`: end a cluster on this machine."""

import sys
from pathlib import Path

import typer

from loraserve.cli.common import command, echo_json


@command
def down(
    cluster: str = typer.Option(None, help="The cluster's name. [default: default]"),
    config: str = typer.Option(None, help="The TOML configuration it was started with, if any."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """End a cluster and every process it started; registered adapters are remembered."""
    from loraserve.cluster.launch import down as stop
    from loraserve.config import load_config

    parsed = load_config(
        Path(config) if config else None, {} if cluster is None else {"cluster.name": cluster}
    )
    name = parsed.cluster.name
    stopped = stop(
        name, parsed.cluster.state_dir, on_step=lambda text: print(f"  {text}", file=sys.stderr, flush=True)
    )
    if json:
        echo_json({"cluster": name, "was_running": stopped})
    else:
        print(f"cluster {name} is down" if stopped else f"no cluster named {name} was running")
