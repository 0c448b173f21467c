"""Experiments give what they gave when golden_experiments.json was written."""

import json

import pytest

from tests.sim.golden_experiments import FILE, jobs, kept_of


@pytest.mark.parametrize("name", sorted(jobs()))
def test_a_golden_job_finds_what_it_found(name: str) -> None:
    kept = json.loads(FILE.read_text(encoding="utf-8"))
    assert kept_of(jobs()[name]) == kept[name], "if that is meant: scripts/golden, and say why"


def test_every_golden_job_is_kept() -> None:
    assert sorted(json.loads(FILE.read_text(encoding="utf-8"))) == sorted(jobs())
