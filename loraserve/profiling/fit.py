"""Fits the latency model to timed steps, once per rank kernel, and says which kernel fits best.

Pure. Robust least squares of relative errors with coefficients of at least 0: first under the soft L1 loss,
then under Cauchy's with the scale of what is left, so that single slow steps (another process, a cache that
was cold) count for little.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import TYPE_CHECKING, Any

from placement.latency import COEFFICIENTS, LatencyModel, RankKernel, StepCounts
from placement.profile import KernelFit

if TYPE_CHECKING:
    import numpy as np

_SOFT_SCALE = 0.05
_LEAST_SCALE = 1e-4
_MAD_TO_SIGMA = 1.4826
_MOST_ERROR = 0.25
# A term that is less than this share of every step is not there.
_LEAST_SHARE = 1e-4
# How many standard errors lie between the errors of two kernels.
_CLEAR_SIGMAS, _LIKELY_SIGMAS = 3.0, 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptPart:
    """A prompt computed whole in one step; rank 0 is the base model."""

    tokens: int
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedStep:
    """One step as it was timed: the rank of each decoding row (0: base model) and the tokens they have in
    the KV cache, the one being computed included; the prompts computed; the number of different adapters."""

    ms: float
    decode_ranks: tuple[int, ...] = ()
    context_tokens: int = 0
    prompts: tuple[PromptPart, ...] = ()
    adapters: int = 0

    def counts(self, kernel: RankKernel, max_lora_rank: int) -> StepCounts:
        """What the latency model charges for the step with this kernel."""
        largest = max((*self.decode_ranks, *(part.rank for part in self.prompts)), default=0)

        def charged(rank: int) -> int:
            if rank == 0 or kernel is RankKernel.SUM:
                return rank
            return largest if kernel is RankKernel.PADDED_BATCH else max_lora_rank

        return StepCounts(
            rows=len(self.decode_ranks) + len(self.prompts),
            prefill_tokens=sum(part.tokens for part in self.prompts),
            prefill_pairs=sum(part.tokens * (part.tokens - 1) // 2 for part in self.prompts),
            context_tokens=self.context_tokens,
            adapters=self.adapters,
            decode_rank=sum(charged(rank) for rank in self.decode_ranks),
            prefill_rank=sum(part.tokens * charged(part.rank) for part in self.prompts),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A latency model and how well it fits."""

    model: LatencyModel
    fit: KernelFit


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """All kernels' fits, the best first, and a line on how sure the choice is."""

    fits: tuple[Fitted, ...]
    how_sure: str

    @property
    def best(self) -> Fitted:
        """The one with the least error."""
        return self.fits[0]


def recommend(steps: Sequence[TimedStep], max_lora_rank: int) -> Recommendation:
    """Fit every kernel; the best has the least mean relative error. ValueError without steps.

    How sure that is comes from the errors of both kernels step by step: the mean of their differences
    against its standard error.
    """
    fits = [fit_latency(steps, kernel, max_lora_rank) for kernel in RankKernel]
    fits.sort(key=lambda one: one.fit.mean_relative_error)
    best, second = fits[0].fit, fits[1].fit
    errors = [_clipped(_relative_errors(one.model, steps)) for one in fits[:2]]
    apart = [other - own for own, other in zip(*errors, strict=True)]
    error = stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else 0.0
    sigmas = fmean(apart) / error if error > 0 else 0.0
    if sigmas >= _CLEAR_SIGMAS:
        sure = "clear"
    elif sigmas >= _LIKELY_SIGMAS:
        sure = "likely, not clear"
    else:
        sure = "not to be told apart by these steps"
    line = (
        f"{best.kernel}: mean error {best.mean_relative_error:.2%}, next best {second.kernel} "
        f"{second.mean_relative_error:.2%}: {sure} ({sigmas:.1f} standard errors between them)"
    )
    return Recommendation(fits=tuple(fits), how_sure=line)


def fit_latency(steps: Sequence[TimedStep], kernel: RankKernel, max_lora_rank: int) -> Fitted:
    """The model with this kernel that fits best; terms that no step varies come out as 0.

    ValueError without steps, or if one took no time.
    """
    import numpy as np

    if not steps or min(step.ms for step in steps) <= 0:
        raise ValueError("expected timed steps, each with a duration above 0")
    counts = [step.counts(kernel, max_lora_rank) for step in steps]
    measured = np.array([step.ms for step in steps])
    columns = np.array([_row(one) for one in counts], dtype=float) / measured[:, None]
    values = _robust(columns)
    terms: dict[str, Any] = dict(zip(COEFFICIENTS, (float(f"{value:.6g}") for value in values), strict=True))
    model = LatencyModel(kernel=kernel, max_lora_rank=max_lora_rank, **terms)
    relative = _relative_errors(model, steps)
    errors_ms = [error * step.ms for error, step in zip(relative, steps, strict=True)]
    fit = KernelFit(
        kernel=kernel,
        steps=len(steps),
        median_error_ms=median(errors_ms),
        median_relative_error=median(relative),
        mean_relative_error=fmean(_clipped(relative)),
        p95_relative_error=float(np.quantile(relative, 0.95)),
    )
    return Fitted(model=model, fit=fit)


def _relative_errors(model: LatencyModel, steps: Sequence[TimedStep]) -> list[float]:
    counts = (step.counts(model.kernel, model.max_lora_rank) for step in steps)
    return [abs(model.step_ms(one) / step.ms - 1) for one, step in zip(counts, steps, strict=True)]


def _clipped(errors: Sequence[float]) -> list[float]:
    """A step that something else slowed down says nothing of a kernel."""
    return [min(error, _MOST_ERROR) for error in errors]


def _row(counts: StepCounts) -> tuple[float, ...]:
    """The counts in the order of `COEFFICIENTS`."""
    return (
        1.0,
        counts.rows,
        counts.prefill_tokens,
        counts.prefill_pairs,
        counts.context_tokens,
        1.0 if counts.adapters else 0.0,
        counts.adapters,
        counts.decode_rank,
        counts.prefill_rank,
    )


def _robust(columns: "np.ndarray[Any, np.dtype[np.float64]]") -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Values of at least 0 whose products with the columns come near 1 in every row."""
    import numpy as np
    from scipy.optimize import least_squares, lsq_linear

    scales = np.abs(columns).max(axis=0)
    used = scales > 0
    scaled = columns[:, used] / scales[used]

    def residuals(values: Any) -> Any:
        return scaled @ values - 1.0

    def jacobian(_values: Any) -> Any:
        return scaled

    found = np.maximum(lsq_linear(scaled, np.ones(len(scaled)), bounds=(0.0, np.inf)).x, 0.0)
    for loss in ("soft_l1", "cauchy"):
        spread = _MAD_TO_SIGMA * float(np.median(np.abs(residuals(found))))
        scale = _SOFT_SCALE if loss == "soft_l1" else min(max(spread, _LEAST_SCALE), _SOFT_SCALE)
        done = least_squares(
            residuals, found, jac=jacobian, bounds=(0.0, np.inf), loss=loss, f_scale=scale, max_nfev=500
        )
        found = done.x
    values = np.zeros(columns.shape[1])
    values[used] = np.where(found < _LEAST_SHARE, 0.0, found) / scales[used]
    return values
