"""The figures of `bench rank`, from the medians of its rows.

Pure. t(mode, row) is the median time of a row in a mode; a(mode, row) = t(mode, row) - t(off, the same shape
without adapters) is what LoRA adds to it. KIND is prefill or decode, R a rank; off is an engine without LoRA.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from loraserve.bench.rank_rows import KINDS, Kind, base_of

FORMULAS: Mapping[str, str] = {
    "KIND_ratio_rR": "t(stock, KIND_rR) / t(rank-true, KIND_rR)",
    "KIND_ratio_limit_rR": "t(stock, KIND_rR) / t(off, KIND_base): the ratio if adapters cost nothing at all",
    "KIND_over_padded_rR": "a(padded, KIND_rR) / a(rank-true, KIND_rR)",
    "KIND_step_over_padded_rR": "t(padded, KIND_rR) / t(rank-true, KIND_rR)",
    "KIND_over_no_lora_rR": "t(rank-true, KIND_rR) / t(off, KIND_base)",
    "base_over_no_lora_KIND": "t(rank-true, KIND_base) / t(off, KIND_base)",
    "mixed_over_sum_KIND": (
        "a(rank-true, KIND_mixed) / (a(rank-true, KIND_low_part) + a(rank-true, KIND_high_part))"
    ),
    "mixed_step_over_sum_KIND": (
        "t(rank-true, KIND_mixed) / (t(off, KIND_mixed's shape)"
        " + a(rank-true, KIND_low_part) + a(rank-true, KIND_high_part))"
    ),
}

# What a figure should be on the default subject on a CPU: at least, or at most.
AT_LEAST: Mapping[str, float] = {
    "prefill_ratio_r8": 50.0,
    "prefill_ratio_r128": 40.0,
    "decode_ratio_r8": 1.7,
    "prefill_over_padded_r8": 2.0,
}
AT_MOST: Mapping[str, float] = {
    "decode_over_no_lora_r8": 1.5,
    "mixed_over_sum_prefill": 1.15,
    "mixed_over_sum_decode": 1.15,
}

Times = Mapping[str, Mapping[str, float]]
"""mode → row → median in milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The median of a row's repetitions, the middle half of them, and how many there were."""

    median_ms: float
    p25_ms: float
    p75_ms: float
    samples: int


def spread(samples_ms: Sequence[float]) -> Spread:
    """Of at least one repetition; ValueError for none."""
    if not samples_ms:
        raise ValueError("no repetitions")
    low, high = samples_ms[0], samples_ms[0]
    if len(samples_ms) > 1:
        low, _, high = quantiles(samples_ms, n=4, method="inclusive")
    return Spread(median_ms=median(samples_ms), p25_ms=low, p75_ms=high, samples=len(samples_ms))


def figures(times: Times, ranks: Iterable[int]) -> dict[str, float | None]:
    """Every figure of `FORMULAS` by name; None where a row was not measured, or where what LoRA adds, to
    divide by, is lost in the noise (zero or less)."""
    found: dict[str, float | None] = {}
    sums = _Sums(times)
    for kind in KINDS:
        for rank in sorted(set(ranks)):
            found |= _rank_figures(sums, kind, f"r{rank}")
        found[f"base_over_no_lora_{kind}"] = _ratio(
            sums.step("rank-true", kind, "base"), sums.step("off", kind, "base")
        )
        parts = _added(sums.added("rank-true", kind, "low_part"), sums.added("rank-true", kind, "high_part"))
        found[f"mixed_over_sum_{kind}"] = _ratio(sums.added("rank-true", kind, "mixed"), parts)
        whole = _added(sums.step("off", kind, base_of(kind, "mixed")), parts)
        found[f"mixed_step_over_sum_{kind}"] = _ratio(sums.step("rank-true", kind, "mixed"), whole)
    return found


def verdict(key: str, value: float | None) -> str:
    """A figure's target and whether it is met; '' without one."""
    checks: tuple[tuple[str, Mapping[str, float], Callable[[float, float], bool]], ...] = (
        ("≥", AT_LEAST, float.__ge__),
        ("≤", AT_MOST, float.__le__),
    )
    for sign, bounds, holds in checks:
        if key in bounds:
            met = value is not None and holds(float(value), bounds[key])
            state = "not measured" if value is None else "met" if met else "MISSED"
            return f"{sign} {bounds[key]:g} {state}"
    return ""


class _Sums:
    """t and a of the module's docstring."""

    def __init__(self, times: Times) -> None:
        self._times = times

    def step(self, mode: str, kind: Kind, batch: str) -> float | None:
        """t(mode, row)."""
        return self._times.get(mode, {}).get(f"{kind}_{batch}")

    def added(self, mode: str, kind: Kind, batch: str) -> float | None:
        """a(mode, row)."""
        step, without = self.step(mode, kind, batch), self.step("off", kind, base_of(kind, batch))
        return None if step is None or without is None else step - without


def _rank_figures(sums: _Sums, kind: Kind, batch: str) -> dict[str, float | None]:
    true_step, true_added = sums.step("rank-true", kind, batch), sums.added("rank-true", kind, batch)
    return {
        f"{kind}_ratio_{batch}": _ratio(sums.step("stock", kind, batch), true_step),
        f"{kind}_ratio_limit_{batch}": _ratio(
            sums.step("stock", kind, batch), sums.step("off", kind, "base")
        ),
        f"{kind}_over_padded_{batch}": _ratio(sums.added("padded", kind, batch), true_added),
        f"{kind}_step_over_padded_{batch}": _ratio(sums.step("padded", kind, batch), true_step),
        f"{kind}_over_no_lora_{batch}": _ratio(true_step, sums.step("off", kind, "base")),
    }


def _added(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other


def _ratio(top: float | None, bottom: float | None) -> float | None:
    return None if top is None or bottom is None or bottom <= 0 else round(top / bottom, 4)
