"""`loraserve bench rank` on the real engine, with a model that is as small as can be."""

import json
from pathlib import Path

import pytest

from tests.support.cli import run_cli

pytestmark = pytest.mark.slow


async def test_a_quick_run_prints_its_figures_and_writes_its_records(tmp_path: Path) -> None:
    sizes = ("--hidden", "128", "--layers", "1", "--rank", "8", "--rank", "16")
    ran = await run_cli(
        "bench", "rank", "--quick", "--mode", "rank-true", *sizes, "--json", "--out", str(tmp_path)
    )
    assert ran.exit_code == 0, ran.stderr
    told = ran.json()
    rows = told["medians_ms"]["rank-true"]
    batches = ("base", "r8", "r16", "mixed", "low_part", "high_part")
    assert set(rows) == {f"{kind}_{batch}" for kind in ("prefill", "decode") for batch in batches}
    assert all(0 < one["p25_ms"] <= one["median_ms"] <= one["p75_ms"] for one in rows.values())
    # Every figure is there, and empty where the mode that it compares with did not run.
    assert told["prefill_ratio_r8"] is told["decode_over_no_lora_r16"] is None
    assert sorted(Path(file).name for file in told["files"]) == ["rank.json", "rank.png", "rank.svg"]
    records = json.loads((tmp_path / "rank.json").read_text())
    assert len(records["engines"][0]["rows"]) == len(rows)
