"""Two placement policies on the emulated cluster by `scripts/bench/policies --live`; no figure is judged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "policies_bench.py"
CONTENDERS = ("optimal", "loraserve")
ARGUMENTS = (
    *("--live", "--policy", ",".join(CONTENDERS), "--rates", "12", "--seeds", "0"),
    *("--duration", "6", "--warmup", "1", "--epoch", "2", "--attempts", "1", "--json"),
)


def test_two_policies_serve_the_same_slide_live_and_simulated(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH), *ARGUMENTS, "--out", str(tmp_path / "out")],
        env={**os.environ, "LORASERVE_CACHE_DIR": str(tmp_path / "cache")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)["fleets"]["padded_batch"]["slide"]
    live, simulated = found["runs"], found["simulated"]
    assert [one["contender"] for one in live] == list(CONTENDERS)
    # Whoever places and routes, the requests are the same, and none is lost while copies move.
    assert [one["requests"] for one in live] == [one["requests"] for one in simulated]
    assert live[0]["requests"] == live[1]["requests"] > 50
    assert [one["failed"] for one in live] == [0, 0]
    for one in live:
        assert 0 < one["ttft_p50_ms"] <= one["ttft_p95_ms"] <= one["ttft_p99_ms"]
        assert one["resident_bytes"] > 0
    # A run that was cut off would go on from these.
    kept = [json.loads(path.read_text()) for path in (tmp_path / "out" / "live").iterdir()]
    assert sorted(one["outcome"]["contender"] for one in kept) == sorted(CONTENDERS)
    # Pools of several replicas against one copy, or a few, of each adapter.
    assert live[0]["resident_bytes"] > live[1]["resident_bytes"]
