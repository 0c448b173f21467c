"""The outputs of vLLM as steps, for a request from its beginning and for one resumed after earlier output.

A resumed request runs in vLLM with the earlier output as the end of its prompt, and without text: vLLM would
decode and search only what is new. The text comes from vLLM's own detokenizer, fed here with all the output.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from loraserve.engines.vllm_outputs import generation_step, last_step, vllm_sampling
from loraserve.request import FinishReason, GenerationRequest, GenerationStep


def vllm_work(client: Any, request: GenerationRequest, prompt_ids: list[int]) -> "FreshWork | ResumedWork":
    """What vLLM is asked for a request; BadInputError for values that it refuses.

    `token_ids` and `sampling` are for vLLM; `ended` is the only step of a request that has nothing left
    to generate. The first step with a finish reason is the last, also when vLLM would go on.
    """
    if request.resumed_token_ids:
        return ResumedWork(client, request, prompt_ids)
    return FreshWork(request, prompt_ids)


class FreshWork:
    """A request from its beginning: vLLM does it all."""

    def __init__(self, request: GenerationRequest, prompt_ids: list[int]) -> None:
        self.token_ids = prompt_ids
        self.sampling = vllm_sampling(request.sampling)
        self.ended: GenerationStep | None = None
        self._output_tokens = 0

    def step(self, output: Any) -> GenerationStep:
        """One delta of vLLM."""
        step = generation_step(output, len(self.token_ids), self._output_tokens)
        self._output_tokens = step.output_tokens
        return step

    def aborted(self) -> GenerationStep:
        """The only step of a request that was aborted before vLLM had it."""
        return last_step(len(self.token_ids), 0, FinishReason.ABORTED)


class ResumedWork:
    """A request after earlier output, which counts as if it had been generated here."""

    def __init__(self, client: Any, request: GenerationRequest, prompt_ids: list[int]) -> None:
        resumed = request.resumed_token_ids
        whole = vllm_sampling(request.sampling)
        self.token_ids = [*prompt_ids, *resumed]
        self._prompt_tokens = len(prompt_ids)
        self._output_tokens = len(resumed)
        self._detokenizer = _detokenizer(client, request.request_id, prompt_ids, whole)
        self.ended = self._end_of(client, whole, resumed)
        # The text so far has been given out by the engine before.
        self._detokenizer.get_next_output_text(self.ended is not None, delta=True)
        left = max(1, request.sampling.max_tokens - len(resumed))
        self.sampling = vllm_sampling(
            dataclasses.replace(
                request.sampling,
                stop=(),
                max_tokens=left,
                min_tokens=max(0, request.sampling.min_tokens - len(resumed)),
            ),
            detokenize=False,
        )

    def step(self, output: Any) -> GenerationStep:
        """vLLM's delta with its text, cut at a stop string, which only this detokenizer knows."""
        step = generation_step(output, self._prompt_tokens, self._output_tokens)
        stopped = step.finish_reason is FinishReason.STOP
        # Token by token, as vLLM does it for a request of its own: a delta may hold several steps.
        for number, token_id in enumerate(step.token_ids, start=1):
            is_stop = stopped and number == len(step.token_ids)
            stop = self._detokenizer.update([token_id], is_stop)
            if stop is not None:
                step = dataclasses.replace(
                    step,
                    token_ids=step.token_ids[:number],
                    output_tokens=self._output_tokens + number,
                    finish_reason=FinishReason.STOP,
                    stop_reason=stop,
                )
                break
        self._output_tokens = step.output_tokens
        text = self._detokenizer.get_next_output_text(step.finish_reason is not None, delta=True)
        return dataclasses.replace(step, text=text)

    def aborted(self) -> GenerationStep:
        """As for a fresh request; the text is what was held back before."""
        text = self._detokenizer.get_next_output_text(True, delta=True)
        return dataclasses.replace(self._last(FinishReason.ABORTED), text=text)

    def _end_of(self, client: Any, sampling: Any, resumed: Sequence[int]) -> GenerationStep | None:
        """Feeds the detokenizer; how the earlier output ended, if it did."""
        stops = sampling.clone()
        stops.update_from_generation_config(
            client.input_processor.generation_config_fields, client.renderer.get_eos_token_id()
        )
        named = stops.stop_token_ids or ()
        for number, token_id in enumerate(resumed, start=1):
            is_stop = token_id == stops.eos_token_id or token_id in named
            stop = self._detokenizer.update([token_id], is_stop)
            if stop is not None or is_stop:
                return self._last(FinishReason.STOP, stop or (str(token_id) if token_id in named else None))
            at_limit = self._prompt_tokens + number >= client.model_config.max_model_len
            if at_limit or number >= sampling.max_tokens:
                return self._last(FinishReason.LENGTH)
        return None

    def _last(self, reason: FinishReason, stop_reason: str | None = None) -> GenerationStep:
        return last_step(self._prompt_tokens, self._output_tokens, reason, stop_reason)


def _detokenizer(client: Any, request_id: str, prompt_ids: list[int], sampling: Any) -> Any:
    """The detokenizer that vLLM would make for the request itself."""
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    request = EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=prompt_ids,
        mm_features=None,
        sampling_params=sampling,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    return IncrementalDetokenizer.from_new_request(client.output_processor.tokenizer, request)
