"""The jobs of an experiment: one curve of one seed each, which a process does by itself, and what names its
result on disk."""

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import product
from pathlib import Path

import msgspec

import loraserve
import placement
import traces
from loraserve.errors import BadInputError
from loraserve.experiments.contenders import Contender
from loraserve.experiments.drawn import typical_requests
from loraserve.experiments.spec import Experiment, TraceSection
from loraserve.profiling.files import find_simulatable
from loraserve.simulator.workload import DEMO, SimulatedWorkload
from placement.profile import Profile
from traces.synthesis import is_preset
from traces.synthesis.workload import named_settings

PROFILE_KERNEL = ""
"""The kernel of a job that takes its profile's own."""
_WORKLOAD_KEYS = frozenset(field.name for field in fields(SimulatedWorkload)) & frozenset(
    TraceSection.__struct_fields__
)
_CODE = ("simulator/**/*.py", "experiments/*.py", "engines/replica_model/**/*.py", "profiling/search.py")
"""Of what the report draws no job depends."""
_SAID_ELSEWHERE = {"rate": "rates", "duration": "traces.duration_s", "requests": "traces.requests"}
"""What a preset's text must leave to the experiment, and the experiment's keys for it."""
_PART = re.compile(r"[:=]|,(?=[a-z-]+=)")
"""Between the parts of a law, or of a preset, one of which may name a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One piece of work. `replicas` 0 searches the fewest replicas, any other number of them runs at the
    experiment's rates and searches the highest. `has_map`: its map of ranks is kept."""

    experiment: Experiment
    trace: str
    workload: SimulatedWorkload
    contender: Contender
    replicas: int
    kernel: str
    profile: Profile
    seed: int
    has_map: bool

    @property
    def label(self) -> str:
        """What a person calls it."""
        where = f"{self.replicas} replicas" if self.replicas else "fewest replicas"
        kernel = f", {self.kernel}" if self.kernel else ""
        return f"{self.trace}, {self.contender.name}, {where}{kernel}, seed {self.seed}"


def jobs_of_experiment(experiment: Experiment, folder: Path) -> tuple[Job, ...]:
    """All of them, in the experiment's order; `folder` is where its trace files are.

    BadInputError names the key of a trace or a profile that cannot be read.
    """
    workloads = [_workload(trace, experiment, folder, place) for place, trace in enumerate(experiment.traces)]
    profiles = [_profile(name, place) for place, name in enumerate(experiment.profiles)]
    return tuple(_jobs(experiment, workloads, profiles))


def _jobs(
    experiment: Experiment, workloads: list[SimulatedWorkload], profiles: list[Profile]
) -> Iterator[Job]:
    sizes = list(experiment.replicas) if experiment.all_rates or experiment.find.highest_rate else []
    if experiment.find.fewest_replicas_at:
        sizes.append(0)
    kernels = [kernel.value for kernel in experiment.kernels] or [PROFILE_KERNEL]
    traces_drawn = zip(experiment.traces, workloads, strict=True)
    for (trace, workload), kernel, profile, replicas, contender, seed in product(
        traces_drawn, kernels, profiles, sizes, experiment.contenders, experiment.seeds
    ):
        yield Job(
            experiment=experiment,
            trace=trace.name,
            workload=workload,
            contender=contender,
            replicas=replicas,
            kernel=kernel,
            profile=profile,
            seed=seed,
            has_map=seed == experiment.seeds[0] and replicas > 0,
        )


def job_key(job: Job) -> str:
    """A name for what a job finds: the same for the same job on the same traces by the same code."""
    plain = {
        "trace": msgspec.to_builtins(job.workload),
        "content": _contents(job.workload),
        "contender": msgspec.to_builtins(job.contender),
        "profile": msgspec.to_builtins(job.profile, str_keys=True),
        "cluster": msgspec.to_builtins(job.experiment.cluster),
        "slo": msgspec.to_builtins(job.experiment.slo),
        "find": msgspec.to_builtins(job.experiment.find),
        "rates": [list(job.experiment.all_rates), job.experiment.map_rate],
        "job": [job.trace, job.replicas, job.kernel, job.seed, job.has_map],
        "code": code_digest(),
    }
    return hashlib.sha256(msgspec.json.encode(plain, order="deterministic")).hexdigest()[:24]


@lru_cache(maxsize=1)
def code_digest() -> str:
    """A hash of everything that decides what a simulation gives, so that results of other code are not mixed
    with this one's."""
    whole = hashlib.sha256()
    for folder, path in code_files():
        whole.update(f"{folder.name}/{path.relative_to(folder)}".encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()


def code_files() -> Iterator[tuple[Path, Path]]:
    """What `code_digest` is of, each file with the folder of its package."""
    ours, others = Path(loraserve.__path__[0]), (Path(placement.__path__[0]), Path(traces.__path__[0]))
    patterns = [(ours, pattern) for pattern in _CODE] + [(other, "**/*.py") for other in others]
    patterns.append((others[1], "bundled/*.csv"))
    for folder, pattern in patterns:
        yield from ((folder, path) for path in sorted(folder.glob(pattern)))


def _contents(workload: SimulatedWorkload) -> list[str]:
    """A hash of each file that decides what it draws: its own, and those that its laws name."""
    texts = [text for text in (workload.source, workload.lengths, workload.ranks) if text]
    parts = [part for text in texts for part in (text, *_PART.split(text))]
    files = [Path(part) for part in dict.fromkeys(parts) if part != DEMO and os.path.isfile(part)]
    return [_content(path, path.stat().st_mtime_ns) for path in files]


@lru_cache(maxsize=64)
def _content(path: Path, _changed_ns: int) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BadInputError(f"{path}: cannot be read: {error.strerror or error}") from error


def _workload(trace: TraceSection, experiment: Experiment, folder: Path, place: int) -> SimulatedWorkload:
    values = {key: getattr(trace, key) for key in _WORKLOAD_KEYS}
    is_drawn = is_preset(trace.source)
    if not is_drawn and trace.source != DEMO:
        path = folder / trace.source
        if not path.is_file():
            raise BadInputError(
                f"traces[{place}].source: {trace.source}: no such file in {folder}; name its folder with"
                " --traces"
            )
        values["source"] = str(path)
    if values["duration_s"] is None and values["requests"] is None and experiment.cluster.duration_s:
        values["duration_s"] = experiment.cluster.duration_s
    workload = SimulatedWorkload(**values)
    if is_drawn:
        _check_preset(workload, f"traces[{place}]")
    return workload


def _check_preset(workload: SimulatedWorkload, where: str) -> None:
    """BadInputError for one that cannot be drawn; that of a file shows when it is read."""
    try:
        said = sorted(named_settings(workload.source) & _SAID_ELSEWHERE.keys())
        if said:
            raise BadInputError(
                f"source: {workload.source} says its {said[0]}; say it with {_SAID_ELSEWHERE[said[0]]}"
            )
        typical_requests(workload, 0)
    except BadInputError as error:
        raise BadInputError(f"{where}: {error}") from error


def _profile(name: str, place: int) -> Profile:
    try:
        return find_simulatable(name)
    except BadInputError as error:
        raise BadInputError(f"profiles[{place}]: {error}") from error
