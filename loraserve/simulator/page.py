"""The HTML page that compares simulations: one file, no scripts, nothing fetched from anywhere.

Takes values and PNG bytes, gives text; every string from outside is escaped. Looks like a run's own page.
"""

from collections.abc import Mapping, Sequence
from html import escape

from loraserve.simulator.figures import RunFigures
from traces.metrics import GroupSummary, formulas
from traces.plots import rank_label
from traces.report_page import PlotImages, definitions, document, figure, number, share

MAX_RANK_ROWS = 200
_FIGURES = ("Attainment", "Goodput", "Requests", "TTFT p50", "p95", "p99", "TBT p50", "p95", "Utilisation")
_UNITS = ("", "req/s", "req/s", "ms", "ms", "ms", "ms", "ms", "")
_COSTS = ("Copies", "Moved", "Cold misses")
_COST_UNITS = ("", "MiB", "")
_RANK_FIGURES = ("Requests", "Failed", "Attainment", "TTFT p50", "p95", "p99", "TBT p50", "p95")
_RANK_UNITS = ("", "", "", "ms", "ms", "ms", "ms", "ms")


def comparison_page(
    runs: Mapping[str, RunFigures],
    comparison: Sequence[PlotImages],
    images: Mapping[str, Sequence[PlotImages]],
    *,
    title: str,
    command: str,
    workload: Mapping[str, str],
) -> str:
    """The whole page; `images` are each run's own plots, by its label."""
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="verdict">{escape(_verdict(runs))}</p>',
        "<h2>Policies</h2>",
        _table("Policy", _FIGURES + _COSTS, _UNITS + _COST_UNITS, _run_rows(runs)),
        "<h2>Latency and load</h2>",
        _plots(comparison),
        "<h2>By rank</h2>",
        _table("Rank", _RANK_FIGURES, _RANK_UNITS, _rank_rows(runs)),
    ]
    for label, of_run in images.items():
        parts += [f"<h2>{escape(label)}</h2>", _plots(of_run)]
    slo = next(iter(runs.values())).summary.slo
    conditions = {
        **workload,
        "Targets": f"TTFT {number(slo.ttft_ms)} ms, TBT p95 {number(slo.tbt_ms)} ms",
        "Warm-up left out": f"{next(iter(runs.values())).summary.warmup_requests:,} requests",
    }
    parts += [
        "<h2>How this was simulated</h2>",
        f"<pre>{escape(command)}</pre>",
        definitions(conditions),
        "<h2>What the figures mean</h2>",
        definitions({**_own_formulas(), **formulas()}),
    ]
    return document(title, "\n".join(parts))


def _own_formulas() -> dict[str, str]:
    return {
        "utilisation": "share of the window in which replicas computed, meant over all replicas",
        "copies": "copies of adapters that the replicas held at the end",
        "moved": "bytes of adapters that were copied; what is in place at the start is not counted",
        "cold misses": "requests that had to wait for a copy of their adapter",
    }


def _verdict(runs: Mapping[str, RunFigures]) -> str:
    requests = next(iter(runs.values())).num_requests
    shares = {label: run.summary.overall.attainment for label, run in runs.items()}
    known = {label: value for label, value in shares.items() if value is not None}
    if not known:
        return f"{requests:,} requests, none of them after the warm-up."
    best = max(known, key=lambda label: known[label])
    if len(runs) == 1:
        return f"{requests:,} requests; {share(known[best])} met every target."
    worst = min(known, key=lambda label: known[label])
    return (
        f"{requests:,} requests under each policy. Most met every target with {best}: {share(known[best])};"
        f" fewest with {worst}: {share(known[worst])}."
    )


def _run_rows(runs: Mapping[str, RunFigures]) -> list[tuple[str, list[str]]]:
    rows = []
    for label, run in runs.items():
        group = run.summary.overall
        cells = [share(group.attainment), number(group.request_goodput), number(group.request_throughput)]
        cells += [*_latencies(group), share(run.utilisation)]
        cells += [f"{run.copies:,}", number(run.bytes_moved / 2**20), f"{run.cold_misses:,}"]
        rows.append((label, cells))
    return rows


def _rank_rows(runs: Mapping[str, RunFigures]) -> list[tuple[str, list[str]]]:
    ranks = list(dict.fromkeys(name for run in runs.values() for name in run.summary.per_rank))
    rows = []
    for name in ranks:
        for label, run in runs.items():
            group = run.summary.per_rank.get(name)
            if group is not None:
                failed = group.requests - group.completed
                cells = [f"{group.requests:,}", f"{failed:,}", share(group.attainment), *_latencies(group)]
                rows.append((f"{rank_label(name).capitalize()}, {label}", cells))
    return rows[:MAX_RANK_ROWS]


def _latencies(group: GroupSummary) -> list[str]:
    ttft, tbt = group.ttft_ms, group.itl_ms
    return [number(value) for value in (ttft.median, ttft.p95, ttft.p99, tbt.median, tbt.p95)]


def _table(
    first: str, names: Sequence[str], units: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]
) -> str:
    head = "".join(
        f'<th scope="col">{name}<small>{unit}</small></th>' for name, unit in zip(names, units, strict=True)
    )
    body = "\n".join(
        f'<tr><th scope="row">{escape(label)}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        for label, cells in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table>\n<thead><tr><th scope="col">{first}</th>{head}</tr>'
        f"</thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _plots(images: Sequence[PlotImages]) -> str:
    return f'<div class="plots">{"".join(figure(image) for image in images)}</div>'
