"""`loraserve fidelity` on a live cluster of emulated replicas; says nothing of how close the figures are."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loraserve.fidelity.figures import KINDS
from loraserve.samples import SampleSet
from traces.records import Outcome, read_records

pytestmark = pytest.mark.ray

ARGUMENTS = ("--duration", "3", "--loads", "0.4", "--fit-load", "0.5", "--ranks", "8,32", "--json")


def test_both_sides_serve_the_same_requests_and_the_report_is_complete(
    tmp_path: Path, samples: SampleSet
) -> None:
    out = tmp_path / "out"
    temporary = tmp_path / "t"
    temporary.mkdir()
    command = [sys.executable, "-m", "loraserve.cli.main", "fidelity", *ARGUMENTS]
    done = subprocess.run(
        [*command, "--model", str(samples.model), "--out", str(out)],
        env={**os.environ, "TMPDIR": str(temporary), "LORASERVE_CACHE_DIR": str(tmp_path / "cache")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout)
    assert report["saturation"]["requests_per_s"] > 0
    assert report["fit"]["overheads"]["step_factor"] > 0
    (scored,) = report["scored"]
    for load, name in ((report["fitted"], "fit-0.5"), (scored, "load-0.4")):
        assert load["figures"].keys() == KINDS.keys()
        assert load["processors"]["busy"].keys() == {
            *("client", "controller", "others", "ray", "replicas", "router")
        }
        live, simulated = (read_records(out / f"{name}-{side}.jsonl") for side in ("live", "simulated"))
        assert len(live) == load["requests"] > 0
        for one, other in zip(live, simulated, strict=True):
            assert one.outcome is other.outcome is Outcome.OK, (one.status, other.status)
            assert (one.index, one.adapter, one.rank) == (other.index, other.adapter, other.rank)
            assert one.scheduled_s == pytest.approx(other.scheduled_s)
            assert (one.prompt_tokens, one.output_tokens) == (other.prompt_tokens, other.output_tokens)
            assert {one.replica_id, other.replica_id} <= {"replica-0", "replica-1"}
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert list(temporary.iterdir()) == [], "its files are gone"
    assert processes_naming(temporary) == [], "and so is its cluster"


def processes_naming(folder: Path) -> list[str]:
    """The command lines of processes that name a folder, as a cluster's head does."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and str(folder).encode() in (line := (entry / "cmdline").read_bytes()):
                found.append(line.decode(errors="replace"))
    return found
