"""A result's files hold all of it, the same bytes for the same result."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from loraserve.engines.replica_model.log import ReplicaLog
from loraserve.errors import BadInputError
from loraserve.simulator.figures import Judging, metrics_of
from loraserve.simulator.result import SimulationResult
from loraserve.simulator.result_files import TIMING, read_result, write_result
from tests.support.made_results import result_of
from tests.support.made_runs import MadeRun, MadeStretch, steps_of
from traces.columns import TraceAdapter
from traces.records import Outcome


def result(*, wall_s: float = 0.5) -> SimulationResult:
    made = MadeRun(
        replicas=[steps_of([(3, 10, 2, 0)]), steps_of([]), steps_of([(4, 50, 0, 5), (1, 9, 0, 0)])],
        adapters=(
            TraceAdapter(name="ü 1", rank=8),
            TraceAdapter(name="b"),
            TraceAdapter(name="idle", rank=4),
        ),
    )
    for place, outcome in enumerate(Outcome):
        stretches = [MadeStretch(replica=place % 2 * 2, first=0, last=2)] if place else []
        made.add(stretches, outcome=outcome, adapter=place % 3 - 1, waited_ps=4)
    return result_of(made, wall_s=wall_s)


def same(one: object, other: object) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return bool(one.dtype == other.dtype and np.array_equal(one, other))
    if isinstance(one, ReplicaLog) and isinstance(other, ReplicaLog):
        return all(getattr(one, f.name) == getattr(other, f.name) for f in fields(ReplicaLog))
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))
    return one == other


def test_a_result_comes_back_from_its_files(tmp_path: Path) -> None:
    first = result()
    write_result(first, tmp_path)
    again = read_result(tmp_path)
    different = [
        f.name for f in fields(SimulationResult) if not same(getattr(first, f.name), getattr(again, f.name))
    ]
    assert different == []
    assert metrics_of(again, Judging()).summary == metrics_of(first, Judging()).summary


def test_the_same_result_is_the_same_bytes_but_for_its_timing(tmp_path: Path) -> None:
    for name, wall_s in (("a", 0.5), ("b", 0.75)):
        made = result(wall_s=wall_s)
        write_result(made, tmp_path / name, summary=metrics_of(made, Judging()).summary)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(names) == 7
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    different = [n for n in names if (tmp_path / "a" / n).read_bytes() != (tmp_path / "b" / n).read_bytes()]
    assert different == [TIMING]


def test_a_result_of_nothing_comes_back(tmp_path: Path) -> None:
    empty = result_of(MadeRun(replicas=[], adapters=()))
    write_result(replace(empty, epochs=()), tmp_path)
    again = read_result(tmp_path)
    assert (len(again), again.logs, again.epochs) == (0, (), ())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("scenario.json", b"{"),
        ("scenario.json", b"{}"),
        ("requests.parquet", b"PAR1"),
        ("runs.parquet", None),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes | None) -> None:
    write_result(result(), tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInputError, match=name if content != b"{}" else "not a simulation's result"):
        read_result(tmp_path)
