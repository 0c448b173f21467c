"""A replica's stand-in: starts a VllmEngine and waits to be killed.

Arguments: the model's folder, `starting` or `running`: when to print the engine's process id, and the folder
of an adapter, which a running engine has loaded under the name `killed-` and this process's id.
"""

import asyncio
import multiprocessing
import os
import sys
from pathlib import Path

from loraserve.config import EngineSection, ModelSection
from loraserve.engines.base import AdapterFiles
from loraserve.engines.vllm import VllmEngine
from placement.types import VersionId


async def main() -> None:
    """Print one line with the ids of the engine's processes, then stay."""
    model, when, adapter = sys.argv[1:]
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
    version = VersionId(f"killed-{os.getpid()}@0")
    await engine.load_adapter(AdapterFiles(version_id=version, directory=Path(adapter), rank=8, size_bytes=1))
    print("PIDS", *info.pids, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
