"""The comparison on live clusters: Ray, controller, router and replicas, which sleep for each step (the
emulated engine) or compute (vLLM on the CPU, see policies_vllm).

Every run has a cluster of its own, started fresh with the contender's placement, routing and forecast, and
is sent the same requests at their times; the simulator runs them too, under the same settings. As many runs
as --jobs says go side by side, in rounds that begin their requests together, so that no start of a cluster
falls into another one's run. Each result is written when its run ends, under --out into its folder `live`,
and with the same --out again what is there is not run again.

A run is void if the client sent requests late (pacing error above 0.5 % of the TTFT target at the 99th
percentile: 10 ms at --speed 1), if decoding took 5 % longer than the engine was to sleep, or if beside vLLM
other programs took more than a tenth of the machine; it is made once more, or as often as --attempts says.
"""

import contextlib
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import policies_cases as cases
import policies_ratios as ratios
import policies_vllm as vllm
from policies_cases import Case, Outcome, Setting
from policies_live_run import Spec

from loraserve.folders import cache_dir
from loraserve.samples import build_adapter, build_samples

WORKER = Path(__file__).with_name("policies_live_run.py")
PACING_SHARE = 0.005
"""Of the TTFT target: so late may a hundredth of the requests be sent."""
STEP_FACTOR = 1.05
MAX_OTHERS = 0.1
"""Of the machine: what computes is slowed down by other programs."""
POLL_S = 0.1
END_S = 60.0
START_S = 300.0
"""A cluster that does not serve by then never will; its requests may take as long again to end."""
TAIL_LINES = 8

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A live run, and how it went: `busy` and `others` are shares of the machine, `others` what neither this
    cluster nor its client took; `settings` each replica's `max_lora_rank`, as it changed; `void` why the run
    proves nothing, '' if it does."""

    outcome: Outcome
    pacing_p99_ms: float
    busy: float
    others: float
    step_factor: float | None
    settings: tuple[tuple[int, ...], ...]
    start_s: float
    run_s: float
    void: str

    @property
    def line(self) -> str:
        """In a line."""
        one = self.outcome
        factor = "" if self.step_factor is None else f", steps x {self.step_factor:.3f}"
        void = f"; VOID: {self.void}" if self.void else ""
        return (
            f"{one.fleet}, {one.workload}, {one.contender} at {one.rate_per_s:g}/s, seed {one.seed}:"
            f" TTFT p95 {one.ttft_p95_ms:.0f} ms, {one.failed} of {one.requests} failed, pacing p99"
            f" {self.pacing_p99_ms:.1f} ms{factor}, machine {self.busy:.0%} busy, start {self.start_s:.0f} s,"
            f" run {self.run_s:.0f} s{void}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveOptions:
    """`jobs` clusters run side by side, a void run is made `attempts` times in all; results are kept in
    `folder`."""

    jobs: int
    attempts: int
    folder: Path
    note: Note


def live(setting: Setting, wanted: Sequence[Case], options: LiveOptions) -> dict[str, Any]:
    """The comparison of these cases, which all have this setting and one workload."""
    with tempfile.TemporaryDirectory(prefix="loraserve-policies-") as folder:
        field = _Field(Path(folder), setting, options)
        field.measure(wanted)
        found = [(case, done) for case in wanted if (done := field.result(case)) is not None]
    options.note("the same requests are simulated")
    runs = [done.outcome for _, done in found]
    void = [done.line for _, done in found if done.void]
    missing = [_name(case) for case in wanted if case not in [case for case, _ in found]]
    return {
        "fluid_rate_per_s": cases.fluid_rate_per_s(setting, wanted[0].workload),
        "runs": runs,
        "simulated": [cases.run_case(case) for case, _ in found],
        "measured": [done for _, done in found],
        "void": void + [f"{name}: did not end" for name in missing],
        "against_best": ratios.against_best(runs),
        "beyond": ratios.ttft_ratio([one for one in runs if one.rate_per_s == _highest_rate(runs)]),
        "bytes": ratios.bytes_ratios(runs),
    }


def result_path(case: Case, folder: Path) -> Path:
    """Where this case's result is kept."""
    digest = hashlib.sha256(json.dumps(cases.case_tree(case)).encode()).hexdigest()
    name = _name(case).replace("/", "_").replace(" ", "-")
    return folder / f"{name}-{digest[:8]}.json"


