"""The HTML page of a run: one file, no scripts, nothing fetched from anywhere.

Takes values and PNG bytes, gives text; every string from outside is escaped.
"""

import base64
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources

from traces.metrics import GroupSummary, Summary, formulas
from traces.plots import rank_label
from traces.records import Outcome, RequestRecord

MAX_ADAPTER_ROWS = 100
MAX_FAILURE_ROWS = 20
_NOTHING = "–"
# Paper is light, whatever the screen is.
_DARK_PAGE = "screen and (prefers-color-scheme: dark)"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlotImages:
    """A plot for light and for dark pages."""

    caption: str
    light_png: bytes
    dark_png: bytes


def page(
    summary: Summary,
    records: Sequence[RequestRecord],
    images: Sequence[PlotImages],
    *,
    title: str,
    command: str,
    environment: Mapping[str, str],
) -> str:
    """The whole page."""
    body = "\n".join(
        (
            f"<h1>{escape(title)}</h1>",
            f'<p class="verdict">{_verdict(summary)}</p>',
            _void(summary),
            _key_figures(summary),
            "<h2>By rank</h2>",
            _table("Rank", {"All": summary.overall} | _labelled(summary.per_rank)),
            "<h2>Latency and load</h2>",
            f'<div class="plots">{"".join(figure(image) for image in images)}</div>',
            _adapters(summary),
            _failures(records),
            "<h2>How this was run</h2>",
            f"<pre>{escape(command)}</pre>",
            definitions({**environment, **_conditions(summary)}),
            "<h2>What the figures mean</h2>",
            definitions(formulas()),
        )
    )
    return document(title, body)


def document(title: str, body: str) -> str:
    """A page with this body, which is HTML, in the style of reports."""
    style = (resources.files("traces") / "report.css").read_text(encoding="utf-8")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def number(value: float | None) -> str:
    """A figure for a person: three digits or more, '∞' for what never came, '–' for nothing measured."""
    if value is None:
        return _NOTHING
    if math.isinf(value):
        return "∞"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 1 else f"{value:.2f}"


def share(value: float | None) -> str:
    """A share as per cent."""
    return _NOTHING if value is None else f"{value:.1%}"


def _verdict(summary: Summary) -> str:
    group = summary.overall
    if not group.requests:
        return "No requests after the warm-up."
    met = "inside" if group.slo_met else "outside"
    return (
        f"{group.completed:,} of {group.requests:,} requests completed in {number(summary.duration_s)} s;"
        f" {share(group.attainment)} met every target. The run as a whole was {met} its SLO"
        f" (TTFT p95 ≤ {number(summary.slo.ttft_ms)} ms, TBT p95 ≤ {number(summary.slo.tbt_ms)} ms)."
    )


def _void(summary: Summary) -> str:
    if not summary.void:
        return ""
    reason = escape(summary.void_reason)
    return f'<p class="void" role="alert"><strong>This run is void:</strong> {reason}.</p>'


def _key_figures(summary: Summary) -> str:
    group = summary.overall
    figures = (
        ("Attainment", share(group.attainment), ""),
        ("Goodput", number(group.request_goodput), "req/s"),
        ("TTFT p95", number(group.ttft_ms.p95), "ms"),
        ("TBT p95", number(group.itl_ms.p95), "ms"),
        ("E2E p95", number(group.e2el_ms.p95), "ms"),
        ("Output", number(group.output_throughput), "tokens/s"),
    )
    cells = "".join(
        f"<div><dt>{name}</dt><dd>{value} <small>{unit}</small></dd></div>" for name, value, unit in figures
    )
    return f'<dl class="figures">{cells}</dl>'


def _labelled(groups: Mapping[str, GroupSummary]) -> dict[str, GroupSummary]:
    return {rank_label(name).capitalize(): group for name, group in groups.items()}


_LATENCIES = (("TTFT, ms", 3), ("TBT, ms", 3), ("TPOT, ms", 2), ("E2E, ms", 2))
_COUNTS = (("Requests", ""), ("Failed", ""), ("Attainment", ""), ("Goodput", "req/s"), ("Output", "tokens/s"))


