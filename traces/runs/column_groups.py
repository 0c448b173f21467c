"""Groups of requests by rank and by adapter, with their stretches of output, from columns."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from traces.columns import TraceAdapter
from traces.metrics import BASE_MODEL, UNKNOWN_RANK
from traces.runs.step_runs import StepRuns, Whole


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RequestGroup:
    """Places of a group's requests in their columns, of its stretches and of its pauses in `StepRuns`."""

    requests: Whole
    stretches: Whole
    pauses: Whole


def groups_by(code: NDArray[np.int64], num_groups: int, runs: StepRuns) -> list[RequestGroup]:
    """The groups 0 to `num_groups` - 1 of requests with these codes; a code of -1 is in none."""
    columns = (code, code[runs.request], code[runs.pauses.owner])
    return [
        RequestGroup(requests=requests, stretches=stretches, pauses=pauses)
        for requests, stretches, pauses in zip(*(_sorted(one, num_groups) for one in columns), strict=True)
    ]


def _sorted(code: NDArray[np.int64], num_groups: int) -> list[Whole]:
    # numpy sorts 16 bits by counting, in a tenth of the time.
    order = np.argsort(code.astype(np.int16) if num_groups < 2**15 else code, kind="stable")
    bounds = np.searchsorted(code[order], np.arange(num_groups + 1))
    return [order[bounds[place] : bounds[place + 1]] for place in range(num_groups)]


def everything(counted: NDArray[np.bool_], runs: StepRuns) -> RequestGroup:
    """All counted requests."""
    return groups_by(np.where(counted, 0, -1), 1, runs)[0]


def rank_groups(
    adapter: NDArray[np.int32], adapters: Sequence[TraceAdapter], counted: NDArray[np.bool_], runs: StepRuns
) -> dict[str, RequestGroup]:
    """The counted requests of each rank that has any: base first, then ranks ascending, then unknown."""
    names, of_adapter = rank_codes(adapters)
    groups = groups_by(np.where(counted, of_adapter[adapter], -1), len(names), runs)
    return {name: group for name, group in zip(names, groups, strict=True) if len(group.requests)}


def rank_codes(adapters: Sequence[TraceAdapter]) -> tuple[tuple[str, ...], Whole]:
    """The names of all rank groups in order, and the place there of each adapter; one more entry at the
    end is the base model's, so that the column's -1 finds it."""
    ranks = sorted({adapter.rank for adapter in adapters if adapter.rank is not None})
    names = (BASE_MODEL, *(str(rank) for rank in ranks), UNKNOWN_RANK)
    place = {rank: number for number, rank in enumerate(ranks, start=1)}
    last = len(names) - 1
    of_adapter = [last if adapter.rank is None else place[adapter.rank] for adapter in adapters]
    return names, np.asarray([*of_adapter, 0], dtype=np.int64)


def adapter_groups(
    adapter: NDArray[np.int32], adapters: Sequence[TraceAdapter], counted: NDArray[np.bool_], runs: StepRuns
) -> dict[str, RequestGroup]:
    """The counted requests of each adapter that has any, most requests first, ties by name."""
    # A workload may name an adapter twice, with two ranks.
    names = list(dict.fromkeys(one.name for one in adapters))
    place = {name: number for number, name in enumerate(names)}
    of_adapter = np.asarray([*(place[one.name] for one in adapters), -1], dtype=np.int64)
    groups = groups_by(np.where(counted, of_adapter[adapter], -1), len(names), runs)
    named = {name: group for name, group in zip(names, groups, strict=True) if len(group.requests)}
    return dict(sorted(named.items(), key=lambda item: (-len(item[1].requests), item[0])))
