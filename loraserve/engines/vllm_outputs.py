"""Between LoRAServe's request values and vLLM's sampling parameters, outputs and statistics."""

from typing import Any

from loraserve.engines.base import EngineLoad
from loraserve.errors import BadInputError, WorkFailedError
from loraserve.request import FinishReason, GenerationStep, Logprob, SamplingParams

_FINISH = {
    None: None,
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "abort": FinishReason.ABORTED,
}
_INT64 = 2**63


def vllm_sampling(sampling: SamplingParams, *, detokenize: bool = True) -> Any:
    """vLLM's SamplingParams with delta outputs, of text too or of tokens only.

    BadInputError for a value that vLLM refuses.
    """
    from vllm import SamplingParams as VllmSamplingParams
    from vllm.exceptions import VLLMClientError
    from vllm.sampling_params import RequestOutputKind

    # vLLM reads these as "all of the vocabulary" and "no seed".
    if sampling.logprobs is not None and sampling.logprobs < 0:
        raise BadInputError(f"sampling.logprobs: expected 0 or more, got {sampling.logprobs}")
    seed = sampling.seed
    if seed is not None and not -_INT64 <= seed < _INT64:
        raise BadInputError(f"sampling.seed: expected a signed 64-bit number, got {seed}")
    try:
        return VllmSamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=None if seed is None else seed % _INT64,
            stop=list(sampling.stop),
            stop_token_ids=list(sampling.stop_token_ids),
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            logprobs=sampling.logprobs,
            ignore_eos=sampling.ignore_eos,
            detokenize=detokenize,
            output_kind=RequestOutputKind.DELTA,
        )
    except (VLLMClientError, ValueError) as error:
        raise BadInputError(f"sampling: {error}") from error


def generation_step(output: Any, prompt_tokens: int, output_tokens_before: int) -> GenerationStep:
    """One vLLM RequestOutput (a delta) as a step; WorkFailedError if the request failed inside vLLM."""
    completion = output.outputs[0]
    if completion.finish_reason not in _FINISH:
        raise WorkFailedError(f"request {output.request_id}: vLLM ended it with {completion.finish_reason!r}")
    stop_reason = completion.stop_reason
    return GenerationStep(
        token_ids=tuple(completion.token_ids),
        text=completion.text,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens_before + len(completion.token_ids),
        finish_reason=_FINISH[completion.finish_reason],
        stop_reason=None if stop_reason is None else str(stop_reason),
        logprobs=tuple(_position(position) for position in completion.logprobs or ()),
    )


def last_step(
    prompt_tokens: int, output_tokens: int, reason: FinishReason, stop_reason: str | None = None
) -> GenerationStep:
    """The last step of a request to which nothing is added."""
    return GenerationStep(
        token_ids=(),
        text="",
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        finish_reason=reason,
        stop_reason=stop_reason,
    )


def _position(alternatives: dict[int, Any]) -> tuple[Logprob, ...]:
    """The chosen token first, then the likeliest ones in order."""
    return tuple(
        Logprob(
            token_id=token_id,
            logprob=entry.logprob,
            rank=entry.rank or 0,
            text=entry.decoded_token or "",
        )
        for token_id, entry in alternatives.items()
    )


class LoadRecorder:
    """Keeps what the scheduler said of its last step; vLLM calls it as one of its stat loggers."""

    def __init__(self) -> None:
        self._running = 0
        self._kv_cache_usage = 0.0

    def factory(self, vllm_config: Any, engine_index: int = 0) -> "LoadRecorder":
        """What vLLM calls to make the logger: this one."""
        return self

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Take over one step's figures."""
        if scheduler_stats is not None:
            self._running = scheduler_stats.num_running_reqs
            self._kv_cache_usage = scheduler_stats.kv_cache_usage

    def log_engine_initialized(self) -> None:
        """Part of vLLM's interface; nothing to do."""

    def log(self) -> None:
        """Part of vLLM's interface; nothing to do."""

    def record_sleep_state(self, is_awake: int, level: int) -> None:
        """Part of vLLM's interface; nothing to do."""

    def load(self, in_flight: int) -> EngineLoad:
        """The load, given the exact number of requests in flight.

        The scheduler reports at the end of a step only, so its figures may name requests that an
        abort has ended since: the number in flight bounds them.
        """
        running = min(self._running, in_flight)
        usage = self._kv_cache_usage if in_flight else 0.0
        return EngineLoad(running=running, waiting=in_flight - running, kv_cache_usage=usage)
