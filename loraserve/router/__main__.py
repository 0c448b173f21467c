"""`python -m loraserve.router`: one router by itself, out of Ray, on uvloop."""

import argparse
import asyncio
import json
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from loraserve.errors import BadInputError
from loraserve.rpc.tuning import tune_grpc

GRACE_S = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM; 2 for bad input."""
    options = _parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    tune_grpc()
    import uvloop

    try:
        uvloop.run(_serve(options))
    except BadInputError as error:
        print(f"loraserve.router: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loraserve.router", description=__doc__)
    parser.add_argument("--controller", required=True, metavar="HOST:PORT", help="the controller's address")
    parser.add_argument("--port", type=int, help="the port to listen at; 0 picks one")
    parser.add_argument("--host", help="the address to listen at")
    parser.add_argument("--router-id", default="router-0", help="this router's name in records")
    parser.add_argument("--cluster", default="default", help="the cluster's name")
    parser.add_argument(
        "--config", type=Path, help="a configuration file, for its [router] and [engine] sections"
    )
    parser.add_argument(
        "--insecure-listen", action="store_true", help="allow a host that is not a loopback address"
    )
    return parser.parse_args(arguments)


async def _serve(options: argparse.Namespace) -> None:
    # gRPC reads its environment when it is imported, so not before `tune_grpc`.
    from loraserve.config import load_config
    from loraserve.router.router import Router

    overrides: dict[str, object] = {
        f"router.{key}": value
        for key, value in (("host", options.host), ("port", options.port))
        if value is not None
    }
    config = load_config(options.config, overrides)
    router = Router(
        config.router,
        router_id=options.router_id,
        controller_address=options.controller,
        cluster_name=options.cluster,
        insecure_listen=options.insecure_listen,
        caches_prefixes=config.engine.caches_prefixes,
    )
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    port = await router.start()
    print(json.dumps({"router_id": options.router_id, "port": port}), flush=True)
    await stop.wait()
    await router.stop(GRACE_S)


if __name__ == "__main__":
    sys.exit(main())