def _table(first_column: str, groups: Mapping[str, GroupSummary]) -> str:
    counts = "".join(
        f'<th rowspan="2" scope="col">{name}<small>{unit}</small></th>' for name, unit in _COUNTS
    )
    spans = "".join(f'<th colspan="{span}" scope="colgroup">{name}</th>' for name, span in _LATENCIES)
    quantiles = "".join(
        f'<th scope="col">{name}</th>' for _, span in _LATENCIES for name in ("p50", "p95", "p99")[:span]
    )
    rows = "\n".join(_row(name, group) for name, group in groups.items())
    return (
        '<div class="scroll" tabindex="0"><table>\n<thead><tr>'
        f'<th rowspan="2" scope="col">{first_column}</th>{counts}{spans}</tr>\n<tr>{quantiles}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )


def _row(name: str, group: GroupSummary) -> str:
    failed = group.requests - group.completed
    cells = [
        f"<td>{group.requests:,}</td>",
        f'<td class="bad">{failed:,}</td>' if failed else "<td>0</td>",
        f"<td>{share(group.attainment)}</td>",
        f"<td>{number(group.request_goodput)}</td>",
        f"<td>{number(group.output_throughput)}</td>",
    ]
    samples = (group.ttft_ms, group.itl_ms, group.tpot_ms, group.e2el_ms)
    for sample, (_, span) in zip(samples, _LATENCIES, strict=True):
        values = (sample.median, sample.p95, sample.p99)[:span]
        cells += [f"<td>{number(value)}</td>" for value in values]
    kind = ' class="all"' if name == "All" else ""
    return f'<tr{kind}><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>'


def figure(image: PlotImages) -> str:
    """A plot with its caption, the one for dark pages on those."""

    def data(png: bytes) -> str:
        return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"

    caption = escape(image.caption)
    return (
        f'<figure><picture><source media="{_DARK_PAGE}" srcset="{data(image.dark_png)}">'
        f'<img alt="{caption}" src="{data(image.light_png)}"></picture>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _adapters(summary: Summary) -> str:
    groups = dict(list(summary.per_adapter.items())[:MAX_ADAPTER_ROWS])
    if not groups:
        return ""
    left_out = len(summary.per_adapter) - len(groups)
    note = f'<p class="note">{left_out:,} more adapters are in summary.json.</p>' if left_out else ""
    return f"<h2>By adapter</h2>\n{_table('Adapter', groups)}\n{note}"


def _failures(records: Sequence[RequestRecord]) -> str:
    counts = Counter(
        (record.outcome.value, record.status)
        for record in records
        if record.outcome is not Outcome.OK and not record.warmup
    )
    if not counts:
        return ""
    rows = "\n".join(
        f'<tr><th scope="row">{outcome}</th><td>{count:,}</td>'
        f'<td class="text">{escape(status) or _NOTHING}</td></tr>'
        for (outcome, status), count in counts.most_common(MAX_FAILURE_ROWS)
    )
    left_out = len(counts) - MAX_FAILURE_ROWS
    note = f'<p class="note">{left_out:,} more reasons are in records.jsonl.</p>' if left_out > 0 else ""
    head = '<th scope="col">Outcome</th><th scope="col">Requests</th><th class="text" scope="col">Status</th>'
    return (
        f'<h2>What failed</h2>\n<div class="scroll" tabindex="0"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody></table></div>\n{note}"
    )


def _conditions(summary: Summary) -> dict[str, str]:
    pacing = summary.pacing
    conditions = {"Warm-up left out": f"{summary.warmup_requests:,} requests"}
    if pacing is not None:
        conditions["Pacing error"] = (
            f"p50 {number(pacing.p50_ms)} ms, p99 {number(pacing.p99_ms)} ms,"
            f" largest {number(pacing.max_ms)} ms"
        )
    conditions["TTFT from send"] = (
        f"p50 {number(summary.overall.ttft_from_send_ms.median)} ms,"
        f" p99 {number(summary.overall.ttft_from_send_ms.p99)} ms"
    )
    conditions["Tokens per message"] = number(summary.overall.tokens_per_message)
    return conditions


def definitions(entries: Mapping[str, str]) -> str:
    """Names and what is said of them."""
    items = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in entries.items())
    return f'<dl class="list">\n{items}\n</dl>'
