"""How long one engine step takes: the latency model, its rank kernels, and the integers it is computed in.

Owns no batch: a step is told as counts. Shared by the replica model, the profiler and policies.
"""

from dataclasses import dataclass
from enum import StrEnum

PS_PER_MS = 1_000_000_000
PS_PER_S = 1_000_000_000_000
"""Simulated time is counted in whole picoseconds, so that a sum over a run of steps is exact whichever
way it is added up; 64 bits hold 106 days of them."""


MAX_COEFFICIENT_MS = 1e5
"""Times tens of thousands of rows or tokens, a step still fits into 64 bits."""


class RankKernel(StrEnum):
    """What a step's adapter rows are charged for.

    PADDED_CONFIG (stock vLLM): each row the engine's `max_lora_rank`. PADDED_BATCH (BGMV): each row the
    largest rank in the step. SUM (MBGMV, rank-true execution): each row its own rank.
    """

    PADDED_CONFIG = "padded_config"
    PADDED_BATCH = "padded_batch"
    SUM = "sum"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCounts:
    """What one step computes.

    A row is one sequence in the step, decoding or computing a chunk of its prompt. `prefill_pairs` is the
    sum over all prompt tokens computed of the tokens before each; `context_tokens` the tokens in the KV
    cache of the decoding rows, the one being computed included. `decode_rank` is the sum over decoding
    adapter rows of the rank that the kernel charges, `prefill_rank` the same over prompt tokens.
    """

    rows: int = 0
    prefill_tokens: int = 0
    prefill_pairs: int = 0
    context_tokens: int = 0
    adapters: int = 0
    decode_rank: int = 0
    prefill_rank: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyModel:
    """A step's milliseconds, linear in `StepCounts` (Toppings and Chameleon fit the same form; the
    rank terms are papers.md's `padded`, `sum` and, with coefficients of 0, `flat`).

    `lora_step_ms` is paid by a step with at least one adapter row, `adapter_ms` per different adapter in
    it. `max_lora_rank` is what `padded_config` charges. ValueError for a coefficient below 0 or
    above `MAX_COEFFICIENT_MS`.
    """

    kernel: RankKernel = RankKernel.PADDED_BATCH
    max_lora_rank: int = 128
    base_ms: float = 0.0
    row_ms: float = 0.0
    prefill_token_ms: float = 0.0
    prefill_pair_ms: float = 0.0
    context_token_ms: float = 0.0
    lora_step_ms: float = 0.0
    adapter_ms: float = 0.0
    decode_rank_ms: float = 0.0
    prefill_rank_ms: float = 0.0

    def __post_init__(self) -> None:
        for name in COEFFICIENTS:
            value = getattr(self, name)
            if not 0 <= value <= MAX_COEFFICIENT_MS:
                raise ValueError(f"{name}: {value}; expected milliseconds from 0 to {MAX_COEFFICIENT_MS:g}")

    def step_ms(self, counts: StepCounts) -> float:
        """The step's duration."""
        return (
            self.base_ms
            + self.row_ms * counts.rows
            + self.prefill_token_ms * counts.prefill_tokens
            + self.prefill_pair_ms * counts.prefill_pairs
            + self.context_token_ms * counts.context_tokens
            + (self.lora_step_ms if counts.adapters else 0.0)
            + self.adapter_ms * counts.adapters
            + self.decode_rank_ms * counts.decode_rank
            + self.prefill_rank_ms * counts.prefill_rank
        )


COEFFICIENTS = (
    "base_ms",
    "row_ms",
    "prefill_token_ms",
    "prefill_pair_ms",
    "context_token_ms",
    "lora_step_ms",
    "adapter_ms",
    "decode_rank_ms",
    "prefill_rank_ms",
)
"""Every coefficient of `LatencyModel`, in the order of its formula."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """A latency model in whole picoseconds, as the replica model computes with it."""

    kernel: RankKernel
    max_lora_rank: int
    base: int
    row: int
    prefill_token: int
    prefill_pair: int
    context_token: int
    lora_step: int
    adapter: int
    decode_rank: int
    prefill_rank: int

    @classmethod
    def of(cls, model: LatencyModel, speed: float = 1.0) -> "StepCost":
        """The model's coefficients, each rounded to a picosecond; a `speed` of 2 halves every step."""
        values = [round(getattr(model, name) * PS_PER_MS / speed) for name in COEFFICIENTS]
        base, row, token, pair, context, lora, adapter, decode, prefill = values
        return cls(
            kernel=model.kernel,
            max_lora_rank=model.max_lora_rank,
            # In steps of no time at all simulated time would stand still.
            base=max(base, 1),
            row=row,
            prefill_token=token,
            prefill_pair=pair,
            context_token=context,
            lora_step=lora,
            adapter=adapter,
            decode_rank=decode,
            prefill_rank=prefill,
        )

    def step_ps(self, counts: StepCounts) -> int:
        """The step's duration."""
        return (
            self.base
            + self.row * counts.rows
            + self.prefill_token * counts.prefill_tokens
            + self.prefill_pair * counts.prefill_pairs
            + self.context_token * counts.context_tokens
            + (self.lora_step if counts.adapters else 0)
            + self.adapter * counts.adapters
            + self.decode_rank * counts.decode_rank
            + self.prefill_rank * counts.prefill_rank
        )
