"""The file of an experiment: strict TOML, every key with a default but `traces` and `policies`.

Everything in it that is a list multiplies: traces, policies, replicas, kernels, profiles, rates and seeds.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

import loraserve.experiments
from loraserve.errors import BadInputError, ConfigError
from loraserve.experiments.contenders import Contender, contenders
from loraserve.sections import Section, checked, read_toml, shown
from placement.latency import RankKernel

SUFFIX = ".toml"
SHIPPED = "experiment:"
"""`experiment:NAME` is one that ships with LoRAServe."""
OWN = "own"
"""The rate of a trace as it is."""
MAX_REPLICAS = 1024

Rate = Annotated[float, Meta(gt=0, le=1e9, description='a number above 0, a share such as "0.85x" or "own"')]
RateText = Annotated[
    str,
    Meta(
        pattern=r"\A(own|[0-9]+(\.[0-9]+)?x)\Z",
        description='a number above 0, a share such as "0.85x" or "own"',
    ),
]
Seconds = Annotated[float, Meta(ge=0, le=3e6)]
Above = Annotated[float, Meta(gt=0, le=1e9)]
Finite = Annotated[float, Meta(ge=-1e18, le=1e18)]
Replicas = Annotated[int, Meta(ge=1, le=MAX_REPLICAS)]
Name = Annotated[
    str,
    Meta(
        pattern=r"\A[a-z0-9][a-z0-9.+-]{0,60}\Z", description="1 to 61 of the characters a-z, 0-9, ., + and -"
    ),
]


def _list() -> Any:
    return msgspec.field(default_factory=list)


class TraceSection(Section, frozen=True, kw_only=True):
    """One workload under a short name, see `SimulatedWorkload`; a file's path is seen from the folder of
    traces, `--traces`, or else from the experiment's own. `note` is for the report."""

    name: Name
    source: str
    note: str = ""
    format: str | None = None
    on_bad_row: Literal["refuse", "skip"] = "refuse"
    limit: Annotated[int, Meta(ge=1)] | None = None
    duration_s: Above | None = None
    requests: Annotated[int, Meta(ge=1)] | None = None
    speedup: Above | None = None
    only_adapters: bool = False
    adapters: Annotated[int, Meta(ge=1)] | None = None
    ranks: str | None = None
    correlation: Annotated[float, Meta(ge=-1, le=1)] | None = None
    assign: str = "auto"
    parameter: Finite | None = None
    base_share: Annotated[float, Meta(ge=0, le=1)] = 0.0
    lengths: str | None = None


class ClusterSection(Section, frozen=True):
    """What is the same in every run, see `ClusterOptions`; `pool_mib` 0: no limit. Every trace that does not
    say otherwise is simulated for `duration_s`, 0: as long as it is by itself."""

    duration_s: Seconds = 0.0
    warmup_s: Seconds = 0.0
    epoch_s: Above = 60.0
    window_s: Seconds = 0.0
    routers: Annotated[int, Meta(ge=1, le=1000)] = 1
    speed: Above = 1.0
    pool_mib: Annotated[float, Meta(ge=0, le=1e9)] = 0.0
    on_demand: bool = False
    from_origin_only: bool = False
    max_waiting: Annotated[int, Meta(ge=1)] = 256
    report_interval_s: Above = 0.1
    max_lora_ranks: Literal["fixed", "planned"] = "fixed"
    restart_s: Seconds = 60.0
    migration: Literal["off", "dlora"] = "off"
    fail: list[str] = _list()


class SloSection(Section, frozen=True):
    """The first two at the 95th percentile. `token_ms`, 0: none, is for the whole time of a request over its
    output tokens, and decides nothing but `Point.token_attainment`."""

    ttft_ms: Above = 2000.0
    tbt_ms: Above = 150.0
    token_ms: Annotated[float, Meta(ge=0, le=1e9)] = 0.0


class FindSection(Section, frozen=True):
    """What is searched besides the runs at `rates`: for each curve and seed the highest rate inside the SLO,
    to `tolerance`, and for each rate of `fewest_replicas_at` the fewest replicas from 1 to `most_replicas`
    that hold the SLO, whatever `replicas` says."""

    highest_rate: bool = False
    tolerance: Annotated[float, Meta(gt=0, le=1)] = 0.02
    fewest_replicas_at: list[Rate | Literal["own"]] = _list()
    most_replicas: Replicas = 64


