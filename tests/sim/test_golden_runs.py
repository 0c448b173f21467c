"""Simulations give what they gave when golden.json was written."""

import json

import pytest

from tests.sim.golden_runs import FILE, outcome_of, scenarios


@pytest.mark.parametrize("name", sorted(scenarios()))
def test_a_golden_run_is_what_it_was(name: str) -> None:
    kept = json.loads(FILE.read_text(encoding="utf-8"))
    assert outcome_of(scenarios()[name]) == kept[name], "if that is meant: scripts/golden, and say why"


def test_every_golden_run_is_kept() -> None:
    assert sorted(json.loads(FILE.read_text(encoding="utf-8"))) == sorted(scenarios())
