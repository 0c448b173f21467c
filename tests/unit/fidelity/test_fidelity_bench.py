"""What `scripts/bench/simulator --fidelity` makes of the command's JSON object."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from simulator_fidelity import summary

from loraserve.cli.fidelity_output import print_json, print_tables, write_files
from loraserve.fidelity.report import FidelityReport
from loraserve.fidelity.run import run_fidelity
from loraserve.fidelity.simulated import Overheads
from tests.support.fidelity_kit import SHORT, SimulatedLive, subject_for


async def report() -> FidelityReport:
    """A short comparison that misses: the subject is thought to take twice as many rows as it does."""
    options = replace(SHORT, draws=1, loads=(0.9,))
    subject = subject_for(options)
    limits = type(subject.limits)(kv_blocks=1000, max_num_seqs=2)
    live = SimulatedLive(subject_for(options, limits=limits), Overheads())
    return await run_fidelity(live, subject, options, "the test's", lambda text: None)


async def test_the_output_is_complete_and_its_worst_errors_are_the_benchmarks(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    made = await report()
    files = write_files(made, tmp_path)
    assert {path.name for path in files} == {
        f"{name}{end}"
        for name in ("fit-0.7", "load-0.9")
        for end in ("-live.jsonl", "-simulated.jsonl", ".png")
    }
    print_json(made, files)
    told = json.loads(capsys.readouterr().out)
    short = summary(told)
    assert short["met"] is False
    assert short["worst_error"]["ttft_p95_ms"] == pytest.approx(made.worst()["ttft_p95_ms"], abs=1e-3)
    assert short["missed"]
    assert short["fit_is_void"] is False
    assert all(line.endswith("at load 0.9") for line in short["missed"])
    assert short["step_factor"] == pytest.approx(made.fit.overheads.step_factor, abs=1e-3)
    print_tables(made, files)
    people = capsys.readouterr().out
    assert "scored on load 0.9" in people
    assert "MISSED" in people
    assert "fitted: step times x" in people
    assert "worst errors: requests/s" in people
