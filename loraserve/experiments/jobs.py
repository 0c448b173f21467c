"""The jobs of an experiment: one curve of one seed each, which a process does by itself, and what names its
result on disk."""

import hashlib
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
from loraserve.experiments.spec import Experiment, TraceSection
from loraserve.profiling.files import find_simulatable
from loraserve.simulator.workload import DEMO, SimulatedWorkload
from placement.profile import Profile
from traces.synthesis import is_preset

PROFILE_KERNEL = ""
"""The kernel of a job that takes its profile's own."""
_WORKLOAD_KEYS = frozenset(field.name for field in fields(SimulatedWorkload)) & frozenset(
    TraceSection.__struct_fields__
)
_CODE = ("simulator/**/*.py", "experiments/*.py", "engines/replica_model/**/*.py")
"""Of what the report draws no job depends."""


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
        "content": _content(job.workload.source),
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
    ours, others = Path(loraserve.__path__[0]), (placement.__path__[0], traces.__path__[0])
    patterns = [(ours, pattern) for pattern in _CODE] + [(Path(other), "**/*.py") for other in others]
    for folder, pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            whole.update(f"{folder.name}/{path.relative_to(folder)}".encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()


@lru_cache(maxsize=64)
def _content(source: str) -> str:
    if source == DEMO or is_preset(source):
        return ""
    with Path(source).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    return SimulatedWorkload(**values)


def _profile(name: str, place: int) -> Profile:
    try:
        return find_simulatable(name)
    except BadInputError as error:
        raise BadInputError(f"profiles[{place}]: {error}") from error
