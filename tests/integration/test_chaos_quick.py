"""A handful of kills by `scripts/bench/chaos`, on a real cluster under load."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"


def test_every_request_survives_a_handful_of_kills(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH / "chaos_bench.py"), "--json", "--kills", "4", "--seed", "3"],
        env={**os.environ, "LORASERVE_CACHE_DIR": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    found = json.loads(done.stdout)
    assert found["kills"] == 4
    assert found["completed"] > 50
    assert {found[key] for key in ("lost", "duplicated", "wrong_adapter")} == {0}
    assert found["unsettled"] == found["not_recovered"] == []
