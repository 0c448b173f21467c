"""How `bench rank` times rows, and a whole run on the emulated engine."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.bench.rank_run import Effort, Progress, RankOptions, run_rank
from loraserve.bench.rank_subject import Recipe, generate
from loraserve.bench.rank_subject import given as given_subject
from loraserve.bench.rank_timing import Arrival, decode_gaps_ms, shared_step_ms
from loraserve.errors import BadInputError
from tests.support.cli import run_cli


def arrivals(*times_s: float, tokens: int = 1) -> list[Arrival]:
    return [Arrival(at_s=time_s, tokens=tokens) for time_s in times_s]


@given(
    step_ms=st.floats(1, 100),
    starts=st.lists(st.integers(0, 4), min_size=1, max_size=8),
    lag_share=st.floats(0, 0.01),
)
def test_decode_gaps_are_steps_of_all_sequences(step_ms: float, starts: list[int], lag_share: float) -> None:
    # While some sequences are missing a step is far faster; each reader lags a little behind the one before.
    fast_s, step_s = step_ms / 1e4, step_ms / 1e3
    together = max(starts)
    times_s = [at * fast_s if at <= together else together * fast_s + (at - together) * step_s
               for at in range(together + 11)]  # fmt: skip
    streams = [
        arrivals(*(time_s + number * lag_share * fast_s for time_s in times_s[start:]))
        for number, start in enumerate(starts)
    ]
    assert decode_gaps_ms(streams) == pytest.approx([step_ms] * 10)


def test_a_step_with_several_tokens_counts_as_as_many_gaps() -> None:
    stream = [*arrivals(0.0), *arrivals(0.030, tokens=3), *arrivals(0.040)]
    assert decode_gaps_ms([stream]) == pytest.approx([10.0] * 4)


def test_sequences_that_never_ran_together_have_no_gaps() -> None:
    assert decode_gaps_ms([arrivals(0.0, 0.1), arrivals(0.2, 0.3)]) == []


@pytest.mark.parametrize(
    ("firsts_s", "step_ms"),
    [
        ([0.071, 0.0712], 50.0),
        ([0.0699, 0.0701], 50.0),
        ([0.071, 0.081], None),  # in two steps
        ([0.0, 0.0], None),  # in the first step, whose beginning nobody saw
        ([0.2, 0.2], None),  # after the last one
        ([0.101, 0.101], None),  # a message with two tokens is two steps
    ],
)
def test_only_a_step_that_all_prompts_share_is_timed(firsts_s: list[float], step_ms: float | None) -> None:
    beside = [*arrivals(0.0, 0.01, 0.02, 0.07, 0.08), *arrivals(0.1, tokens=2)]
    assert shared_step_ms(beside, firsts_s) == (None if step_ms is None else pytest.approx(step_ms))


async def test_a_run_measures_every_row_of_every_mode_on_an_engine_of_its_own(tmp_path: Path) -> None:
    subject = generate(tmp_path, Recipe(hidden_size=128, num_layers=1, ranks=(8, 16, 32)))
    effort = Effort(repetitions=2, row_s=0.0, least=2)
    progress = Progress()
    told: list[tuple[int, str]] = []
    progress.listeners.append(lambda now: told.append((now.done, now.doing)))
    result = await run_rank(
        subject, RankOptions(modes=("off", "rank-true"), effort=effort, engine="emulated"), progress
    )
    assert [run.mode for run in result.engines] == ["off", "rank-true", "rank-true", "off"]
    assert all(run.engine.lora_execution == run.mode for run in result.engines)
    times = result.times
    assert {"prefill_r8", "prefill_r16", "prefill_r32", "decode_mixed"} <= times["rank-true"].keys()
    assert times["off"]["decode_base"].samples == 2  # one in each engine: enough for a row no rank is in
    assert times["rank-true"]["decode_r32"].samples == 4
    assert times["rank-true"]["decode_r16"].samples == 2
    # The emulated engine's own step: 4 ms, and 0.1 ms and 0.002 ms for each rank per sequence.
    assert times["rank-true"]["decode_r32"].median_ms > 5.0
    assert progress.done == progress.total == told[-1][0]


def test_a_given_model_is_checked_before_an_engine_starts(tmp_path: Path) -> None:
    built = generate(tmp_path, Recipe(hidden_size=128, num_layers=1, ranks=(8, 16)))
    one, other = (str(files.directory) for name, files in built.files.items() if name.endswith("-a"))
    found = given_subject(built.model, [f"x={one}", f"y={other}"], 128)
    assert found.ranks == (8, 16)
    assert [adapter.name for adapter in found.adapters] == ["x", "y"]
    for wrong, says in (
        ([], "none is given"),
        ([f"x={one}", f"x={other}"], "x is given twice"),
        ([one], "expected NAME=DIR"),
        ([f"x={tmp_path}"], "adapter_config.json"),
    ):
        with pytest.raises(BadInputError, match=says):
            given_subject(built.model, wrong, 128)
    with pytest.raises(BadInputError, match="rank is 16"):
        given_subject(built.model, [f"y={other}"], 8)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--mode", "fast"), "--mode: got 'fast'; expected one of off, rank-true, padded, stock"),
        (("--rank", "256"), "--rank 256: above --max-lora-rank 128"),
        (("--rank", "8", "--rank", "8"), "each once"),
        (("--max-lora-rank", "100"), "engine.max_lora_rank: 100; expected "),
        (("--hidden", "100"), "hidden_size is 100"),
        (("--layers", "0"), "--layers: got 0"),
        (("--adapter", "a=b"), "--model"),
        (("--model", "nowhere", "--adapter", "a=b"), "nowhere: no such folder"),
        (("--model", "nowhere", "--rank", "8"), "--rank: with --model"),
        (("--out", "/dev/null/x"), "--out: /dev/null/x: cannot be made"),
    ],
)
async def test_bad_input_is_one_line_and_exit_code_2(arguments: tuple[str, ...], says: str) -> None:
    ran = await run_cli("bench", "rank", *arguments)
    assert ran.exit_code == 2
    assert ran.stdout == ""
    assert ran.stderr.startswith("error: ")
    assert ran.stderr.count("\n") == 1
    assert says in ran.stderr
