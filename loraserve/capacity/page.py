"""The HTML page of a search for capacity: one file, no scripts, nothing fetched from anywhere.

Takes values and PNG bytes, gives text; every string from outside is escaped. Looks like a run's own page.
"""

from collections.abc import Sequence
from html import escape

from loraserve.capacity.answers import Found
from loraserve.capacity.mixes import mix_text
from loraserve.capacity.words import (
    answer_lines,
    curve_text,
    figure_name,
    figure_text,
    money_text,
    policy_text,
    seeds_text,
    what_if_lines,
)
from traces.metrics import formulas
from traces.report_page import PlotImages, definitions, document, figure


def capacity_page(found: Found, images: Sequence[PlotImages], *, command: str) -> str:
    """The whole page."""
    parts = [
        "<h1>How many replicas</h1>",
        f'<p class="verdict">{escape(_verdict(found))}</p>',
        *(f"<p>{escape(line)}.</p>" for line in what_if_lines(found)),
        "<h2>Answers</h2>",
        _answers(found),
        *(f'<p class="note">{escape(note)}</p>' for note in _notes(found)),
        '<div class="plots">' + "".join(figure(image) for image in images) + "</div>",
        _curve(found),
        "<h2>What was tried</h2>",
        _tried(found),
        "<h2>How this was simulated</h2>",
        f"<pre>{escape(command)}</pre>",
        definitions(_conditions(found)),
        "<h2>What the figures mean</h2>",
        definitions(_meanings()),
    ]
    return document("How many replicas", "\n".join(parts))


def _verdict(found: Found) -> str:
    best = found.best
    if best.best is None:
        return f"Nothing that was tried holds {found.target.text} with every seed."
    lines = answer_lines(found)[len(found.notes) :]
    chosen = next(
        place for place, line in enumerate(lines) if line.startswith(f"{policy_text(best.policy, False)}: ")
    )
    return f"{lines[chosen]} {lines[chosen + 1].strip()}."


def _notes(found: Found) -> list[str]:
    of_answers = [
        f"{policy_text(answer.policy, answer.what_if)}: {note}"
        for answer in found.answers
        for note in answer.notes
    ]
    return [*found.notes, *of_answers]


def _answers(found: Found) -> str:
    clauses = found.target.clauses
    head = ["Policy", "Replicas", *(["max_lora_rank"] if found.has_mixes else []), "Seeds"]
    head += [f"worst {figure_name(clause)}" for clause in clauses]
    if found.price is not None:
        head += ["Per hour", "Per million tokens"]
    head += ["By operating points", "Fewer"]
    rows = []
    for answer in found.answers:
        best = answer.best
        if best is None:
            rows.append((policy_text(answer.policy, answer.what_if), ["none", *[""] * (len(head) - 2)]))
            continue
        cells = [str(best.replicas), *([mix_text(best.mix)] if found.has_mixes else [])]
        cells.append(f"{best.num_held} of {len(best.held)}")
        cells += [figure_text(clause, best.worst(clause.figure)) for clause in clauses]
        if found.price is not None:
            cells += [money_text(answer.per_hour), money_text(answer.per_million_tokens)]
        rows.append(
            (policy_text(answer.policy, answer.what_if), [*cells, str(answer.lower_bound), answer.proof])
        )
    return _table(head, rows)


def _curve(found: Found) -> str:
    shown = [answer for answer in found.answers if answer.curve]
    if not shown:
        return ""
    head = ["Bounds", *(policy_text(answer.policy, answer.what_if) for answer in shown)]
    rows = [
        (point.target.text, [curve_text(answer.curve[place]) for answer in shown])
        for place, point in enumerate(shown[0].curve)
    ]
    return "<h2>Looser and tighter</h2>\n" + _table(head, rows)


def _tried(found: Found) -> str:
    head = ["Policy", "Replicas", *(["max_lora_rank"] if found.has_mixes else []), "Held"]
    head += [f"{figure_name(clause)} by seed" for clause in found.target.clauses] + ["Failed"]
    rows = []
    for one in found.candidates:
        cells = [str(one.replicas), *([mix_text(one.mix)] if found.has_mixes else [])]
        cells.append(f"{one.num_held} of {len(one.held)}")
        cells += [seeds_text(clause, one, " · ") for clause in found.target.clauses]
        ended = [run for run in one.figures.values() if run.gave_up_ms is None]
        cells.append(" · ".join(f"{run.failed:,}" for run in ended))
        rows.append((policy_text(one.policy, one.what_if), cells))
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "\n".join(
        f'<tr><th scope="row">{escape(label)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row)
        + "</tr>"
        for label, row in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="grid">\n<thead><tr>{cells}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _conditions(found: Found) -> dict[str, str]:
    conditions = dict(found.workload)
    for name in ("replicas", "policy", "routing", "seed", "forecast", "failures"):
        conditions.pop(name, None)
    if found.what_if:
        conditions["What if"] = "; ".join(found.what_if)
    if found.price is not None:
        conditions["Price per GPU hour"] = money_text(found.price.per_gpu_hour)
        conditions["GPUs per replica"] = str(found.price.gpus_per_replica)
    return conditions


def _meanings() -> dict[str, str]:
    return {
        "replicas": "the fewest that hold with every seed; one fewer was tried and did not, and it is taken"
        " that still fewer do not either",
        "seeds": "each draws the workload anew where it is drawn, and what routers and policies draw",
        "at least … of all": "if only that share of all seeds held, all of these would with a chance of 5 %",
        "by operating points": "replicas that would be busy all the time if ranks never met in a batch, by"
        " the profile's operating points: where the search began",
        "given up": "a run that was certain to miss by then, and was ended",
        **formulas(),
    }
