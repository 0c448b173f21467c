"""Compares placement policies, each with the routing that its authors meant for it, over rates.

In the simulator, 4 replicas of the profile a100-llama2-7b-bgmv-42 (4,123 tokens/s at rank 8, 2,434 at
rank 128), 25 adapters of ranks 8 to 128, Poisson arrivals, 600 s, by default. A fleet is what ranks cost
in a step: padded_batch, padded_config or sum. Workloads are LoRAServe's: skew (rank 128 four times as
popular), slide (from that to rank 8), uniform. Every contender gets the same requests, and the same warm-up
is left out. Rates are shares of the fluid rate, at which all replicas would be busy if ranks never met in a
batch. With --live the emulated cluster serves such requests instead, see policies_live.py; with --engine
vllm replicas that compute, see policies_vllm.py.

  runs       per contender, rate and seed: TTFT p50, p95, p99, TBT p95, attainment, bytes moved, mean
             resident bytes, cold misses
  highest    the highest rate with TTFT p95 <= 2 s and TBT p95 <= 150 ms, to 2 %, by bisection, per seed
  against_best   optimal's TTFT p95 over the best other's at each rate; `worse` if beyond noise: the lower
             end of the paired seeds' ratio (one-sided 95 %, t of the logarithms) is above 1
  rate_over  optimal's highest rate over each other's
  beyond     TTFT p95 of both at 1.15 x loraserve's highest rate
  bytes      moved over loraserve's, held over least-loaded's
  over_scratch   optimal's TTFT p95 at each rate, and what it moves, over those of plans made from scratch

Goals: padded_batch: never worse than the best other; beyond >= 10; rate over loraserve >= 1.2, over
least-loaded >= 1.1, with fewer bytes held; moved under slide <= 0.5, with TTFT p95 <= 1.05 of plans from
scratch. sum and padded_config: within 3 % of the best.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any

import bench_common as common
import policies_cases as cases
import policies_live
import policies_ratios as ratios
import policies_report as report
import policies_runs as runs
import policies_vllm
from policies_cases import Case, Outcome, Setting, Workload

from loraserve.errors import LoraServeError
from loraserve.experiments.contenders import Contender

SHARES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
BEYOND = 1.15
LIVE_RATES = f"{BEYOND}x"
LIVE_CONTENDERS = f"{cases.OURS},{cases.RIVAL},{cases.EVERYWHERE},everywhere-marginal"
LIVE_JOBS = 2
VLLM_CONTENDERS = f"{cases.OURS},{cases.RIVAL},{cases.EVERYWHERE}"
VLLM_REPLICAS, VLLM_ADAPTERS = 2, 10
VLLM_RATES = "0.8x"
"""Router and client take processors from the engines, which the simulator does not know of."""
LIVE_RESTART_S = 5.0
"""An emulated replica is back so soon with another `max_lora_rank`."""


def compare(
    setting: Setting,
    workload: Workload,
    contenders: Sequence[Contender],
    rates: Sequence[float],
    seeds: Sequence[int],
    runner: runs.Runner,
    *,
    searching: bool,
) -> dict[str, Any]:
    """Everything about one fleet and one workload."""
    what = f"{setting.fleet}, {workload.name}"
    fluid = cases.fluid_rate_per_s(setting, workload)

    def case(contender: Contender, rate: float, seed: int) -> Case:
        return Case(contender=contender, workload=workload, rate_per_s=rate, seed=seed, setting=setting)

    outcomes = runner.all(what, cases.run_case, _grid(setting, workload, contenders, rates, seeds))
    found: dict[str, Any] = {
        "fluid_rate_per_s": fluid,
        "runs": outcomes,
        "against_best": ratios.against_best(outcomes),
        "bytes": ratios.bytes_ratios(outcomes),
        "over_scratch": ratios.over_scratch(outcomes),
    }
    if searching:
        searches = [case(one, fluid, seed) for seed in seeds for one in contenders]
        highest: dict[str, dict[int, float]] = {}
        for ended in runner.all(f"{what}, highest", runs.search, searches):
            highest.setdefault(ended.case.contender.name, {})[ended.case.seed] = ended.held_per_s
        found |= {"highest": highest, "rate_over": ratios.rate_ratios(highest)}
        found["beyond"] = _beyond(what, case, contenders, highest, runner)
    return found


def _grid(
    setting: Setting,
    workload: Workload,
    contenders: Sequence[Contender],
    rates: Sequence[float],
    seeds: Sequence[int],
) -> list[Case]:
    return [
        Case(contender=one, workload=workload, rate_per_s=rate, seed=seed, setting=setting)
        for rate in rates
        for seed in seeds
        for one in contenders
    ]


def _beyond(
    what: str,
    case: Callable[[Contender, float, int], Case],
    contenders: Sequence[Contender],
    highest: dict[str, dict[int, float]],
    runner: runs.Runner,
) -> dict[str, Any]:
    rival = highest.get(cases.RIVAL, {})
    both = [one for one in contenders if one.name in (cases.OURS, cases.RIVAL)]
    if not rival or len(both) < 2:
        return {}
    rate = BEYOND * sum(rival.values()) / len(rival)
    grid = [case(one, rate, seed) for one in both for seed in rival]
    return ratios.ttft_ratio(runner.all(f"{what}, beyond", cases.run_case, grid))


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    made = common.parser("policies", __doc__, quick="shorter, at fewer rates, with one seed")
    made.add_argument("--live", action="store_true", help="on the emulated cluster instead of simulated")
    made.add_argument(
        "--engine", choices=("emulated", "vllm"), default="emulated", help="live: replicas (%(default)s)"
    )
    made.add_argument(
        "--profiles",
        type=Path,
        metavar="DIR",
        help="vllm: stock.toml and rank-true.toml, measured if they are not there (OUT/profiles)",
    )
    fleets = ", ".join(cases.FLEETS)
    made.add_argument(
        "--fleet",
        default="",
        metavar="F,...",
        help=f"of {fleets} (all); vllm: of {', '.join(cases.VLLM_RANKS)}",
    )
    made.add_argument(
        "--workload", default="", metavar="W,...", help=f"of {', '.join(cases.WORKLOADS)} (all)"
    )
    made.add_argument("--policy", default="", metavar="P,...", help="contenders, or POLICY/ROUTING (all)")
    made.add_argument(
        "--rates",
        default="",
        metavar="R,...",
        help="requests/s, or such as 0.9x, of loraserve's highest rate in the simulator (shares of the fluid"
        f" rate; live {LIVE_RATES}, vllm {VLLM_RATES})",
    )
    made.add_argument("--seeds", default="0,1,2", metavar="N,...", help="(%(default)s)")
    made.add_argument("--duration", type=common.seconds, metavar="S", help="of a run (600, live 120)")
    made.add_argument("--warmup", type=common.seconds, metavar="S", help="left out of it (120, live 20)")
    made.add_argument("--epoch", type=common.seconds, metavar="S", help="from plan to plan (60, live 5)")
    made.add_argument("--window", type=common.seconds, metavar="S", help="demand is measured over (an epoch)")
    made.add_argument(
        "--speed", type=common.seconds, default=1.0, metavar="X", help="0.5: everything is slower"
    )
    made.add_argument("--pool-mib", type=common.at_least_one, metavar="N", help="adapters per replica (all)")
    made.add_argument("--no-search", action="store_true", help="no search for the highest rate")
    made.add_argument(
        "--jobs",
        type=common.at_least_one,
        metavar="N",
        help=f"processes (one per core; live {LIVE_JOBS} clusters)",
    )
    made.add_argument(
        "--attempts", type=common.at_least_one, default=2, metavar="N", help="at a live run (%(default)s)"
    )
    made.add_argument(
        "--out", type=Path, metavar="DIR", help="write runs and curves there; live runs that are there stay"
    )
    return made.parse_args(arguments)


def compared(options: argparse.Namespace) -> dict[str, Any]:
    """The comparison, simulated or live: by fleet, then workload."""
    is_vllm = options.engine == "vllm"
    known = list(cases.VLLM_RANKS) if is_vllm else cases.FLEETS
    fleets = _chosen(options.fleet or "padded_batch" * (options.live and not is_vllm), known, "--fleet")
    workloads = _chosen(options.workload or "slide" * options.live, cases.WORKLOADS, "--workload")
    usual = VLLM_CONTENDERS if is_vllm else LIVE_CONTENDERS * options.live
    contenders = cases.available(_names(options.policy or usual))
    seeds = [int(one) for one in _names(options.seeds)][: 1 if options.quick else None]
    made = _setting(options)
    found: dict[str, Any] = {}
    with runs.runner(1 if options.live else options.jobs, _note) as runner, _kept(options) as folder:
        for fleet in fleets:
            setting = replace(made, fleet=fleet)
            if is_vllm:
                profile = policies_vllm.profile_file(
                    setting, options.profiles or folder.parent / "profiles", _note
                )
                setting = replace(setting, profile=str(profile.resolve()))
            for name in workloads:
                workload = cases.WORKLOADS[name]
                rates = _rates(options, setting, workload, seeds)
                if options.live:
                    wanted = _grid(setting, workload, contenders, rates, seeds)
                    kept = policies_live.LiveOptions(
                        jobs=options.jobs or (1 if is_vllm else LIVE_JOBS),
                        attempts=options.attempts,
                        folder=folder,
                        note=_note,
                    )
                    one = policies_live.live(setting, wanted, kept)
                else:
                    searching = not (options.no_search or options.quick)
                    one = compare(setting, workload, contenders, rates, seeds, runner, searching=searching)
                found.setdefault(fleet, {})[name] = one
                if not options.json:
                    report.print_one(fleet, name, one)
    return found


@contextmanager
def _kept(options: argparse.Namespace) -> Iterator[Path]:
    """The folder for the results of live runs."""
    if options.out is not None:
        yield options.out / "live"
        return
    with tempfile.TemporaryDirectory(prefix="loraserve-policies-") as name:
        yield Path(name) / "live"


def _rates(
    options: argparse.Namespace, setting: Setting, workload: Workload, seeds: Sequence[int]
) -> list[float]:
    fluid = cases.fluid_rate_per_s(setting, workload)
    usual = VLLM_RATES if options.engine == "vllm" else LIVE_RATES * options.live
    asked = _names(options.rates or usual)
    if not asked:
        shares = SHARES[:: len(SHARES) // 2] if options.quick else SHARES
        return [round(share * fluid, 1) for share in shares]
    rival = 0.0
    if any(one.endswith("x") for one in asked):
        (contender,) = cases.available([cases.RIVAL])
        searches = _grid(setting, workload, [contender], [fluid], seeds)
        held = [runs.search(case).held_per_s for case in searches]
        rival = sum(held) / len(held)
        _note(f"{setting.fleet}, {workload.name}: {cases.RIVAL} holds the SLO to {rival:.2f}/s, simulated")
    return [round(float(one[:-1]) * rival, 1) if one.endswith("x") else float(one) for one in asked]


def _setting(options: argparse.Namespace) -> Setting:
    duration_s, warmup_s, epoch_s = 600.0, 120.0, 60.0
    plain = Setting()
    if options.engine == "vllm":
        duration_s, warmup_s, epoch_s = (15.0, 3.0, 5.0) if options.quick else (40.0, 8.0, 5.0)
        plain = Setting(replicas=VLLM_REPLICAS, adapters=VLLM_ADAPTERS)
    elif options.live:
        duration_s, warmup_s, epoch_s = (20.0, 5.0, 5.0) if options.quick else (120.0, 20.0, 5.0)
    elif options.quick:
        duration_s, warmup_s, epoch_s = 200.0, 40.0, 20.0
    return replace(
        plain,
        duration_s=options.duration or duration_s,
        warmup_s=options.warmup or warmup_s,
        epoch_s=options.epoch or epoch_s,
        window_s=options.window or 0.0,
        pool_bytes=(options.pool_mib or 0) * 2**20,
        speed=options.speed,
        restart_s=LIVE_RESTART_S if options.live else 60.0,
    )


def _names(text: str) -> list[str]:
    return [one.strip() for one in text.split(",") if one.strip()]


def _chosen(text: str, known: Sequence[str] | dict[str, Any], option: str) -> list[str]:
    names = _names(text) or list(known)
    for name in names:
        if name not in known:
            raise SystemExit(f"policies: {option}: {name!r}; expected of {', '.join(known)}")
    return names


def _note(line: str) -> None:
    print(f"policies: {line}", file=sys.stderr, flush=True)


def outcomes_in(found: dict[str, Any]) -> list[Outcome]:
    """Every run of a comparison."""
    return [one for fleet in found.values() for workload in fleet.values() for one in workload["runs"]]


def main() -> int:
    """Compare, print, write."""
    options = parse(sys.argv[1:])
    options.live = options.live or options.engine == "vllm"
    common.end_in_order_when_told()
    try:
        found = compared(options)
    except LoraServeError as error:
        _note(str(error))
        return 2
    if options.out is not None:
        report.write(options.out, outcomes_in(found))
    told = common.conditions("policies", profile=cases.PROFILE, live=options.live, speed=options.speed)
    if options.json:
        print(json.dumps(cases.plain({"fleets": _trees(found), "conditions": told})))
    return 0


def _trees(value: Any) -> Any:
    """The same with runs as plain values."""
    if isinstance(value, dict):
        return {key: _trees(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_trees(one) for one in value]
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


if __name__ == "__main__":
    sys.exit(main())