class ClaimSection(Section, frozen=True, kw_only=True):
    """A figure that somebody published, to stand beside ours: how many times better `figure` is with `policy`
    than with `over`, or the figure itself where `over` is ''. `paper` is the published number. It is about
    the traces and kernels named, all if none are, and about the runs at `rate`, for figures of one rate."""

    text: str
    figure: Literal[
        "highest_rate",
        "fewest_replicas",
        "ttft_p50_ms",
        "ttft_p95_ms",
        "ttft_p99_ms",
        "tbt_p95_ms",
        "tpot_mean_ms",
        "latency_per_token_ms",
        "wait_per_token_ms",
        "token_attainment",
        "throughput_per_s",
        "resident_bytes",
    ]
    policy: str
    over: str = ""
    paper: Finite | None = None
    source: str = ""
    why: str = ""
    traces: list[str] = _list()
    kernels: list[str] = _list()
    rate: Rate | RateText | None = None


class PublishedSection(Section, frozen=True, kw_only=True):
    """A published line, drawn beside ours in the plot of `figure` over the rate (or over replicas)."""

    name: str
    figure: str
    points: Annotated[list[tuple[Finite, Finite]], Meta(min_length=1)]
    over: Literal["rate_per_s", "replicas"] = "rate_per_s"
    source: str = ""


class Experiment(Section, frozen=True, kw_only=True):
    """A whole experiment; `kernels` empty: the profile's own, `rates` empty: none but those searched, or if
    nothing is searched the traces' own. Shares such as "0.85x" are of the rate at which all replicas would be
    busy if ranks never met in a batch. `map_rate` is the rate whose map of replicas and ranks is kept, of the
    first seed; the middle one of `rates` by default."""

    title: str = ""
    summary: str = ""
    traces: Annotated[list[TraceSection], Meta(min_length=1)]
    policies: Annotated[list[str], Meta(min_length=1)]
    replicas: Annotated[list[Replicas], Meta(min_length=1)] = msgspec.field(default_factory=lambda: [4])
    rates: list[Rate | RateText] = _list()
    seeds: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(min_length=1)] = msgspec.field(
        default_factory=lambda: [0]
    )
    kernels: list[RankKernel] = _list()
    profiles: Annotated[list[str], Meta(min_length=1)] = msgspec.field(
        default_factory=lambda: ["a100-llama2-7b-bgmv-42"]
    )
    cluster: ClusterSection = ClusterSection()
    slo: SloSection = SloSection()
    find: FindSection = FindSection()
    map_rate: Rate | RateText | None = None
    claims: list[ClaimSection] = _list()
    published: list[PublishedSection] = _list()

    @property
    def contenders(self) -> tuple[Contender, ...]:
        """What its policies mean."""
        return contenders(self.policies, "policies")

    @property
    def all_rates(self) -> tuple[float | str, ...]:
        """The rates that every curve is simulated at."""
        searches = self.find.highest_rate or self.find.fewest_replicas_at
        return tuple(self.rates) if self.rates or searches else (OWN,)


def shipped_experiments() -> dict[str, Path]:
    """The experiments that ship with LoRAServe, by name."""
    folder = Path(loraserve.experiments.__path__[0]) / "shipped"
    return {path.stem: path for path in sorted(folder.glob(f"*{SUFFIX}"))}


def find_experiment(source: str) -> tuple[str, Path]:
    """The name and the file of what a user named; BadInputError lists those that ship."""
    if not source.startswith(SHIPPED):
        return Path(source).stem, Path(source)
    name = source.removeprefix(SHIPPED)
    known = shipped_experiments()
    if name not in known:
        raise BadInputError(f"{source}: no such experiment; those there are: {', '.join(known)}")
    return name, known[name]


def read_experiment(path: Path) -> Experiment:
    """Read and check one file; ConfigError names the key's path and what would be right."""
    return parse_experiment(read_toml(path, "the experiment"), str(path))


