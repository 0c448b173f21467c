"""The HTML page of an experiment: one file, no scripts, nothing fetched from anywhere.

Takes values and PNG bytes, gives text; every string from outside is escaped. Looks like a run's own page.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby

import msgspec

from loraserve.experiments.report.aggregate import Aggregate, counted
from loraserve.experiments.report.claims import ClaimFound
from loraserve.experiments.report.grids import AT_RATES, Cell, Grid, cases_grid, claims_grid, grids
from loraserve.experiments.report.plots import COSTS, FEWEST, HIGHEST, MAPS, OVER_RATE, OVER_REPLICAS
from loraserve.experiments.spec import (
    ClaimSection,
    Experiment,
    PublishedSection,
    TraceSection,
    experiment_tree,
)
from loraserve.sections import Section
from traces.metrics import formulas
from traces.report_page import PlotImages, definitions, document, figure

_WIDE_PIXELS = 800
_SECTIONS = (
    (HIGHEST, ("highest",)),
    (FEWEST, ("fewest",)),
    (OVER_RATE, ("ttft", "tbt", "attainment")),
    (OVER_REPLICAS, ()),
    (MAPS, ()),
    (COSTS, ("resident", "moved")),
)
"""The headings of plots, and the tables under each."""
_OWN_FORMULAS: Mapping[str, str] = {
    "highest rate": "the highest rate found, by halving between rates that hold and rates that do not, at"
    " which TTFT p95 and TBT p95 were both within their targets",
    "fewest replicas": "the least number of replicas on which both held at that rate, taking for granted that"
    " what holds on so many holds on more",
    "a rate such as 0.8x": "a share of the fluid rate, at which every replica would be exactly busy if ranks"
    " never met in a batch, by the profile's operating points",
    "resident": "bytes of the adapters that a replica holds, meant over epochs and replicas",
    "moved": "bytes of adapters that were copied after the warm-up; what is in place at the start is not"
    " counted",
    "cold misses": "requests that had to wait for a copy of their adapter",
    "utilisation": "share of the time in which replicas computed, meant over all replicas",
}


def experiment_page(
    data: Aggregate,
    found: Sequence[ClaimFound],
    images: Sequence[tuple[str, PlotImages]],
    left_out: Sequence[str],
    *,
    command: str,
) -> str:
    """The whole page; `images` with the headings they stand under, `left_out` what is not drawn."""
    experiment = data.result.experiment
    title = experiment.title or data.result.name
    sections = [*_sections(data, found, images)]
    parts = [f"<h1>{escape(title)}</h1>"]
    if experiment.summary:
        parts.append(f'<p class="verdict">{escape(experiment.summary)}</p>')
    parts.append(f'<p class="note">{escape(_headline(data))}</p>')
    how = "How this was simulated"
    parts.append(_contents([*(name for name, _ in sections), how, "What the figures mean"]))
    for name, body in sections:
        parts += [_heading(name), body]
    if left_out:
        parts.append(f'<p class="note">Not drawn: {escape(". ".join(left_out))}.</p>')
    parts += [
        _heading(how),
        f"<pre>{escape(command)}</pre>",
        definitions(_workloads(data)),
        _published(experiment),
        f"<h3>The experiment</h3>\n<pre>{escape(_experiment_text(experiment))}</pre>",
        _heading("What the figures mean"),
        definitions({**_OWN_FORMULAS, **formulas()}),
    ]
    return document(title, "\n".join(parts))


def _sections(
    data: Aggregate, found: Sequence[ClaimFound], images: Sequence[tuple[str, PlotImages]]
) -> Iterator[tuple[str, str]]:
    if found:
        yield "What was published, and what was found here", _claims(data, found)
    tables = {grid.anchor: grid for grid in grids(data)}
    asked_for = tuple(anchor for anchor in tables if anchor.startswith(AT_RATES))
    for name, anchors in _SECTIONS:
        parts = [_plots([image for heading, image in images if heading == name])]
        for anchor in (*anchors, *asked_for) if name == OVER_RATE else anchors:
            if anchor in tables:
                parts.append(f"<h3>{escape(tables[anchor].title)}</h3>\n{_table(tables[anchor])}")
        if any(parts):
            yield name, "\n".join(parts)


def _headline(data: Aggregate) -> str:
    experiment = data.result.experiment
    parts = [
        counted(len(data.traces), "workload"),
        f"{len(data.policies)} policies" if len(data.policies) != 1 else "1 policy",
        counted(len({setting.kernel for setting in data.settings}), "rank kernel"),
        counted(data.num_seeds, "seed"),
    ]
    if data.runs():
        parts.insert(
            1, " or ".join(str(one) for one in dict.fromkeys(at.replicas for at in data.runs())) + " replicas"
        )
    slo, warmup_s = experiment.slo, experiment.cluster.warmup_s
    left_out = f", the first {warmup_s:g} s left out" if warmup_s else ""
    medians = " Figures are medians over the seeds." if data.num_seeds > 1 else ""
    return (
        f"{', '.join(parts)}. Inside the SLO: TTFT p95 ≤ {slo.ttft_ms:g} ms and TBT p95 ≤ {slo.tbt_ms:g} ms"
        f"{left_out}.{medians}"
    )


def _claims(data: Aggregate, found: Sequence[ClaimFound]) -> str:
    parts = [_table(claims_grid(data, found))]
    for place, one in enumerate(found):
        claim = one.claim
        if len(one.cases) == 1 and not claim.why:
            continue
        heading = f"{place + 1}. {claim.text}"
        parts.append(f"<h3>{escape(heading)}</h3>\n<p>{escape(_sentence(one.verdict))}</p>")
        if claim.why:
            parts.append(f"<p>{escape(claim.why)}</p>")
        if len(one.cases) > 1:
            parts.append(_table(cases_grid(data, one)))
    return "\n".join(parts)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _contents(names: Sequence[str]) -> str:
    items = "".join(f'<li><a href="#{_anchor(name)}">{escape(name)}</a></li>' for name in names)
    return f'<nav class="contents" aria-label="Contents"><ul>{items}</ul></nav>'


def _heading(name: str) -> str:
    return f'<h2 id="{_anchor(name)}">{escape(name)}</h2>'


def _anchor(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _table(grid: Grid) -> str:
    of_text = ' class="text"' if grid.is_text else ""
    head = "".join(f'<th scope="col"{of_text}>{_breakable(name)}</th>' for name in grid.columns)
    body = []
    group = ""
    for row in grid.rows:
        if row.group != group:
            group = row.group
            span = len(grid.columns) + 1
            body.append(f'<tr class="group"><th scope="rowgroup" colspan="{span}">{escape(group)}</th></tr>')
        cells = "".join(_cell(cell, of_text) for cell in row.cells)
        body.append(f'<tr><th scope="row">{escape(row.name)}</th>{cells}</tr>')
    kind = "prose" if grid.is_text else "grid"
    note = f'<p class="note">{escape(grid.note)}</p>' if grid.note else ""
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}">\n<thead><tr><th scope="col">'
        f"{escape(grid.corner)}</th>{head}</tr></thead>\n<tbody>\n" + "\n".join(body) + "\n</tbody></table>"
        f"</div>\n{note}"
    )


def _cell(cell: Cell, kind: str) -> str:
    text = escape(cell.text)
    if cell.is_best:
        text = f"<b>{text}</b>"
    if cell.range:
        text += f"<small>{escape(cell.range)}</small>"
    return f"<td{kind}>{text}</td>"


def _breakable(name: str) -> str:
    return escape(name).replace("-", "-<wbr>")


def _plots(images: Sequence[PlotImages]) -> str:
    """Narrow plots beside each other, wide ones each in a box of its own that a phone can scroll."""
    parts = []
    for is_wide, some in groupby(images, _is_wide):
        drawn = [figure(image) for image in some]
        if is_wide:
            parts += [f'<div class="scroll wide" tabindex="0">{one}</div>' for one in drawn]
        else:
            parts.append(f'<div class="plots">{"".join(drawn)}</div>')
    return "\n".join(parts)


def _is_wide(image: PlotImages) -> bool:
    # A PNG's header has the width at this place.
    return int.from_bytes(image.light_png[16:20], "big") > _WIDE_PIXELS


def _workloads(data: Aggregate) -> dict[str, str]:
    return {
        trace.name: ", ".join(part for part in (trace.source, trace.note) if part)
        for trace in data.result.experiment.traces
    }


def _published(experiment: Experiment) -> str:
    lines = {one.name: one.source for one in experiment.published if one.source}
    return f"<h3>Published lines</h3>\n{definitions(lines)}" if lines else ""


def _experiment_text(experiment: Experiment) -> str:
    """The experiment as its file could be, without what its lists of sections need not say."""
    tree = experiment_tree(experiment)
    defaults: dict[str, type[Section]] = {
        "traces": TraceSection,
        "claims": ClaimSection,
        "published": PublishedSection,
    }
    for key, section in defaults.items():
        known = {field.name: field.default for field in msgspec.structs.fields(section)}
        tree[key] = [
            {name: value for name, value in one.items() if value != known[name] and value != []}
            for one in tree[key]
        ]
    return toml_like(tree)


def toml_like(tree: Mapping[str, object]) -> str:
    """Plain values as a TOML file; what is None or empty is left out."""
    lines = _entries({key: value for key, value in tree.items() if not _is_section(value)})
    for key, value in tree.items():
        if isinstance(value, Mapping):
            lines += ["", f"[{key}]", *_entries(value)]
        elif _is_section(value) and isinstance(value, list | tuple):
            for one in value:
                lines += ["", f"[[{key}]]", *_entries(one)]
    return "\n".join(lines)


def _entries(tree: Mapping[str, object]) -> list[str]:
    return [
        f"{key} = {json.dumps(value, ensure_ascii=False)}"
        for key, value in tree.items()
        if value not in (None, "", [], ())
    ]


def _is_section(value: object) -> bool:
    if isinstance(value, Mapping):
        return True
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping)
