"""The load at which a latency model saturates: what a replica that never lacks requests gives.

Pure. Operating points are scaled by it where a replica is taken to run otherwise than it was measured.
"""

from dataclasses import dataclass

from placement.latency import LatencyModel, RankKernel


@dataclass(frozen=True, slots=True, kw_only=True)
class SteadyLoad:
    """A replica that always has `rows` requests to decode, all of these lengths and of one adapter."""

    rows: int
    prompt_tokens: float
    output_tokens: float

    @property
    def tokens_per_step(self) -> float:
        """Prompt and output tokens of one step: each row draws one, and prompts come as outputs end."""
        return self.rows * (1 + self.prompt_tokens / self.output_tokens)


def steady_tokens_per_s(model: LatencyModel, load: SteadyLoad, rank: int) -> float:
    """Prompt and output tokens/s in the steady state, if the replica never lacks requests.

    Each step draws a token for each row, so that `rows / output_tokens` requests end and as many prompts
    are computed beside.
    """
    fixed_ms, per_rank_ms = step_terms_ms(model, load)
    charged = model.max_lora_rank if model.kernel is RankKernel.PADDED_CONFIG else rank
    return 1e3 * load.tokens_per_step / (fixed_ms + per_rank_ms * charged)


def step_terms_ms(model: LatencyModel, load: SteadyLoad) -> tuple[float, float]:
    """A steady step's milliseconds without rank, and per unit of the rank charged."""
    prompts = load.rows / load.output_tokens
    fixed_ms = (
        model.base_ms
        + model.row_ms * (load.rows + prompts)
        + model.prefill_token_ms * prompts * load.prompt_tokens
        + model.prefill_pair_ms * prompts * load.prompt_tokens**2 / 2
        + model.context_token_ms * load.rows * (load.prompt_tokens + load.output_tokens / 2)
        + model.lora_step_ms
        + model.adapter_ms
    )
    rank_ms = model.decode_rank_ms * load.rows + model.prefill_rank_ms * prompts * load.prompt_tokens
    return fixed_ms, rank_ms
