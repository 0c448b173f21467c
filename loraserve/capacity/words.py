"""What was found, in words and cells: the same on a terminal and on a page."""

import math

from loraserve.capacity.answers import ONLY_THIS, Answer, Candidate, CurvePoint, Found, share_sure
from loraserve.capacity.mixes import mix_text
from loraserve.capacity.slo import ATTAINMENT, Clause
from loraserve.capacity.trials import TrialFigures


def figure_name(clause: Clause) -> str:
    """A figure as a person reads it: `TTFT p95`."""
    kind, _, percentile = clause.figure.partition("_")
    return f"{kind.upper()} {percentile}" if percentile else kind


def figure_text(clause: Clause, value: float | None) -> str:
    """A figure's value with its unit."""
    if value is None:
        return "-"
    if math.isinf(value):
        return "inf"
    if clause.is_latency:
        return f"{value:,.0f} ms" if value >= 100 else f"{value:,.1f} ms"
    return f"{value:.2%}" if clause.figure == ATTAINMENT else f"{value:,.2f}/s"


def run_text(clause: Clause, found: TrialFigures) -> str:
    """The figure of one run; of one that was given up how far its TTFT is off for certain."""
    if found.gave_up_ms is None:
        return figure_text(clause, found.figures[clause.figure])
    return f">{found.gave_up_ms:,.0f} ms" if clause.figure == "ttft_p95" else "-"


def seeds_text(clause: Clause, candidate: Candidate, between: str = "  ") -> str:
    """A figure with each seed."""
    return between.join(run_text(clause, found) for found in candidate.figures.values())


def replicas_text(number: int) -> str:
    """`1 replica`, `2 replicas`."""
    return "1 replica" if number == 1 else f"{number} replicas"


def policy_text(policy: str, what_if: bool) -> str:
    """A policy, as things are or with the what-if."""
    return f"{policy}, what if" if what_if else policy


def money_text(value: float | None) -> str:
    """A price."""
    return "-" if value is None else f"{value:,.4g}"


def curve_text(point: CurvePoint) -> str:
    """Replicas, and their price per hour if there is one."""
    if point.replicas is None:
        return f"more than {point.tried}" if point.tried else "none"
    return f"{point.replicas}" + ("" if point.per_hour is None else f", {money_text(point.per_hour)}/h")


def answer_lines(found: Found) -> list[str]:
    """The answers, with what is to be said of each, and what the what-if changes."""
    lines = [*found.notes]
    for answer in found.answers:
        lines += _answer_lines(found, answer)
    return lines + what_if_lines(found)


def what_if_lines(found: Found) -> list[str]:
    """As things are and with the what-if, side by side."""
    then = {answer.policy: answer for answer in found.answers if answer.what_if}
    more = "; ".join(found.what_if)
    return [
        f"{answer.policy}: {_number(answer)} as things are; with {more}: {_number(then[answer.policy])}"
        for answer in found.answers
        if not answer.what_if and answer.policy in then
    ]


def none_line(found: Found, answer: Answer, most: int) -> str:
    """What to say where not even the most replicas hold: what came nearest."""
    nearest = answer.nearest
    if nearest is None:
        return f"{policy_text(answer.policy, answer.what_if)}: {', '.join(answer.notes)}"
    name = policy_text(answer.policy, answer.what_if)
    with_seeds = f"with {nearest.num_held} of {len(nearest.held)} seeds, worst {worst_text(found, nearest)}"
    if answer.proof == ONLY_THIS:
        return f"{name}: {mix_text(nearest.mix)} do not hold {found.target.text}; they do {with_seeds}"
    tried = f"up to {replicas_text(most)}" if nearest.replicas < most else replicas_text(most)
    return (
        f"{name}: {tried} do not hold {found.target.text}; the best was"
        f" {nearest.replicas}{_mix(found, nearest)} {with_seeds}"
    )


def worst_text(found: Found, candidate: Candidate) -> str:
    """Every bounded figure with the seed where it is worst."""
    parts = []
    for clause in found.target.clauses:
        lost = [run for run in candidate.figures.values() if run.gave_up_ms is not None]
        value = candidate.worst(clause.figure)
        text = run_text(clause, lost[0]) if lost else figure_text(clause, value)
        parts.append(f"{figure_name(clause)} {text}")
    return ", ".join(parts)


def cost_text(answer: Answer) -> str:
    """What the answer costs."""
    return (
        f"{money_text(answer.per_hour)} per hour; per million tokens {money_text(answer.per_million_tokens)},"
        f" prompt and output, or {money_text(answer.per_million_output_tokens)} of output alone"
    )


def sure_text(candidate: Candidate) -> str:
    """How sure it is, by the number of seeds."""
    least = 100 * share_sure(candidate.num_held, len(candidate.held))
    return f"{candidate.num_held} of {len(candidate.held)} seeds (so, at 95 %, at least {least:.0f} % of all)"


def _answer_lines(found: Found, answer: Answer) -> list[str]:
    best, name = answer.best, policy_text(answer.policy, answer.what_if)
    if best is None:
        return [f"{name}: none found", *(f"  {note}" for note in answer.notes)]
    verb = "holds" if best.replicas == 1 else "hold"
    lines = [
        f"{name}: {replicas_text(best.replicas)}{_mix(found, best)} {verb} {found.target.text}",
        f"  with {sure_text(best)}, worst {worst_text(found, best)}; {answer.proof}",
    ]
    if answer.per_hour is not None:
        lines.append(f"  {cost_text(answer)}")
    return lines + [f"  {note}" for note in answer.notes]


def _number(answer: Answer) -> str:
    return "none" if answer.best is None else replicas_text(answer.best.replicas)


def _mix(found: Found, candidate: Candidate) -> str:
    return f" ({mix_text(candidate.mix)})" if found.has_mixes else ""
