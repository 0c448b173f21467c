"""The latency model of a vLLM replica: from a profile, or timed on the spot before the cluster starts."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from loraserve.config import Config, config_tree
from loraserve.engines.replica_model.sequence import ReplicaLimits
from loraserve.errors import BadInputError, WorkFailedError
from loraserve.fidelity.options import FidelityOptions
from loraserve.fidelity.setup import limits_of_facts
from loraserve.profiling.files import find_simulatable
from loraserve.profiling.made import engine_facts
from loraserve.profiling.subject import Subject, kv_bytes_per_token
from placement.latency import LatencyModel, RankKernel

TIMEOUT_S = 400.0
END_S = 30.0
TAIL_LINES = 15


def model_from_profile(given: str, config: Config) -> tuple[LatencyModel, str]:
    """A profile's latency model and where it is from; BadInputError for a profile without one or of
    another engine."""
    profile = find_simulatable(given)
    assert profile.latency is not None, "find_simulatable gives none without"
    if profile.engine.kind != config.engine.kind:
        raise BadInputError(
            f"--profile {given}: of a {profile.engine.kind} engine; expected one of {config.engine.kind}"
        )
    return profile.latency, f"profile {profile.name} ({profile.latency_basis})"


def vllm_limits(config: Config) -> ReplicaLimits:
    """What the configured engine holds."""
    size = kv_bytes_per_token(Path(config.model.path), config.model)
    subject = Subject(description="", model=config.model.path, adapters=(), kv_bytes_per_token=size)
    return limits_of_facts(engine_facts(config, subject))


def timed_model(config: Config, options: FidelityOptions, folder: Path) -> tuple[LatencyModel, str]:
    """Time the steps of one replica of this configuration, and fit the model to them.

    In a process of its own: this one is the client of the comparison, which must have no engine's threads.
    WorkFailedError with the end of its output if it fails.
    """
    folder.mkdir(parents=True)
    spec, log = folder / "spec.json", folder / "log"
    ranks, seed = list(options.ranks), options.seed
    spec.write_text(json.dumps({"config": config_tree(config), "ranks": ranks, "seed": seed}))
    command = [sys.executable, "-m", "loraserve.fidelity.time_steps", str(folder)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=dict(os.environ)
        )
        try:
            code = process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise WorkFailedError(f"the steps of one replica were not timed in {TIMEOUT_S:g} s") from None
        finally:
            _end(process)
    if code != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
        raise WorkFailedError(f"the steps of one replica could not be timed: {' / '.join(lines)}")
    told: dict[str, Any] = json.loads((folder / "model.json").read_text())
    return read_model(told["latency"]), str(told["source"])


def model_tree(model: LatencyModel) -> dict[str, Any]:
    """The model in plain values, for `read_model`."""
    return {**dataclasses.asdict(model), "kernel": model.kernel.value}


def read_model(tree: dict[str, Any]) -> LatencyModel:
    """What `model_tree` gave."""
    return LatencyModel(**{**tree, "kernel": RankKernel(tree["kernel"])})


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
