"""Which plots a report has: what a reader looks at first, and no more than a page can carry."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from loraserve.experiments.report.against import against_rate, against_replicas
from loraserve.experiments.report.aggregate import FIGURES, Aggregate, Setting, counted, rate_text
from loraserve.experiments.report.looks import MAX_PANELS
from loraserve.experiments.report.maps import MAX_MAPS, mapped_trace, rank_maps
from loraserve.experiments.report.overviews import costs, fewest_probes, figure_bars, highest_bars
from traces.plots import Plot

HIGHEST, FEWEST = "Highest rates inside the SLO", "Fewest replicas inside the SLO"
OVER_RATE, OVER_REPLICAS = "Against the rate", "Against replicas"
MAPS, COSTS = "Ranks on replicas over time", "What adapters cost"
MAX_PLOTS = 24
MAX_BAR_PANELS = 6
_COST_FIGURES = frozenset(("resident_bytes", "bytes_moved", "cold_misses", "copies"))
_OVER_RATE = ("ttft_p95_ms", "tbt_p95_ms", "attainment")


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A plot under a heading; the lower its `rank`, the sooner it is drawn."""

    heading: str
    rank: int
    plot: Plot


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The plots of a report in its order, and what was left out, in words."""

    plots: tuple[Drawn, ...]
    left_out: tuple[str, ...]


def choose_plots(data: Aggregate) -> Chosen:
    """At most MAX_PLOTS of what this experiment can show."""
    offered = list(_offered(data))
    first = sorted(range(len(offered)), key=lambda place: (offered[place].rank, place))[:MAX_PLOTS]
    dropped = [one for place, one in enumerate(offered) if place not in first]
    return Chosen(
        plots=tuple(offered[place] for place in sorted(first)),
        left_out=tuple(_left_out(data, dropped)),
    )


def _left_out(data: Aggregate, dropped: list[Drawn]) -> Iterator[str]:
    if dropped:
        names = "; ".join(one.plot.name.replace("_", " ") for one in dropped)
        yield f"{counted(len(dropped), 'plot')} more than a page carries: {names}"
    if len(data.traces) > MAX_PANELS:
        yield f"the plots show the first {MAX_PANELS} of {len(data.traces)} workloads"
    unknown = [one.name for one in data.result.experiment.published if one.figure not in FIGURES]
    if unknown:
        yield f"published lines of figures that are not measured here: {', '.join(unknown)}"


def _offered(data: Aggregate) -> Iterator[Drawn]:
    yield from _highest(data)
    yield from _fewest(data)
    settings = data.runs()
    yield from _over_rate(data, settings)
    yield from _over_replicas(data)
    asked = data.middle_rate
    for place, setting in enumerate(settings):
        yield from _maps(data, setting, place)
        if asked is not None:
            yield _costs(data, setting, asked, place)


def _highest(data: Aggregate) -> Iterator[Drawn]:
    searched = [
        setting
        for setting in data.runs()
        if any(curve.highest is not None for (_, of, _), curve in data.curves.items() if of == setting)
    ]
    for start in range(0, len(searched), MAX_BAR_PANELS):
        some = searched[start : start + MAX_BAR_PANELS]
        yield Drawn(
            heading=HIGHEST,
            rank=0,
            plot=Plot(
                name=_name("highest_rates", str(start // MAX_BAR_PANELS + 1) if start else ""),
                caption="Highest rate inside the SLO, requests/s; the thin lines reach from the least to the"
                " most of the seeds, a cross stands where no rate held.",
                draw=partial(highest_bars, data, some),
            ),
        )


def _fewest(data: Aggregate) -> Iterator[Drawn]:
    for place, setting in enumerate(data.searches()):
        curves = [curve for (_, of, _), curve in data.curves.items() if of == setting]
        answers = max((curve.fewest for curve in curves), key=len, default=())
        for at, one in enumerate(answers):
            rate = rate_text(one.asked, one.rate_per_s)
            where = data.setting_name(setting)
            yield Drawn(
                heading=FEWEST,
                rank=1 + place,
                plot=Plot(
                    name=_name("fewest_replicas", where, one.asked if len(answers) > 1 else ""),
                    caption=f"Which numbers of replicas were tried at {rate}{_at(where)}: filled where the"
                    " SLO held in every seed, half where in some, hollow where in none; the ring is the"
                    " answer.",
                    draw=partial(fewest_probes, data, setting, at),
                ),
            )


def _over_rate(data: Aggregate, settings: Sequence[Setting]) -> Iterator[Drawn]:
    """A plot per setting with a panel per trace; one of all settings for one trace, or for one rate."""
    rates = data.result.experiment.all_rates
    if not rates or not settings:
        return
    draw = against_rate if len(rates) > 1 else figure_bars
    is_one = len(rates) == 1 or len(data.traces) == 1
    groups = (
        [settings[at : at + MAX_BAR_PANELS] for at in range(0, len(settings), MAX_BAR_PANELS)]
        if is_one
        else [(setting,) for setting in settings]
    )
    named = [_OVER_RATE[0], *(name for name in data.asked_for if name not in _COST_FIGURES), *_OVER_RATE[1:]]
    for place, group in enumerate(groups):
        where = data.setting_name(group[0]) if len(group) == 1 else ""
        number = str(place + 1) if len(group) > 1 and place else ""
        for order, name in enumerate(dict.fromkeys(named)):
            yield Drawn(
                heading=OVER_RATE,
                # Every setting's TTFT before any setting's TBT.
                rank=10 + 40 * order + place,
                plot=Plot(
                    name=_name(name.removesuffix("_ms").removesuffix("_per_s"), where, number),
                    caption=_caption(name, where, rates),
                    draw=partial(draw, data, group, name),
                ),
            )


def _caption(name: str, where: str, rates: Sequence[float | str]) -> str:
    figure = FIGURES[name]
    what = figure.title
    if len(rates) == 1:
        rate = _rate_words(str(rates[0]))
        never = ", a cross stands for no finite value" if figure.is_log else ""
        return (
            f"{what} at {rate}{_at(where)}; the thin lines reach from the least to the most of the"
            f" seeds{never}."
        )
    late = " A hollow marker at the top stands for what had no finite value." if figure.is_log else ""
    return (
        f"{what} against the rate{_at(where)}; the bands reach from the least to the most of the seeds.{late}"
    )


def _over_replicas(data: Aggregate) -> Iterator[Drawn]:
    asked = data.middle_rate
    sizes: dict[tuple[str, str], list[Setting]] = {}
    for setting in data.runs():
        sizes.setdefault((setting.kernel, setting.profile), []).append(setting)
    extra = [
        one.figure
        for one in data.result.experiment.published
        if one.over == "replicas" and one.figure in FIGURES
    ]
    for settings in sizes.values():
        if asked is None or len(settings) < 2:
            continue
        where = data.setting_name(settings[0], with_replicas=False)
        for name in dict.fromkeys(["attainment", *extra]):
            yield Drawn(
                heading=OVER_REPLICAS,
                rank=18,
                plot=Plot(
                    name=_name(name.removesuffix("_ms"), "replicas", where),
                    caption=f"{FIGURES[name].label} against replicas at {_rate_words(asked)}{_at(where)}.",
                    draw=partial(against_replicas, data, settings[0], asked, name),
                ),
            )


def _maps(data: Aggregate, setting: Setting, place: int) -> Iterator[Drawn]:
    trace = mapped_trace(data, setting)
    if trace is None:
        return
    where = data.setting_name(setting)
    why = ", where the policies differ most" if min(len(data.traces), len(data.policies)) > 1 else ""
    few = f"; the first {MAX_MAPS} policies" if len(data.policies) > MAX_MAPS else ""
    yield Drawn(
        heading=MAPS,
        rank=20 + place,
        plot=Plot(
            name=_name("ranks", where),
            caption=f"The largest rank in a step of each replica over time, on {trace}{_at(where)}{why}{few}."
            " The fainter, the less of the time was computed in; empty where a"
            " replica rested or had base-model requests alone.",
            draw=partial(rank_maps, data, trace, setting),
        ),
    )


def _costs(data: Aggregate, setting: Setting, asked: str, place: int) -> Drawn:
    where = data.setting_name(setting)
    return Drawn(
        heading=COSTS,
        rank=30 + place,
        plot=Plot(
            name=_name("costs", where),
            caption=f"Adapters moved, requests that had to wait for their adapter, and adapters held, at"
            f" {_rate_words(asked)}{_at(where)}: a bar for the median over the workloads, a mark for each.",
            draw=partial(costs, data, setting, asked),
        ),
    )


def _rate_words(asked: str) -> str:
    if asked == "own":
        return "the traces' own rates"
    return f"{asked} of the fluid rate" if asked.endswith("x") else rate_text(asked, 0.0)


def _at(where: str) -> str:
    return f" ({where})" if where else ""


def _name(*parts: str) -> str:
    """A file's stem."""
    joined = "_".join(part for part in parts if part)
    kept = "".join(one if one.isalnum() or one in ".-" else "_" for one in joined.replace(", ", "_"))
    return kept.strip("_.")