def read_result(case: Case, folder: Path) -> Measured | None:
    """What was kept of this very case; None if nothing, or nothing that can be read."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        tree = json.loads(result_path(case, folder).read_text(encoding="utf-8"))
        if cases.case_of(tree["case"]) == case:
            return _measured(case.setting, tree)
    return None


def _highest_rate(runs: Sequence[Outcome]) -> float:
    return max((one.rate_per_s for one in runs), default=0.0)


class _Field:
    """What all runs of a setting share: the model, its adapters, the folder of results."""

    def __init__(self, folder: Path, setting: Setting, options: LiveOptions) -> None:
        self._folder = folder
        self._setting = setting
        self._options = options
        self._model = (
            vllm.build_model(folder / "model")
            if setting.is_vllm
            else build_samples(cache_dir() / "samples").model
        )
        self._adapters: dict[tuple[str, int], Path] = {}

    def measure(self, wanted: Sequence[Case]) -> None:
        """Run what has no result yet, and once more what is void."""
        note, jobs = self._options.note, self._options.jobs
        for attempt in range(self._options.attempts):
            open_ = [case for case in wanted if (done := self.result(case)) is None or done.void]
            if not open_:
                return
            rounds = [open_[at : at + jobs] for at in range(0, len(open_), jobs)]
            again = ", again" if attempt else ""
            note(f"{len(open_)} of {len(wanted)} runs{again}, in {len(rounds)} rounds of {jobs}")
            for number, cases_ in enumerate(rounds, 1):
                began_s = time.monotonic()
                self._round(cases_)
                left_min = (len(rounds) - number) * (time.monotonic() - began_s) / 60
                note(f"round {number} of {len(rounds)} has ended, about {left_min:.0f} min left")

    def result(self, case: Case) -> Measured | None:
        """What came of this case, if it has been run."""
        return read_result(case, self._options.folder)

    def _round(self, round_: Sequence[Case]) -> None:
        """Runs side by side, each in a process of its own; ended whatever happens."""
        with tempfile.TemporaryDirectory(dir=self._folder) as name, contextlib.ExitStack() as stack:
            folder = Path(name)
            specs = [self._spec(case, folder, str(number)) for number, case in enumerate(round_)]
            workers = [stack.enter_context(_worker(spec)) for spec in specs]
            give_up_s = time.monotonic() + START_S
            while time.monotonic() < give_up_s and not all(
                spec.arrived.exists() or worker.poll() is not None
                for spec, worker in zip(specs, workers, strict=True)
            ):
                time.sleep(POLL_S)
            (folder / "go").touch()
            give_up_s = time.monotonic() + round_[0].setting.duration_s + START_S
            for spec, worker in zip(specs, workers, strict=True):
                try:
                    code = worker.wait(max(0.0, give_up_s - time.monotonic()))
                except subprocess.TimeoutExpired:
                    code = -1
                self._options.note(self._told(spec, code))

    def _told(self, spec: Spec, code: int) -> str:
        done = self.result(spec.case)
        if code == 0 and done is not None:
            return done.line
        lines = _log(spec).read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
        return f"{_name(spec.case)} failed: {' / '.join(lines)}"

    def _spec(self, case: Case, folder: Path, name: str) -> Spec:
        trace = cases.requests(case)
        result = result_path(case, self._options.folder)
        result.parent.mkdir(parents=True, exist_ok=True)
        return Spec(
            case=case,
            model=self._model,
            adapters={one.name: self._adapter(one.name, one.rank or 0) for one in trace.adapters},
            arrived=folder / f"{name}.arrived",
            go=folder / "go",
            result=result,
        )

    def _adapter(self, name: str, rank: int) -> Path:
        key = (name, rank)
        if key not in self._adapters:
            self._adapters[key] = build_adapter(
                self._folder / f"{name}-{rank}", self._model, rank=rank, seed=len(self._adapters)
            )
        return self._adapters[key]


@contextlib.contextmanager
def _worker(spec: Spec) -> Iterator["subprocess.Popen[bytes]"]:
    path = spec.arrived.with_suffix(".spec")
    spec.write(path)
    with _log(spec).open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(WORKER), str(path)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _log(spec: Spec) -> Path:
    return spec.arrived.with_suffix(".log")


def _name(case: Case) -> str:
    where = f"{case.setting.fleet} {case.workload.name}"
    return f"{where} {case.contender.name} {case.rate_per_s:g} seed {case.seed}"


def _measured(setting: Setting, tree: dict[str, Any]) -> Measured:
    outcome, factor = Outcome(**tree["outcome"]), tree["step_factor"]
    limit_ms = PACING_SHARE * setting.slo.ttft_ms
    reasons = []
    if tree["pacing_p99_ms"] > limit_ms:
        reasons.append(f"requests were sent late by {tree['pacing_p99_ms']:.1f} ms, above {limit_ms:g} ms")
    if factor is not None and factor > STEP_FACTOR and not setting.is_vllm:
        reasons.append(f"decoding took {factor:.3f} times as long as it should, above {STEP_FACTOR:g}")
    if setting.is_vllm and tree["others"] > MAX_OTHERS:
        reasons.append(f"other programs took {tree['others']:.0%} of the machine, above {MAX_OTHERS:.0%}")
    return Measured(
        outcome=outcome,
        pacing_p99_ms=tree["pacing_p99_ms"],
        busy=tree["busy"],
        others=tree["others"],
        step_factor=factor,
        settings=tuple(tuple(one) for one in tree["settings"]),
        start_s=tree["start_s"],
        run_s=tree["run_s"],
        void="; ".join(reasons),
    )
