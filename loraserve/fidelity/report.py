"""What a comparison found, as values."""

from collections.abc import Mapping
from dataclasses import dataclass

from loraserve.fidelity.figures import KINDS, Compared
from loraserve.fidelity.fit import Fit
from loraserve.fidelity.options import FidelityOptions
from loraserve.fidelity.processors import ProcessorUse
from loraserve.fidelity.steps import StepFactors
from placement.latency import LatencyModel
from traces.pacing import PacingStats
from traces.records import RequestRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Saturation:
    """Requests per second: what the latency model says, and the same corrected by `live_ratio`, by how much
    more the overloaded cluster did than the simulator said."""

    predicted_per_s: float
    live_ratio: float

    @property
    def requests_per_s(self) -> float:
        """The rate that loads are shares of."""
        return self.predicted_per_s * self.live_ratio


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadResult:
    """One load: both runs of it, compared; `simulated` is the first of the simulations.

    `steps` is what this load's own steps say of the latency model; `refit`, where something was missed, what
    the overheads would be if this load were the one fitted; `explanations` are lines about what was missed.
    """

    load: float
    requests_per_s: float
    live: tuple[RequestRecord, ...]
    simulated: tuple[RequestRecord, ...]
    compared: tuple[Compared, ...]
    processors: ProcessorUse
    pacing: PacingStats | None
    void_reason: str
    attempts: int
    failed: int
    simulated_failed: int
    steps: StepFactors
    refit: Fit | None
    explanations: tuple[str, ...] = ()

    @property
    def missed(self) -> tuple[Compared, ...]:
        """The figures whose error is above their target."""
        return tuple(one for one in self.compared if one.met is False)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FidelityReport:
    """The whole comparison; `latency_source` says where the latency model comes from."""

    options: FidelityOptions
    latency: LatencyModel
    latency_source: str
    saturation: Saturation
    fit: Fit
    fitted: LoadResult
    scored: tuple[LoadResult, ...]
    took_s: float

    @property
    def met(self) -> bool:
        """Whether every scored load that is not void reached every target, and there is one, and the load
        fitted was not void."""
        valid = [one for one in self.scored if not one.void_reason]
        return bool(valid) and not self.fitted.void_reason and not any(one.missed for one in valid)

    def worst(self) -> Mapping[str, float]:
        """Each figure's largest |error| over the scored loads that are not void."""
        valid = [one for one in self.scored if not one.void_reason]
        return {
            name: max(abs(one.error) for load in valid for one in load.compared if one.name == name)
            for name in (KINDS if valid else ())
        }
