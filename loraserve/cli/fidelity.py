"""`loraserve fidelity`: how well the simulator predicts a live cluster that it has seen one load of."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraserve.cli.common import command
from loraserve.errors import BadInputError

if TYPE_CHECKING:
    from loraserve.cluster.state import RunningCluster
    from loraserve.config import Config
    from loraserve.engines.replica_model.sequence import ReplicaLimits
    from loraserve.fidelity.options import FidelityOptions
    from loraserve.fidelity.report import FidelityReport
    from placement.latency import LatencyModel

DURATION_S, QUICK_DURATION_S = 60.0, 12.0


@command
def fidelity(
    engine: Annotated[str, typer.Option(help="emulated or vllm.")] = "emulated",
    replicas: Annotated[int | None, typer.Option(help="How many replicas. [default: 2, 1 of vllm]")] = None,
    model: Annotated[
        Path | None, typer.Option(help="The base model's folder. [default: a small one, made here]")
    ] = None,
    ranks: Annotated[str, typer.Option(help="Ranks of the adapters, two of each.")] = "8,32,128",
    loads: Annotated[str, typer.Option(help="Loads to score, as shares of saturation.")] = "0.5,0.9,1.1",
    fit_load: Annotated[float, typer.Option(help="The load to fit on, a share of saturation.")] = 0.7,
    duration: Annotated[
        float | None, typer.Option(help="Seconds of arrivals per load. [default: 60, 12 with --quick]")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="vllm: a profile with a latency model. [default: timed at the start]")
    ] = None,
    threads: Annotated[
        int, typer.Option(min=1, help="vllm: threads of one replica, unless OMP_NUM_THREADS says.")
    ] = 1,
    look_aside: Annotated[
        bool,
        typer.Option(
            "--look-aside", help="Clients send to replicas directly, which the simulator does not model."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights, workloads and placement.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Short loads, whose figures scatter.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write the records of both sides and plots into this folder.")
    ] = None,
) -> None:
    """Fit the simulator on one load of a live cluster and score it on others.

    A cluster of its own is started, and ended whatever happens. It is overloaded for a short time to find
    where it saturates; on one load two numbers are fitted, a factor on the engine's step times and the
    delay of a message between router and replica; then each other load is run live and simulated with the
    same arrivals, lengths, adapters, placement and routing.

    \b
    error     simulated / live - 1, of the same figure (`loraserve replay` says how each is defined)
    targets   emulated: throughput 5 %, TTFT and TBT p50 10 %, p95 20 %; vllm: p50 25 %, p95 40 %
    void      the client was too slow for the schedule (pacing p99 above 10 ms), or other programs took more
              than 10 % of the machine beside vllm; also when repeated
    The exit code is 0 also when targets are missed: what is missed is printed, and what explains it.
    """
    options = _options(
        engine, replicas, ranks, loads, fit_load, duration, look_aside=look_aside, seed=seed, quick=quick
    )
    if profile is not None and engine != "vllm":
        raise BadInputError("--profile: the emulated engine's latency model is known; it needs none")
    if out is not None:
        _make_folder(out)  # before the run: minutes of measurements must not end in an error
    report = _measure(options, model, profile, threads)
    from loraserve.cli import fidelity_output

    files = fidelity_output.write_files(report, out) if out is not None else ()
    if json_output:
        fidelity_output.print_json(report, files)
    else:
        fidelity_output.print_tables(report, files)


def _options(
    engine: str,
    replicas: int | None,
    ranks: str,
    loads: str,
    fit_load: float,
    duration: float | None,
    *,
    look_aside: bool,
    seed: int,
    quick: bool,
) -> "FidelityOptions":
    from loraserve.fidelity.options import FidelityOptions, as_engine
    from loraserve.fidelity.setup import LENGTHS

    kind = as_engine(engine)
    return FidelityOptions(
        engine=kind,
        replicas=replicas if replicas is not None else 1 if kind == "vllm" else 2,
        ranks=tuple(int(number) for number in _numbers("--ranks", ranks, whole=True)),
        loads=_numbers("--loads", loads),
        fit_load=fit_load,
        duration_s=duration if duration is not None else QUICK_DURATION_S if quick else DURATION_S,
        lengths=LENGTHS[kind],
        look_aside=look_aside,
        seed=seed,
    )


def _numbers(option: str, text: str, *, whole: bool = False) -> tuple[float, ...]:
    kind = int if whole else float
    try:
        return tuple(kind(one) for one in text.split(","))
    except ValueError:
        raise BadInputError(f"{option}: got {text!r}; expected numbers with commas between") from None


def _measure(
    options: "FidelityOptions", model: Path | None, profile: str | None, threads: int
) -> "FidelityReport":
    """Everything that needs files or processes; nothing of it is left behind."""
    import os
    import tempfile

    from loraserve.fidelity import setup
    from loraserve.fidelity.profiled import model_from_profile, timed_model, vllm_limits

    if model is not None and not model.is_dir():
        raise BadInputError(f"--model {model}: no such folder")
    if options.engine == "vllm":
        # Ray and vLLM take it over; the profile and the cluster must have the same.
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with tempfile.TemporaryDirectory(prefix="loraserve-fidelity-") as name, _terminable():
        folder = Path(name)
        chosen = model.resolve() if model is not None else setup.make_model(options, folder / "model")
        config = setup.cluster_config(options, chosen, f"fidelity-{os.getpid()}", folder / "clusters")
        if options.engine == "emulated":
            latency, limits = setup.emulated_model(config)
            source = "the emulated engine's configuration"
        elif profile is not None:
            (latency, source), limits = model_from_profile(profile, config), vllm_limits(config)
        else:
            _say("the steps of one replica are timed, about a minute")
            (latency, source), limits = timed_model(config, options, folder / "profile"), vllm_limits(config)
        return _with_cluster(options, config, folder, _Engine(latency, limits, source))


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM as an exception, so that what was started is ended."""
    import signal
    from types import FrameType

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True, slots=True)
class _Engine:
    latency: "LatencyModel"
    limits: "ReplicaLimits"
    source: str


