"""What is compared, on which loads, and how close is close enough."""

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, cast, get_args

from loraserve.errors import BadInputError

EngineKind = Literal["emulated", "vllm"]

MAX_LOAD = 3.0
ADAPTERS_PER_RANK = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """The largest relative errors allowed, |simulated - live| / live; None: the figure has no target."""

    throughput: float | None = 0.05
    p50: float | None = 0.10
    p95: float | None = 0.20


TARGETS = MappingProxyType(
    {"emulated": Targets(), "vllm": Targets(throughput=None, p50=0.25, p95=0.40)},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Prompts and outputs are drawn evenly from these ranges of tokens, each for itself."""

    prompt: tuple[int, int] = (16, 256)
    output: tuple[int, int] = (16, 96)

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return self.prompt[1] + self.output[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class FidelityOptions:
    """Loads are shares of the rate at which the cluster saturates; each is run for `duration_s`, and
    simulated `draws` times.

    BadInputError names what cannot be.
    """

    engine: EngineKind = "emulated"
    replicas: int = 2
    ranks: tuple[int, ...] = (8, 32, 128)
    loads: tuple[float, ...] = (0.5, 0.9, 1.1)
    fit_load: float = 0.7
    duration_s: float = 60.0
    lengths: Lengths = field(default_factory=Lengths)
    look_aside: bool = False
    draws: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            (1 <= self.replicas <= 64, f"--replicas {self.replicas}: expected 1 to 64"),
            (
                bool(self.ranks) and min(self.ranks) >= 1 and len(set(self.ranks)) == len(self.ranks),
                f"--ranks {','.join(map(str, self.ranks))}: expected ranks of at least 1, each once",
            ),
            (
                bool(self.loads) and all(0 < load <= MAX_LOAD for load in self.loads),
                f"--loads {','.join(f'{load:g}' for load in self.loads)}: expected numbers above 0, at most "
                f"{MAX_LOAD:g}",
            ),
            (0 < self.fit_load < 1, f"--fit-load {self.fit_load:g}: expected a number between 0 and 1"),
            (1 <= self.draws <= 100, f"{self.draws} draws: expected 1 to 100"),
            (1 <= self.duration_s <= 3600, f"--duration {self.duration_s:g}: expected 1 to 3600 seconds"),
        )
        for holds, message in checks:
            if not holds:
                raise BadInputError(message)

    @property
    def overload_s(self) -> float:
        """How long the live cluster is overloaded to find where it saturates."""
        return min(max(2.0, self.duration_s / 4), 15.0)

    @property
    def max_others(self) -> float:
        """The share of the machine that other programs may take; an engine that computes is slowed down by
        them, one that sleeps is not."""
        return 0.1 if self.engine == "vllm" else 1.0

    @property
    def targets(self) -> Targets:
        """What the errors are held against."""
        return TARGETS[self.engine]


def as_engine(text: str) -> EngineKind:
    """The engine of this name; BadInputError for another."""
    for kind in get_args(EngineKind):
        if text == kind:
            return cast(EngineKind, kind)
    raise BadInputError(f"--engine {text}: expected emulated or vllm")