def parse_experiment(tree: dict[str, Any], where: str = "the experiment") -> Experiment:
    """Check a tree of plain values."""
    experiment = checked(tree, Experiment, where)
    try:
        _check(experiment)
    except BadInputError as error:
        raise ConfigError(f"{where}: {error}") from error
    return experiment


def experiment_tree(experiment: Experiment) -> dict[str, Any]:
    """The experiment as plain values, the inverse of `parse_experiment`."""
    tree: dict[str, Any] = msgspec.to_builtins(experiment)
    return tree


def share_of(rate: float | str) -> float | None:
    """0.85 for "0.85x", None for any other rate."""
    return float(rate[:-1]) if isinstance(rate, str) and rate.endswith("x") else None


def _check(experiment: Experiment) -> None:
    _ = experiment.contenders
    for key in ("policies", "replicas", "rates", "seeds", "kernels", "profiles"):
        _refuse_twice(key, getattr(experiment, key))
    _refuse_twice("traces", [trace.name for trace in experiment.traces], ".name")
    if experiment.cluster.warmup_s and 0 < experiment.cluster.duration_s <= experiment.cluster.warmup_s:
        raise BadInputError(
            f"cluster.warmup_s: {experiment.cluster.warmup_s:g}; expected less than cluster.duration_s,"
            f" {experiment.cluster.duration_s:g}"
        )
    _check_failures(experiment)
    if experiment.map_rate is not None:
        _check_rate(experiment.map_rate, experiment.all_rates, "map_rate")
    for place, line in enumerate(experiment.published):
        _check_published(line, f"published[{place}]")
    for place, claim in enumerate(experiment.claims):
        _check_claim(experiment, claim, f"claims[{place}]")


def _refuse_twice(key: str, values: list[Any], of: str = "") -> None:
    for place, value in enumerate(values):
        if value in values[:place]:
            raise BadInputError(f"{key}[{place}]{of}: {shown(value)} stands there twice; expected each once")


def _check_rate(rate: float | str, known: Sequence[float | str], where: str) -> None:
    if rate not in known:
        listed = ", ".join(shown(one) for one in known) or "none, as the experiment names none"
        raise BadInputError(f"{where}: {shown(rate)}; expected of {listed}")


def _check_failures(experiment: Experiment) -> None:
    """Each must be of a replica that every run has; a search for the fewest may try one alone."""
    # Only here: what reads an experiment's results needs no simulator.
    from loraserve.simulator.from_profile import parse_failures

    for place, text in enumerate(experiment.cluster.fail):
        where = f"cluster.fail[{place}]"
        try:
            (failure,) = parse_failures([text])
        except BadInputError:
            raise BadInputError(
                f"{where}: {shown(text)}; expected such as 'replica-1@100s for 30s'"
            ) from None
        fewest = 1 if experiment.find.fewest_replicas_at else min(experiment.replicas)
        known = [f"replica-{one}" for one in range(fewest)]
        if failure.replica_id not in known:
            listed = known[0] if fewest == 1 else f"{known[0]} to {known[-1]}"
            raise BadInputError(f"{where}: {shown(text)}; expected of {listed}, which all runs have")


def _check_published(line: PublishedSection, where: str) -> None:
    # Only here, as results are made of experiments.
    from loraserve.experiments.results import FIGURES

    if line.figure not in FIGURES:
        raise BadInputError(f"{where}.figure: {shown(line.figure)}; expected one of {', '.join(FIGURES)}")


def _check_claim(experiment: Experiment, claim: ClaimSection, where: str) -> None:
    allowed: dict[str, list[str]] = {
        "policy": experiment.policies,
        "over": ["", *experiment.policies],
        "traces": [trace.name for trace in experiment.traces],
        "kernels": list(experiment.kernels),
    }
    for key, known in allowed.items():
        given: str | list[str] = getattr(claim, key)
        for value in given if isinstance(given, list) else [given]:
            if value not in known:
                listed = ", ".join(name for name in known if name) or "none, as the experiment names none"
                raise BadInputError(f"{where}.{key}: {shown(value)}; expected of {listed}")
    if claim.rate is not None:
        is_search = claim.figure == "fewest_replicas"
        rates = experiment.find.fewest_replicas_at if is_search else experiment.all_rates
        _check_rate(claim.rate, rates, f"{where}.rate")
