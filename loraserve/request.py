"""One generation request and its output as plain values, shared by router, replica and engines."""

from dataclasses import dataclass, field
from enum import Enum

from placement.types import VersionId


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTurn:
    """One message of a conversation."""

    role: str
    content: str


Prompt = str | tuple[int, ...] | tuple[ChatTurn, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn; the defaults are those of the OpenAI and vLLM interfaces.

    `top_k` 0 means all tokens; `logprobs` None means none are returned.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_tokens: int = 16
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None
    ignore_eos: bool = False

    @property
    def is_resumable(self) -> bool:
        """Whether another engine can go on exactly after some of the output (issue 3).

        Greedy decoding depends on the tokens alone, and drawing without a seed may draw anew. Presence
        and frequency penalties count output tokens, which a resumed engine takes for prompt; the
        repetition penalty counts both alike. A seed's state and the logprobs so far cannot be had back.
        """
        drawn_anew = self.temperature == 0 or self.seed is None
        counted = self.presence_penalty != 0 or self.frequency_penalty != 0
        return drawn_anew and not counted and self.logprobs is None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What an engine is asked to generate.

    `prompt` is text, token ids, or a conversation for the base tokenizer's chat template;
    `version_id` None names the base model. `resumed_token_ids` are output that an earlier engine gave:
    the output goes on after it, as if it had been one.
    """

    request_id: str
    prompt: Prompt
    version_id: VersionId | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    resumed_token_ids: tuple[int, ...] = ()


TEXT_CHARACTERS_PER_TOKEN = 4
"""A rule of thumb for prompts that nobody has tokenized yet."""


def num_prompt_tokens(prompt: Prompt) -> int:
    """How long the prompt is, about: exact for token ids, by its characters for text; at least 1."""
    if isinstance(prompt, str):
        return max(1, len(prompt) // TEXT_CHARACTERS_PER_TOKEN)
    texts = [len(one.content) for one in prompt if isinstance(one, ChatTurn)]
    return max(1, len(prompt) - len(texts) + sum(texts) // TEXT_CHARACTERS_PER_TOKEN)


class FinishReason(Enum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """One alternative for a position; `rank` 1 is the likeliest token."""

    token_id: int
    logprob: float
    rank: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationStep:
    """What one engine step added to one request; the last step carries `finish_reason`.

    `token_ids`, `text` and `logprobs` are deltas; `output_tokens` counts all so far.
    """

    token_ids: tuple[int, ...]
    text: str
    prompt_tokens: int
    output_tokens: int
    finish_reason: FinishReason | None = None
    stop_reason: str | None = None
    logprobs: tuple[tuple[Logprob, ...], ...] = ()
