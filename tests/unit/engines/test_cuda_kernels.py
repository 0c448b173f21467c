"""The kernels for NVIDIA GPUs as far as a machine without one can tell: numerics, and what they compile to.

Each in a process of its own: Triton decides while it is imported whether to interpret.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("triton") is None,
    reason="torch and triton are not both installed here: pip install triton, which scripts/setup leaves out",
)


def lines_of(module: str, tmp_path: Path, **variables: str) -> list[Mapping[str, str]]:
    """What a module prints, one JSON object per line."""
    done = subprocess.run(
        [sys.executable, "-m", module],
        cwd=ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path), **variables},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_kernels_agree_with_plain_products_at_every_mix_of_ranks(tmp_path: Path) -> None:
    checks = lines_of("tests.support.interpreted_kernels", tmp_path, TRITON_INTERPRET="1")
    wrong = [f"{check['check']}: {check['wrong']}" for check in checks if check["wrong"]]
    assert not wrong, "\n".join(wrong)
    assert len(checks) == 15


def test_kernels_compile_for_gpus_with_16_byte_loads_and_matrix_units(tmp_path: Path) -> None:
    kernels = lines_of("tests.support.compiled_kernels", tmp_path)
    assert len(kernels) == 8
    for kernel in kernels:
        where, ptx = f"{kernel['kernel']} {kernel['on']}", kernel["ptx"]
        assert re.search(r"\bw?g?mma\.", ptx), f"{where}: no matrix units"
        # .cg copies 16 bytes at a time; .ca and plain 16-bit loads are what lost alignment looks like.
        assert "cp.async.cg" in ptx, f"{where}: blocks are not copied ahead"
        narrow = re.findall(r"cp\.async\.ca\S*|ld\.global\S*\.[bu]16", ptx)
        assert not narrow, f"{where}: narrow loads {set(narrow)}"
        if kernel["kernel"] == "expand":
            assert not re.search(r"st\.global\.[bu]16", ptx), f"{where}: narrow stores"
