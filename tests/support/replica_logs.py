"""A replica's log taken apart, step by step and token by token."""

from loraserve.engines.replica_model.log import ReplicaLog


def step_ends(log: ReplicaLog) -> list[tuple[int, int]]:
    """Each step's beginning and end, the runs taken apart."""
    ends = []
    for place, first in enumerate(log.run_step):
        last = log.run_step[place + 1] if place + 1 < len(log.run_step) else log.num_steps
        begun_ps, step_ps = log.run_ps[place], log.run_step_ps[place]
        for _ in range(last - first):
            ends.append((begun_ps, begun_ps + step_ps))
            begun_ps, step_ps = begun_ps + step_ps, step_ps + log.run_growth_ps[place]
    return ends


def token_times(log: ReplicaLog) -> dict[int, list[int]]:
    """When each request drew each of its tokens."""
    steps = step_ends(log)
    times: dict[int, list[int]] = {}
    for request, first, last in zip(log.stretch_request, log.stretch_first, log.stretch_last, strict=True):
        times.setdefault(request, []).extend(steps[step][1] for step in range(first, last + 1))
    return {request: sorted(drawn) for request, drawn in times.items()}
