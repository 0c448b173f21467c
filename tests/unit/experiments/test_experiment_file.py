"""The file of an experiment: what it may say, and what is said of one that is wrong."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loraserve.errors import BadInputError, ConfigError
from loraserve.experiments.jobs import code_files, job_key, jobs_of_experiment
from loraserve.experiments.spec import (
    OWN,
    experiment_tree,
    find_experiment,
    parse_experiment,
    read_experiment,
    share_of,
    shipped_experiments,
)
from tests.support.experiments import small_tree

LISTING = """
import loraserve.experiments.measure, sys
ours = ("loraserve", "placement", "traces")
print(*(found.__file__ for name, found in sys.modules.items() if name.split(".")[0] in ours))
"""
LENGTHS = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,400,40\n2023-11-16 18:15:50,300,30\n"
TRACE = {"name": "u", "source": "preset:loraserve-uniform"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rates": ["0.8"]}, 'rates[0]: "0.8"; expected a number above 0, a share such as "0.85x" or "own"'),
        ({"rates": [1.0, -1]}, "rates[1]: -1; expected a number above 0"),
        ({"traces": [{"name": "u"}]}, "traces[0].source: is missing; expected a string"),
        ({"traces": [TRACE | {"adapter": 3}]}, "traces[0].adapter: unknown key; allowed: adapters, "),
        ({"traces": [TRACE | {"adapters": 0}]}, "traces[0].adapters: 0; expected an integer of at least 1"),
        ({"traces": [TRACE, TRACE]}, 'traces[1].name: "u" stands there twice'),
        ({"traces": []}, "traces: []; expected a list of at least 1"),
        ({"policies": ["best"]}, "policies: 'best'; expected of optimal, "),
        ({"kernels": ["flat"]}, 'kernels[0]: "flat"; expected one of padded_config, padded_batch, sum'),
        ({"seeds": [1, 1]}, "seeds[1]: 1 stands there twice; expected each once"),
        ({"find": {"fewest_replicas_at": ["0.5x"]}}, 'find.fewest_replicas_at[0]: "0.5x"; expected'),
        ({"find": {"most": 3}}, "find.most: unknown key; allowed: fewest_replicas_at, highest_rate"),
        ({"cluster": {"epoch_s": "a"}}, 'cluster.epoch_s: "a"; expected a number above 0'),
        ({"cluster": {"duration_s": 5.0, "warmup_s": 5.0}}, "cluster.warmup_s: 5; expected less than"),
        ({"map_rate": "x"}, "map_rate: "),
        (
            {"claims": [{"text": "t", "figure": "highest_rate", "policy": "loraserve"}]},
            'claims[0].policy: "loraserve"; expected of optimal, slora-random',
        ),
        (
            {"claims": [{"text": "t", "figure": "speed", "policy": "optimal"}]},
            'claims[0].figure: "speed"; expected one of fewest_replicas, highest_rate',
        ),
        (
            {"published": [{"name": "theirs", "figure": "speed", "points": [[1.0, 2.0]]}]},
            'published[0].figure: "speed"; expected one of requests, failed, throughput_per_s',
        ),
        (
            {"published": [{"name": "theirs", "figure": "failed", "points": [[1.0]]}]},
            "published[0].points[0]: [1.0]; expected a list of 2: a number from -1e18 to 1e18",
        ),
        (
            {"published": [{"name": "theirs", "figure": "failed", "points": []}]},
            "published[0].points: []; expected a list of at least 1",
        ),
        (
            {"published": [{"name": "theirs", "figure": "failed", "points": [[1.0, float("nan")]]}]},
            "published[0].points[0][1]: NaN; expected a number from -1e18 to 1e18",
        ),
        ({"cluster": {"pool_mib": float("inf")}}, "cluster.pool_mib: Infinity; expected a number from 0"),
        ({"cluster": {"fail": ["soon"]}}, 'cluster.fail[0]: "soon"; expected such as '),
        (
            {"cluster": {"fail": ["replica-1@1s for 1s"]}},
            'cluster.fail[0]: "replica-1@1s for 1s"; expected of replica-0, which all runs have',
        ),
        ({"map_rate": 3.0}, 'map_rate: 3.0; expected of "0.6x", "1.1x"'),
        (
            {"claims": [{"text": "t", "figure": "ttft_p95_ms", "policy": "optimal", "rate": 3.0}]},
            'claims[0].rate: 3.0; expected of "0.6x", "1.1x"',
        ),
        (
            {"claims": [{"text": "t", "figure": "fewest_replicas", "policy": "optimal", "rate": "0.6x"}]},
            'claims[0].rate: "0.6x"; expected of 8.0',
        ),
    ],
)
def test_what_is_wrong_is_refused_with_its_path_and_what_would_be_right(
    change: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_experiment(small_tree(**change), "mine.toml")
    assert str(refused.value).startswith(f"mine.toml: {said}")


def test_failures_of_replicas_that_every_run_has_are_taken() -> None:
    cluster = {"fail": ["replica-1@1s for 1s"]}
    assert parse_experiment(small_tree(cluster=cluster, find={})).cluster.fail == cluster["fail"]
    with pytest.raises(ConfigError, match=r"cluster\.fail\[0\]: .* expected of replica-0 to replica-1"):
        parse_experiment(small_tree(cluster={"fail": ["replica-2@1s for 1s"]}, find={}))


def test_a_file_that_is_no_toml_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("title = \n")
    with pytest.raises(ConfigError, match=r"mine\.toml: not valid TOML"):
        read_experiment(path)
    with pytest.raises(ConfigError, match="cannot read the experiment"):
        read_experiment(tmp_path / "none.toml")


def test_an_experiment_survives_being_written_as_plain_values() -> None:
    experiment = parse_experiment(small_tree())
    assert parse_experiment(experiment_tree(experiment)) == experiment


def test_without_rates_and_searches_a_trace_is_taken_as_it_is() -> None:
    assert parse_experiment(small_tree(rates=[], find={})).all_rates == (OWN,)
    assert parse_experiment(small_tree(rates=[])).all_rates == ()


def test_rates_are_numbers_or_shares() -> None:
    assert [share_of(rate) for rate in ("0.85x", OWN, 3.0)] == [0.85, None, None]


def test_everything_that_is_a_list_multiplies() -> None:
    experiment = parse_experiment(small_tree(replicas=[2, 3], kernels=["sum", "padded_batch"]))
    jobs = jobs_of_experiment(experiment, Path())
    # Two policies, seeds and kernels; two numbers of replicas and a search for the fewest.
    assert len(jobs) == 2 * 2 * 2 * 3
    assert len({job_key(job) for job in jobs}) == len(jobs)
    assert sum(job.has_map for job in jobs) == 2 * 2 * 2


def test_a_key_changes_with_whatever_changes_the_result(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"

    def key(**changes: Any) -> str:
        experiment = parse_experiment(small_tree(traces=[{"name": "t", "source": "t.csv"}], **changes))
        return job_key(jobs_of_experiment(experiment, tmp_path)[0])

    def key_of(**changes: Any) -> str:
        section = {"name": "t", "source": "preset:loraserve-uniform", **changes}
        return job_key(jobs_of_experiment(parse_experiment(small_tree(traces=[section])), tmp_path)[0])

    trace.write_text("a")
    first = key()
    assert key(title="Another") == first
    assert key(slo={"ttft_ms": 1000.0}) != first
    assert key(cluster={"epoch_s": 9.0}) != first
    assert key(rates=["0.5x"]) != first
    trace.write_text("b")
    os.utime(trace, ns=(1, 1))
    assert key() != first
    # Files that laws name decide as much, in a preset's text and beside it.
    weights = tmp_path / "weights.txt"
    weights.write_text("3 2 1")
    named = {"source": f"preset:loraserve-uniform,popularity=file:{weights},base-share=0.1", "adapters": 3}
    first = key_of(**named)
    weights.write_text("1 1 1")
    os.utime(weights, ns=(1, 1))
    assert key_of(**named) != first
    lengths = tmp_path / "lengths.csv"
    lengths.write_text(LENGTHS)
    drawn = {"lengths": f"resample:{lengths}"}
    first = key_of(**drawn)
    lengths.write_text(LENGTHS.replace("40", "50"))
    os.utime(lengths, ns=(1, 1))
    assert key_of(**drawn) != first


def test_a_key_covers_all_code_that_measures() -> None:
    told = subprocess.run(
        [sys.executable, "-c", LISTING], capture_output=True, text=True, check=True, timeout=60
    )
    covered = {str(path) for _, path in code_files()}
    used = set(told.stdout.split())
    # Errors and the reading of files: what came of them is in the key itself.
    beside = {"loraserve/__init__", "engines/__init__", "profiling/__init__", "errors", "sections", "files"}
    assert {path for path in used - covered if not path.removesuffix(".py").endswith(tuple(beside))} == set()
    assert used & covered


@pytest.mark.parametrize(
    ("trace", "said"),
    [
        ({"source": "preset:none"}, "no preset is called 'none'; there are: loraserve-uniform, "),
        ({"lengths": "short"}, "lengths: 'short' is unknown; there are: azure, "),
        ({"assign": "zipf"}, "--assign: preset:loraserve-uniform draws its adapters by itself"),
        (
            {"source": "preset:loraserve-uniform,rate=5"},
            "source: preset:loraserve-uniform,rate=5 says its rate; say it with rates",
        ),
    ],
)
def test_a_preset_that_cannot_be_drawn_is_refused_before_anything_runs(
    trace: dict[str, Any], said: str, tmp_path: Path
) -> None:
    experiment = parse_experiment(small_tree(traces=[TRACE, TRACE | {"name": "v"} | trace]))
    with pytest.raises(BadInputError) as refused:
        jobs_of_experiment(experiment, tmp_path)
    assert str(refused.value).startswith(f"traces[1]: {said}")


def test_a_trace_file_that_is_not_there_is_refused_before_anything_runs(tmp_path: Path) -> None:
    experiment = parse_experiment(small_tree(traces=[{"name": "t", "source": "t.csv"}]))
    with pytest.raises(BadInputError, match=r"traces\[0\]\.source: t\.csv: no such file .* --traces"):
        jobs_of_experiment(experiment, tmp_path)


def test_experiments_are_found_by_name_and_by_path() -> None:
    assert find_experiment("a/mine.toml") == ("mine", Path("a/mine.toml"))
    with pytest.raises(BadInputError, match=r"no such experiment; those there are: .*loraserve-4"):
        find_experiment("experiment:none")


@pytest.mark.parametrize("name", sorted(shipped_experiments()))
def test_what_ships_can_be_read(name: str) -> None:
    experiment = read_experiment(find_experiment(f"experiment:{name}")[1])
    assert experiment.title
    assert experiment.summary
