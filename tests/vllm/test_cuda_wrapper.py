"""The GPU wrapper under vLLM's own metadata, its kernels interpreted on the CPU, in a process of its own."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed here: pip install triton, which scripts/setup leaves out",
)
def test_the_wrapper_computes_every_kind_of_layer_at_the_slots_ranks(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.interpreted_wrapper"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    checks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    wrong = [f"{check['check']}: {check['wrong']}" for check in checks if check["wrong"]]
    assert not wrong, "\n".join(wrong)
    assert len(checks) == 7
