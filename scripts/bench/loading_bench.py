"""Measures how long decoding pauses while adapters of a high rank are loaded and dropped beside it.

Four streams decode with an adapter of rank 8 (hidden 1024, 8 layers, bfloat16); meanwhile another adapter is
loaded, stays for a moment and is dropped, again and again. One engine per execution, one after the other.

  step_ms_<execution>          median gap between two steps of a stream while nothing is loaded
  step_max_ms_<execution>      the longest of them
  loading_step_ms_<execution>  median gap while an adapter is being loaded or dropped
  loading_p99_ms_<execution>   99 of 100 of them are shorter
  loading_max_ms_<execution>   the longest of them
  stall_steps_<execution>      loading_max_ms over step_ms: by how many steps the longest gap is one
  load_ms_<execution>          median time of a load, from its file until requests may name it

Floor of a load on one core: the file's bytes are read and written once, hashed twice, and converted once.
"""

import argparse
import asyncio
import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import bench_common as common

from loraserve.config import EngineSection, LoraExecution, ModelSection
from loraserve.engines.base import AdapterFiles
from loraserve.engines.vllm import VllmEngine
from loraserve.request import GenerationRequest, SamplingParams
from loraserve.samples import build_adapter, build_checkpoint
from placement.types import VersionId

EXECUTIONS: tuple[LoraExecution, ...] = ("rank-true", "stock")
STREAMS = 4
LOW_RANK = 8
MAX_TOKENS = 1000
CALM_S = 3.0
HELD_S = 0.3
AFTER_S = 0.05
STEADY = VersionId("steady@0123456789abcdef")

Gap = tuple[float, float]
"""When a gap ended, and how long it was, in seconds."""


class Streams:
    """Requests that decode until they are told to stop, and the gaps between their steps."""

    def __init__(self, engine: VllmEngine) -> None:
        self._engine = engine
        self.gaps: list[Gap] = []
        self._tasks = [asyncio.create_task(self._run(number)) for number in range(STREAMS)]

    async def _run(self, number: int) -> None:
        request = GenerationRequest(
            request_id=f"stream-{number}",
            prompt="The boat left the harbour before",
            version_id=STEADY,
            sampling=SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True),
        )
        last_s = 0.0
        async for _ in self._engine.generate(request):
            now_s = time.perf_counter()
            if last_s:
                self.gaps.append((now_s, now_s - last_s))
            last_s = now_s

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def measure(
    execution: LoraExecution, model: Path, low: AdapterFiles, high: AdapterFiles, loads: int
) -> dict[str, Any]:
    """The figures of one execution."""
    engine = VllmEngine(
        ModelSection(path=str(model), dtype="bfloat16"),
        EngineSection(
            max_lora_rank=256,
            adapter_slots=3,
            max_num_seqs=STREAMS,
            max_model_len_tokens=MAX_TOKENS + 64,
            max_num_batched_tokens=MAX_TOKENS + 64,
            lora_execution=execution,
        ),
    )
    await engine.start()
    try:
        await engine.load_adapter(low)
        streams = Streams(engine)
        await asyncio.sleep(CALM_S)
        calm_until_s = time.perf_counter()
        changes: list[Gap] = []
        load_s: list[float] = []
        for number in range(loads):
            version = VersionId(f"other-{number}@0123456789abcdef")
            began_s = time.perf_counter()
            await engine.load_adapter(
                AdapterFiles(
                    version_id=version, directory=high.directory, rank=high.rank, size_bytes=high.size_bytes
                )
            )
            load_s.append(time.perf_counter() - began_s)
            await asyncio.sleep(HELD_S)
            changes.append((began_s, began_s + load_s[-1] + AFTER_S))
            began_s = time.perf_counter()
            await engine.unload_adapter(version)
            changes.append((began_s, time.perf_counter() + AFTER_S))
            await asyncio.sleep(HELD_S)
        await streams.stop()
    finally:
        await engine.close()
    return _figures(execution, streams.gaps, calm_until_s, changes, load_s)


def _figures(
    execution: str, gaps: list[Gap], calm_until_s: float, changes: list[Gap], load_s: list[float]
) -> dict[str, Any]:
    # The first second has the prompts in it.
    calm = [gap for end_s, gap in gaps if calm_until_s - CALM_S + 1.0 < end_s < calm_until_s]
    busy = [gap for end_s, gap in gaps if any(begin <= end_s <= end for begin, end in changes)]
    if not calm or not busy:
        raise SystemExit(f"{execution}: the streams ended too early to be measured; use fewer --loads")
    values = {
        "step_ms": median(calm) * 1e3,
        "step_max_ms": max(calm) * 1e3,
        "loading_step_ms": median(busy) * 1e3,
        "loading_p99_ms": quantiles(busy, n=100)[-1] * 1e3,
        "loading_max_ms": max(busy) * 1e3,
        "stall_steps": max(busy) / median(calm),
        "load_ms": median(load_s) * 1e3,
    }
    return {f"{name}_{execution}": round(value, 2) for name, value in values.items()}


async def run(rank: int, loads: int) -> dict[str, Any]:
    """All figures."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="loading-") as folder:
        model = build_checkpoint(Path(folder) / "model", hidden_size=1024, num_layers=8)
        low, high = (
            AdapterFiles(
                version_id=STEADY,
                directory=build_adapter(Path(folder) / f"r{one}", model, rank=one, seed=one),
                rank=one,
                size_bytes=1,
            )
            for one in (LOW_RANK, rank)
        )
        for execution in EXECUTIONS:
            print(f"{execution}: starting an engine", file=sys.stderr)
            figures |= await measure(execution, model, low, high, loads)
    return figures


def _rank(text: str) -> int:
    rank = common.at_least_one(text)
    if rank > 256:
        raise argparse.ArgumentTypeError(f"expected a rank of at most 256, got {text}")
    return rank


def main() -> None:
    """Run it and print the figures."""
    parser = common.parser("loading", __doc__, "three loads instead of eight")
    parser.add_argument("--rank", type=_rank, default=256, help="rank of what is loaded (default 256)")
    parser.add_argument("--loads", type=common.at_least_one, default=8, help="how many (default 8)")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.basicConfig(level=logging.ERROR)
    common.end_in_order_when_told()
    loads = min(options.loads, 3) if options.quick else options.loads
    figures = asyncio.run(run(options.rank, loads))
    if options.json:
        print(json.dumps(figures | common.conditions("loading", rank=options.rank, loads=loads)))
        return
    for name, value in figures.items():
        print(f"{name:28} {value:10.2f}")


if __name__ == "__main__":
    main()