def _with_cluster(
    options: "FidelityOptions", config: "Config", folder: Path, engine: _Engine
) -> "FidelityReport":
    from loraserve.cli.common import run_async
    from loraserve.fidelity import setup
    from loraserve.fidelity.live import LiveCluster
    from loraserve.fidelity.run import run_fidelity
    from loraserve.fidelity.workload import flood

    adapters = setup.make_adapters(
        options, flood(options).adapters, Path(config.model.path), folder / "adapters"
    )
    with _cluster(config) as running:
        live = LiveCluster(
            running.router_addresses,
            lambda: _roles(running),
            look_aside=options.look_aside,
            max_others=options.max_others,
            seed=options.seed,
        )

        async def compare() -> "FidelityReport":
            registered, pools = await live.register(adapters)
            subject = setup.subject_of(config, registered, pools, engine.latency, engine.limits)
            return await run_fidelity(live, subject, options, engine.source, _say)

        return run_async(compare)


@contextlib.contextmanager
def _cluster(config: "Config") -> Iterator["RunningCluster"]:
    """The cluster, for as long as the block runs."""
    from loraserve.cluster.launch import down, up

    name, state_dir = config.cluster.name, config.cluster.state_dir
    try:
        yield up(config, fresh=True, on_step=_say)
    finally:
        down(name, state_dir, on_step=_say)


def _roles(running: "RunningCluster") -> Mapping[str, list[int]]:
    """The cluster's processes by what they do; an engine's own belong to its replica."""
    from loraserve.cluster.processes import processes_of, titled

    named = {
        "controller": titled(running.run_id, "ray::ControllerActor"),
        "router": titled(running.run_id, "ray::RouterActor"),
        "replicas": titled(running.run_id, "ray::ReplicaActor") + titled(running.run_id, "VLLM::"),
    }
    known = {pid for pids in named.values() for pid in pids}
    rest = [pid for pid in processes_of(running.run_id) if pid not in known]
    return {**named, "ray": rest}


def _say(text: str) -> None:
    import sys

    print(f"fidelity: {text}", file=sys.stderr, flush=True)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInputError(f"--out: {folder}: cannot be made: {error.strerror}") from error
