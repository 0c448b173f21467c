"""`python -m loraserve.fidelity.time_steps FOLDER`: times one replica by FOLDER/spec.json, and writes its
latency model to FOLDER/model.json. Started by `loraserve.fidelity.profiled`."""

import asyncio
import json
import logging
import signal
import sys
from pathlib import Path
from typing import Any

from loraserve.config import Config, parse_config
from loraserve.fidelity.profiled import model_tree
from loraserve.profiling.run import Effort, Measured, ProfileOptions, Progress, run_profile
from loraserve.profiling.subject import Subject, prepare
from placement.profile import Slo

STEPS_ONLY = Effort(
    repetitions=4, batches_s=45.0, decode_steps=12, step_limit_s=2.0, probe_s=1.0, limit_s=2.0, max_probes=1
)
"""Batches are timed, loads only touched: nobody asks for operating points here."""

_PROMPT_TOKENS, _OUTPUT_TOKENS = 64, 16


def main(folder: Path) -> None:
    """Measure and write."""
    logging.disable(logging.WARNING)
    spec: dict[str, Any] = json.loads((folder / "spec.json").read_text())
    config, seed = parse_config(spec["config"]), int(spec["seed"])
    subject = prepare(config, spec["ranks"], (), folder, seed=seed)
    options = ProfileOptions(
        slo=Slo(ttft_ms=config.slo.ttft_ms, tbt_ms=config.slo.tbt_ms),
        prompt_tokens=_PROMPT_TOKENS,
        output_tokens=_OUTPUT_TOKENS,
        effort=STEPS_ONLY,
        quick=True,
        seed=seed,
    )

    async def measure() -> Measured:
        task: asyncio.Task[Measured] = asyncio.ensure_future(_run(config, subject, options))
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        return await task

    measured = asyncio.run(measure())
    best, how_sure = measured.recommendation.best, measured.recommendation.how_sure
    source = (
        f"fitted to {best.fit.steps} steps of one replica, timed before the cluster started: {how_sure}; "
        f"median error {best.fit.median_relative_error:.1%}"
    )
    (folder / "model.json").write_text(json.dumps({"latency": model_tree(best.model), "source": source}))


async def _run(config: Config, subject: Subject, options: ProfileOptions) -> Measured:
    return await run_profile(config, subject, options, Progress())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
