"""`python -m loraserve.fidelity.time_steps FOLDER`: times one replica by FOLDER/spec.json, and writes its
latency model to FOLDER/model.json. Started by `loraserve.fidelity.profiled`."""

import asyncio
import json
import logging
import signal
import sys
from pathlib import Path
from typing import Any

from loraserve.config import Config, LoraExecution, parse_config
from loraserve.fidelity.profiled import model_tree
from loraserve.profiling.fit import Fitted, Recommendation
from loraserve.profiling.run import Effort, Measured, ProfileOptions, Progress, run_profile
from loraserve.profiling.subject import Subject, prepare
from placement.latency import RankKernel
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
    chosen = known_kernel(measured.recommendation, config.engine.lora_execution)
    source = (
        f"fitted to {chosen.fit.steps} steps of one replica, timed before the cluster started; kernel "
        f"{chosen.fit.kernel.value}, which is what {config.engine.lora_execution} execution does; median "
        f"error {chosen.fit.median_relative_error:.1%}"
    )
    (folder / "model.json").write_text(json.dumps({"latency": model_tree(chosen.model), "source": source}))


def known_kernel(recommendation: Recommendation, execution: LoraExecution) -> Fitted:
    """The fit with the kernel that this execution has: noise may favour another one, and a model with the
    wrong kernel is wrong for other batches than those timed."""
    kernel = RankKernel.SUM if execution == "rank-true" else RankKernel.PADDED_CONFIG
    return next(one for one in recommendation.fits if one.fit.kernel is kernel)


async def _run(config: Config, subject: Subject, options: ProfileOptions) -> Measured:
    return await run_profile(config, subject, options, Progress())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
