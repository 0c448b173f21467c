"""A handful of kills by `scripts/bench/chaos`, on a real cluster under load; once while plans change."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"


MAX_PAUSE_S = 10.0
"""Far more than any fetch takes here, and less than a request that hangs."""


def test_every_request_survives_a_handful_of_kills(tmp_path: Path) -> None:
    found = run_bench(tmp_path, "--kills", "4", "--seed", "3")
    assert found["kills"] == 4
    assert found["completed"] > 50


def test_every_request_survives_a_new_plan_each_second_and_a_kill(tmp_path: Path) -> None:
    """The plans fill every replica, so that adapters change places with each other."""
    found = run_bench(tmp_path, "--kills", "1", "--seed", "5", "--calm", "8", "--rebalance-every", "1")
    assert found["kills"] == 1
    assert found["plans_applied"] >= 5
    assert found["planned_bytes_moved"] > 0
    assert found["completed"] > 50
    assert found["longest_pause_s"] < MAX_PAUSE_S


def run_bench(folder: Path, *arguments: str) -> dict[str, Any]:
    """What it found; no request may have been lost, repeated or answered by another adapter."""
    bench = subprocess.Popen(
        [sys.executable, str(BENCH / "chaos_bench.py"), "--json", *arguments],
        env={**os.environ, "LORASERVE_CACHE_DIR": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = bench.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        # Told to end, it takes its cluster down; killed, it would leave it to the tests that follow.
        bench.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            bench.communicate(timeout=60)
        bench.kill()
        raise
    assert bench.returncode == 0, f"{output[-4000:]}\n{errors[-4000:]}"
    found: dict[str, Any] = json.loads(output)
    assert {found[key] for key in ("lost", "duplicated", "wrong_adapter")} == {0}
    assert found["ended_unavailable_resumable"] == 0
    assert found["unsettled"] == found["not_recovered"] == []
    return found
