"""A replica's stand-in: starts a VllmEngine and waits to be killed.

Arguments: the model's folder, and `starting` or `running`: when to print the engine's process id.
"""

import asyncio
import multiprocessing
import sys

from loraserve.config import EngineSection, ModelSection
from loraserve.engines.vllm import VllmEngine


async def main() -> None:
    """Print one line with the ids of the engine's processes, then stay."""
    model, when = sys.argv[1:]
    engine = VllmEngine(
        ModelSection(path=model, dtype="float32"),
        EngineSection(
            max_lora_rank=8, adapter_slots=1, max_model_len_tokens=256, kv_cache_bytes=32 * 1024**2
        ),
    )
    start = asyncio.create_task(engine.start())
    if when == "starting":
        while not multiprocessing.active_children():
            await asyncio.wait({start}, timeout=0.005)
        print("PIDS", *(child.pid for child in multiprocessing.active_children()), flush=True)
    info = await start
    print("PIDS", *info.pids, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
