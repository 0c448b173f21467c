"""Measures the adapter fabric, part by part.

  transports        bytes_per_s, *_share_of_bare, ucx_shm_over_tcp, fabric_bytes_per_s: two processes, 16 and
                    256 MiB, beside the barest loops over ucxx and over sockets, in turn
  shaped            shaped_share: two hosts made of network namespaces; links of 1 Gbit/s, of the same with
                    1 ms in each direction, and of 10 Gbit/s; needs root
  resident          resident_bytes: per replica, in the simulator, on LoRAServe's workloads
  cold_first_token  a request whose adapter (rank 64) comes from a peer first, over a warm one's first token
                    plus the bare transfer's own time; real vLLM on the CPU
  tbt_with_fetch    TBT p95 of requests that decode while an adapter is fetched, loaded and dropped over and
                    over, against the same without; real vLLM on the CPU

Targets: *_share_of_bare 0.9 and more, ucx_shm_over_tcp 3, shaped_share 0.9; cold_first_token 1.3 and less,
tbt_with_fetch 1.1. What cannot be measured here is null, with the reason beside it. The last two are repeated
while other work has more than a tenth of the processors, up to a limit, and keep what was disturbed least:
`*_others_cpu` is the most that it had then.
"""

import argparse
import asyncio
import importlib.util
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_common as common
from fetch_resident import ResidentOptions, measure_resident
from fetch_serving import ServingOptions, measure_first_token, measure_tbt, stage
from fetch_shaped import ShapedOptions, measure_shaped
from fetch_transports import TransportsOptions, measure_transports
from policies_runs import runner

from loraserve.bench.fetch_subject import MIB

PARTS = ("transports", "shaped", "resident", "cold_first_token", "tbt_with_fetch")
QUICK_RESIDENT = ResidentOptions(workloads=("skew",), fleets=((25, 4),), duration_s=120.0, warmup_s=30.0)
QUICK_TRANSPORTS = TransportsOptions(sizes_mib=(16,), rounds=3, transfers=3)
QUICK_SHAPED = ShapedOptions(links=((1, 0.0, 16 * MIB),), repetitions=3)
QUICK_SERVING = ServingOptions(repetitions=10, windows=3, window_s=2.0)


def note(text: str) -> None:
    """What runs now, for people."""
    print(f"fetch: {text}", file=sys.stderr, flush=True)


async def run(parts: tuple[str, ...], quick: bool, engine: str) -> dict[str, Any]:
    """The figures of these parts, one part after the other."""
    figures: dict[str, Any] = {}
    for part in parts:
        if part in ("cold_first_token", "tbt_with_fetch"):
            continue
        note(part)
        with tempfile.TemporaryDirectory(prefix="fetch-") as folder:
            figures |= await _simple(part, quick, Path(folder))
    wanted = [part for part in parts if part in ("cold_first_token", "tbt_with_fetch")]
    if wanted:
        figures |= await _serving(wanted, quick, engine)
    return figures


async def _simple(part: str, quick: bool, folder: Path) -> dict[str, Any]:
    if part == "transports":
        return await measure_transports(QUICK_TRANSPORTS if quick else TransportsOptions(), folder)
    if part == "shaped":
        return await measure_shaped(QUICK_SHAPED if quick else ShapedOptions(), folder)
    with runner(None, note) as simulations:
        return measure_resident(QUICK_RESIDENT if quick else ResidentOptions(), simulations)


async def _serving(parts: list[str], quick: bool, engine: str) -> dict[str, Any]:
    missing = [name for name in ("vllm", "torch") if importlib.util.find_spec(name) is None]
    if engine == "vllm" and missing:
        return dict.fromkeys(parts) | {"serving_skipped": f"no {missing[0]} here"}
    options = replace(QUICK_SERVING if quick else ServingOptions(), engine=engine)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="fetch-") as folder:
        note("the engine starts")
        async with stage(options, Path(folder)) as on:
            if "cold_first_token" in parts:
                note("cold_first_token")
                figures |= await measure_first_token(on, options)
            if "tbt_with_fetch" in parts:
                note("tbt_with_fetch")
                figures |= await measure_tbt(on, options)
    return figures


def show(figures: Mapping[str, Any], indent: str = "") -> None:
    """For people: one figure per line, groups indented; single runs are left to --json."""
    for name, value in figures.items():
        if isinstance(value, Mapping):
            print(f"{indent}{name}")
            show(value, indent + "  ")
        elif not (isinstance(value, list) and value and isinstance(value[0], Mapping)):
            print(f"{indent}{name:32} {value}")


def main() -> None:
    """Run it and print the figures."""
    parser = common.parser("fetch", __doc__, "fewer sizes and repetitions: under two minutes")
    parser.add_argument(
        "--only", action="append", choices=PARTS, metavar="PART", help=f"one of {', '.join(PARTS)}; repeated"
    )
    parser.add_argument("--engine", choices=("vllm", "emulated"), default="vllm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.basicConfig(level=logging.ERROR)
    common.end_in_order_when_told()
    parts = tuple(one for one in PARTS if not options.only or one in options.only)
    began_s = time.perf_counter()
    figures = asyncio.run(run(parts, options.quick, options.engine))
    told = figures | common.conditions(
        "fetch", quick=options.quick, took_s=round(time.perf_counter() - began_s, 1)
    )
    if options.json:
        print(json.dumps(told))
        return
    show(told)


if __name__ == "__main__":
    main()
