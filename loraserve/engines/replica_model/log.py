"""What one replica did, as runs of steps: columns that grow, one row per run and per stretch of output."""

from array import array
from dataclasses import dataclass, field, fields


def _column() -> "array[int]":
    return array("q")


class _Nothing(array):  # type: ignore[type-arg]
    """A column that stays empty."""

    def append(self, value: int, /) -> None:
        pass


@dataclass(slots=True, eq=False)
class ReplicaLog:
    """Steps are numbered from 0 over the replica's life; all columns are int64.

    Runs: a run is steps in which nobody joins or leaves. Run k has steps `run_step[k]` up to
    `run_step[k + 1]` (the last run: up to `num_steps`), begins at `run_ps[k]`, its first step takes
    `run_step_ps[k]` and each further one `run_growth_ps[k]` more than the one before. `run_rows[k]` rows
    decode in each of its steps, `run_prefill_tokens[k]` prompt tokens are computed in its first step (a run
    with prompt tokens has one step), `run_max_rank[k]` is the largest rank in it, `run_blocks[k]` the KV
    blocks in use at its end. Between two runs the replica may be idle.

    Stretches: request `stretch_request[k]` drew one token at the end of each of the steps
    `stretch_first[k]` to `stretch_last[k]`. A request that is never preempted and never moves has one.
    """

    run_step: "array[int]" = field(default_factory=_column)
    run_ps: "array[int]" = field(default_factory=_column)
    run_step_ps: "array[int]" = field(default_factory=_column)
    run_growth_ps: "array[int]" = field(default_factory=_column)
    run_rows: "array[int]" = field(default_factory=_column)
    run_prefill_tokens: "array[int]" = field(default_factory=_column)
    run_max_rank: "array[int]" = field(default_factory=_column)
    run_blocks: "array[int]" = field(default_factory=_column)
    num_steps: int = 0
    stretch_request: "array[int]" = field(default_factory=_column)
    stretch_first: "array[int]" = field(default_factory=_column)
    stretch_last: "array[int]" = field(default_factory=_column)

    @classmethod
    def of_nothing(cls) -> "ReplicaLog":
        """A log that keeps only the number of steps, for a replica that runs for ever."""
        log = cls()
        for one in fields(cls):
            if one.name != "num_steps":
                setattr(log, one.name, _Nothing("q"))
        return log
