"""What one replica of a kind can do and what it costs: a measured or published profile, as a value.

Owns no files and measures nothing: `loraserve.profiling` does.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from placement.latency import LatencyModel, RankKernel

LatencyBasis = Literal["fitted", "published", "derived", ""]
"""Where a latency model comes from: `fitted` to steps that were timed; `published` figures put into the
model's form; `derived` from operating points by the rule in the profile's source; '' without a model."""

_ENDLESS = 1e18


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """The engine that was measured: what it is and its limits. `kernel` is what computed LoRA there, in
    words; `lora_execution` LoRAServe's name for it, '' for other engines. A KV block holds
    `block_tokens` tokens; a batch has rows of up to `slots.machine` different adapters.

    ValueError for a limit below 1.
    """

    kind: str
    model: str
    kernel: str = ""
    lora_execution: str = ""
    max_lora_rank: int = 128
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    kv_blocks: int
    block_tokens: int = 16
    adapter_slots: int = 8

    def __post_init__(self) -> None:
        for name in (
            "max_lora_rank",
            "max_num_seqs",
            "max_num_batched_tokens",
            "kv_blocks",
            "block_tokens",
            "adapter_slots",
        ):
            _check(name, getattr(self, name), least=1)

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.kv_blocks * self.block_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """The targets that operating points hold under, both at the 95th percentile."""

    ttft_ms: float
    tbt_ms: float

    def __post_init__(self) -> None:
        _check("ttft_ms", self.ttft_ms, above=0)
        _check("tbt_ms", self.tbt_ms, above=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatingPoint:
    """The highest load of one rank that a replica sustains: tokens/s, prompt and output."""

    rank: int
    tokens_per_s: float

    def __post_init__(self) -> None:
        _check("rank", self.rank, least=0)
        _check("tokens_per_s", self.tokens_per_s, above=0)


def operating_point_of(points: Sequence[OperatingPoint], rank: int) -> float:
    """Tokens/s for this rank by points of which there is at least one, see `Profile.operating_point`."""
    at = bisect_left([point.rank for point in points], rank)
    if at == 0 or len(points) == 1:
        return points[0].tokens_per_s
    beyond = at == len(points)
    low, high = points[at - 2 : at] if beyond else points[at - 1 : at + 1]
    low_s, high_s = 1 / low.tokens_per_s, 1 / high.tokens_per_s
    slope = (high_s - low_s) / (high.rank - low.rank)
    if beyond:
        return 1 / (high_s + max(0.0, slope) * (rank - high.rank))
    return 1 / (low_s + slope * (rank - low.rank))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSpeeds:
    """How fast adapters move: from the host to the GPU, from another replica's host, from their origin."""

    host_to_gpu_bytes_per_s: float = 10e9
    peer_bytes_per_s: float = 10e9
    origin_bytes_per_s: float = 1e9

    def __post_init__(self) -> None:
        for name in ("host_to_gpu_bytes_per_s", "peer_bytes_per_s", "origin_bytes_per_s"):
            _check(name, getattr(self, name), above=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProbe:
    """One load that was tried on a replica: `requests_per_s` arrived, all of rank `rank`, or of every
    rank in turn if it is None; 0 is the base model. `tokens_per_s` counts prompt and output of what was
    completed; `inside` says whether both percentiles were within the SLO."""

    rank: int | None = None
    requests_per_s: float
    tokens_per_s: float
    ttft_p95_ms: float
    tbt_p95_ms: float
    inside: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFit:
    """How well the latency model with this kernel fits the `steps` timed steps.

    The relative errors are |model − measured| / measured, one per step timed; their mean counts each as at
    most 25 %, as single steps may have been slowed down by something else.
    """

    kernel: RankKernel
    steps: int
    median_error_ms: float
    median_relative_error: float
    mean_relative_error: float
    p95_relative_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One kind of replica. `source` says who measured it, on what, and with which command; `origins`
    where single values come from, by their key. `slo` None: the SLO of the operating points is not
    known. `mixed_tokens_per_s` is the operating point of all ranks in turn, None if not measured.

    ValueError if ranks repeat, or the latency model charges another `max_lora_rank` than the engine's.
    """

    name: str
    source: str
    engine: EngineFacts
    latency: LatencyModel | None = None
    latency_basis: LatencyBasis = ""
    operating_points: tuple[OperatingPoint, ...] = ()
    mixed_tokens_per_s: float | None = None
    slo: Slo | None = None
    adapter_bytes_per_rank: float = 2.0 * 2**20
    speeds: LoadSpeeds = field(default_factory=LoadSpeeds)
    fits: tuple[KernelFit, ...] = ()
    probes: tuple[LoadProbe, ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not self.name or not self.name.isprintable() or "/" in self.name:
            raise ValueError(f"name: {self.name!r}; expected one or more characters, no '/'")
        if (self.latency is None) != (self.latency_basis == ""):
            raise ValueError("latency_basis: expected with a latency model, and only then")
        if self.latency is not None and self.latency.max_lora_rank != self.engine.max_lora_rank:
            raise ValueError(
                f"latency.max_lora_rank: {self.latency.max_lora_rank}; expected the engine's, "
                f"{self.engine.max_lora_rank}"
            )
        ranks = [point.rank for point in self.operating_points]
        if ranks != sorted(set(ranks)):
            raise ValueError(f"operating_points: ranks {ranks}; expected each once, the lowest first")
        _check("adapter_bytes_per_rank", self.adapter_bytes_per_rank, above=0)
        if self.mixed_tokens_per_s is not None:
            _check("mixed_tokens_per_s", self.mixed_tokens_per_s, above=0)

    def operating_point(self, rank: int) -> float:
        """Tokens/s that one replica sustains of requests of this rank, prompt and output.

        Between measured ranks the time per token is interpolated linearly, as the latency model is linear
        in rank. Below the lowest rank measured it is the lowest one's; above the highest it goes on as
        between the last two, but no faster. ValueError without operating points.
        """
        if not self.operating_points:
            raise ValueError(f"profile {self.name} has no operating points")
        return operating_point_of(self.operating_points, rank)

    def adapter_bytes(self, rank: int) -> int:
        """The size of an adapter of this rank."""
        return round(self.adapter_bytes_per_rank * rank)


def _check(name: str, value: float, *, least: float | None = None, above: float | None = None) -> None:
    ok = math.isfinite(value) and value <= _ENDLESS
    ok = ok and (least is None or value >= least) and (above is None or value > above)
    if not ok:
        bound = f"of at least {least:g}" if least is not None else f"above {above:g}"
        raise ValueError(f"{name}: {value}; expected a number {bound}")
