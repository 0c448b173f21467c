"""The greedy side of co-migration: a bound for the program, what it falls back to, and what mends its
rounding."""

from placement.migration.problem import GAIN_TOLERANCE, Assignment


def improve(found: Assignment) -> Assignment:
    """Take from the busiest replica, one request at a time, to where both are then done soonest, while that
    makes the busiest less busy; at most one pass over each request. Changes what it is given and returns
    it."""
    for _ in range(len(found.target)):
        places = range(len(found.problem.replicas))
        busiest = max(places, key=lambda place: (found.busy_s(place), -place))
        step = _best_step(found, busiest, found.busy_s(busiest))
        if step is None:
            break
        found.move(*step)
    return found


def put_back(found: Assignment) -> None:
    """Undo every move without which the busiest replica is no busier; those with the most tokens so far
    first, as they are computed anew where they go."""
    limit_s = found.longest_s() + GAIN_TOLERANCE
    requests = found.problem.requests
    moved = [index for index, place in enumerate(found.target) if place != found.source[index]]
    moved.sort(key=lambda index: (-requests[index].tokens, requests[index].request_id))
    for index in moved:
        place, source = found.target[index], found.source[index]
        found.move(index, source)
        if found.busy_s(source) > limit_s:
            found.move(index, place)


def _best_step(found: Assignment, busiest: int, busy_s: float) -> tuple[int, int] | None:
    """The request of the busiest, and the least busy replica that can take it, after which the busier of the
    two is done soonest."""
    best: tuple[float, int, int] | None = None
    others = [place for place in range(len(found.problem.replicas)) if place != busiest]
    others.sort(key=lambda place: (found.busy_s(place), place))
    for index, at in enumerate(found.target):
        if at != busiest:
            continue
        place = next((place for place in others if found.fits(index, place)), None)
        if place is None:
            continue
        found.move(index, place)
        step = (max(found.busy_s(busiest), found.busy_s(place)), index, place)
        found.move(index, busiest)
        if step[0] < busy_s - GAIN_TOLERANCE and (best is None or step < best):
            best = step
    return None if best is None else (best[1], best[2])
