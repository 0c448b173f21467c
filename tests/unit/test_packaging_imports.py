"""The command line starts without the heavy packages."""

import subprocess
import sys

import pytest

# What `loraserve --help` must not pay for.
HEAVY = ("ray", "grpc", "torch", "vllm", "numpy", "scipy", "matplotlib", "google.protobuf", "huggingface_hub")

PROGRAM = """
import sys
from loraserve.cli.main import run
sys.argv = ["loraserve", *{arguments!r}]
try:
    run()
except SystemExit as done:
    assert done.code in (0, None), done.code
print("loaded:", *sorted(sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        *([name, "--help"] for name in ("up", "down", "status", "adapter", "generate", "replay", "doctor")),
    ],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(arguments=arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    loaded = set(done.stderr.rpartition("loaded: ")[2].split())
    assert "loraserve.cli.main" in loaded
    assert loaded.isdisjoint(HEAVY), sorted(loaded.intersection(HEAVY))
