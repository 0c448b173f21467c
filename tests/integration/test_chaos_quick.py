"""A handful of kills by `scripts/bench/chaos`, on a real cluster under load."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"


def test_every_request_survives_a_handful_of_kills(tmp_path: Path) -> None:
    bench = subprocess.Popen(
        [sys.executable, str(BENCH / "chaos_bench.py"), "--json", "--kills", "4", "--seed", "3"],
        env={**os.environ, "LORASERVE_CACHE_DIR": str(tmp_path)},
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
    found = json.loads(output)
    assert found["kills"] == 4
    assert found["completed"] > 50
    assert {found[key] for key in ("lost", "duplicated", "wrong_adapter")} == {0}
    assert found["ended_unavailable_resumable"] == 0
    assert found["unsettled"] == found["not_recovered"] == []
