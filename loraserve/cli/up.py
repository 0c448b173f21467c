"""`loraserve up`: start a cluster on this machine, or in a Ray cluster."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from loraserve.cli.common import command, echo_json

if TYPE_CHECKING:
    from loraserve.cluster.state import RunningCluster


@command
def up(
    config: str = typer.Option(None, help="A TOML configuration; the flags below override it."),
    cluster: str = typer.Option(None, help="The cluster's name on this machine. [default: default]"),
    model: str = typer.Option(None, help="The base model: a local folder or a Hugging Face id."),
    engine: str = typer.Option(None, help="vllm or emulated. [default: vllm]"),
    replicas: int = typer.Option(None, help="How many replicas. [default: 2]"),
    port: int = typer.Option(None, help="The router's port; 0 picks one. [default: 50051]"),
    host: str = typer.Option(None, help="The address to listen at. [default: 127.0.0.1]"),
    policy: str = typer.Option(None, help="The placement policy. [default: least-loaded]"),
    profile: str = typer.Option(
        None, help="What a replica can do: a shipped profile's name, or a file of `loraserve profile`."
    ),
    max_lora_rank: str = typer.Option(
        None, help="The highest rank a replica takes, or auto: by what is registered. [default: 128]"
    ),
    adapter_slots: str = typer.Option(
        None, help="Different adapters in one batch, or auto: by engine.slot_bytes. [default: 8]"
    ),
    pool_adapters: int = typer.Option(
        None, help="Adapters that a replica holds. [default: as many as engine.pool_bytes holds]"
    ),
    dtype: str = typer.Option(None, help="auto, float32, bfloat16 or float16. [default: auto]"),
    ray_address: str = typer.Option(
        None, help="A Ray cluster to run in, HOST:PORT or auto. [default: one of its own]"
    ),
    foreground: bool = typer.Option(
        False, "--foreground", help="Stay until the cluster ends; Ctrl-C or SIGTERM end it."
    ),
    fresh: bool = typer.Option(False, "--fresh", help="Forget the adapters of this cluster's last run."),
    insecure_listen: bool = typer.Option(
        False, "--insecure-listen", help="Allow a --host other than loopback: there is no encryption."
    ),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Start a cluster: Ray, the controller, the replicas and the router; returns when it serves."""
    from loraserve.cluster.launch import up as start
    from loraserve.config import load_config
    from loraserve.errors import ClusterStartError

    flags: dict[str, object] = {
        "cluster.name": cluster,
        "cluster.replicas": replicas,
        "cluster.ray_address": ray_address,
        "model.path": _model_path(model),
        "model.dtype": dtype,
        "engine.kind": engine,
        "engine.max_lora_rank": _number(max_lora_rank),
        "engine.adapter_slots": _number(adapter_slots),
        "engine.pool_adapters": pool_adapters,
        "router.port": port,
        "router.host": host,
        "placement.policy": policy,
        "placement.profile": _file_path(profile),
    }
    parsed = load_config(
        Path(config) if config else None, {key: value for key, value in flags.items() if value is not None}
    )
    begun_s = time.monotonic()

    def on_step(text: str) -> None:
        print(f"  {time.monotonic() - begun_s:5.1f} s  {text}", file=sys.stderr, flush=True)

    def show(running: "RunningCluster") -> None:
        _show(running, time.monotonic() - begun_s, json=json)

    try:
        running = start(
            parsed,
            fresh=fresh,
            insecure_listen=insecure_listen,
            on_step=on_step,
            hold=show if foreground else None,
        )
    except ClusterStartError as error:
        if error.log_tail:
            print(error.log_tail, file=sys.stderr)
        raise
    if foreground:
        print(f"cluster {running.name} is down", file=sys.stderr)
    else:
        show(running)


def _show(running: "RunningCluster", ready_s: float, *, json: bool) -> None:
    if json:
        echo_json(
            {
                "cluster": running.name,
                "routers": running.router_addresses,
                "controller": running.controller_address,
                "head_pid": running.head_pid,
                "ready_s": round(ready_s, 3),
            }
        )
    else:
        routers = ", ".join(running.router_addresses)
        print(f"cluster {running.name} serves at {routers} (ready after {ready_s:.1f} s)", flush=True)


def _number(value: str | None) -> int | str | None:
    """What a TOML file would hold: a number, or a word, which is refused there unless it is auto."""
    return int(value) if value is not None and value.isascii() and value.isdigit() else value


def _file_path(profile: str | None) -> str | None:
    """A file as an absolute path, so that every process means the same one."""
    return str(Path(profile).resolve()) if profile and Path(profile).is_file() else profile


def _model_path(model: str | None) -> str | None:
    """A folder as an absolute path, so that every process means the same one."""
    if model is None:
        return None
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.is_dir() or model.startswith((".", "/", "~")) else model
