"""What one emulated request says: its tokens, their text, and where it stops.

The tokens are a pure function of the version, the seed and all tokens before, so that a request resumed
elsewhere from its prompt and its output so far goes on exactly as it would have.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from loraserve.engines.tokenizer import PromptRenderer
from loraserve.request import FinishReason, GenerationRequest, GenerationStep, Logprob, SamplingParams

EOS_ONE_IN = 512
"""How often the emulated model wants to end its answer: once in so many tokens."""

NO_SEED = -1


class TokenSource:
    """Draws the tokens of one request by a keyed hash over all tokens before."""

    def __init__(
        self, model_id: str, seed: int | None, context: Sequence[int], words: Sequence[int], eos: int | None
    ) -> None:
        key = hashlib.blake2b(model_id.encode(), digest_size=32).digest()
        self._state = hashlib.blake2b(key=key, digest_size=16)
        self._state.update((NO_SEED if seed is None else seed).to_bytes(16, "little", signed=True))
        self._state.update(b"".join(token_id.to_bytes(4, "little") for token_id in context))
        self._words = words
        self._eos = eos

    def draw(self, banned: frozenset[int]) -> tuple[int, int]:
        """The next token, none of `banned`, and the 64 random bits behind its log-probability."""
        for attempt in range(64):
            state = self._state.copy()
            state.update(attempt.to_bytes(1, "little"))
            digest = state.digest()
            value, bits = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
            token_id = self._words[value // EOS_ONE_IN % len(self._words)]
            if self._eos is not None and value % EOS_ONE_IN == 0:
                token_id = self._eos
            if token_id not in banned:
                break
        self.follow(token_id)
        return token_id, bits

    def follow(self, token_id: int) -> None:
        """Take this token as the next one, instead of drawing it."""
        self._state.update(token_id.to_bytes(4, "little"))


class StopScanner:
    """Finds stop strings in streamed text; holds back only what may be the beginning of one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that is safe to give out, and the stop string that ended it, if one did."""
        text = self._held + text
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, stop = min(found)
            self._held = ""
            return text[:at], stop
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], None

    def flush(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of the text that begins the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


@dataclass(slots=True)
class _Pending:
    """What has been drawn since the consumer last looked; never more than `max_tokens` tokens."""

    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    logprobs: list[tuple[Logprob, ...]] = field(default_factory=list)


class Output:
    """One request's output, token by token in, deltas out; steps that were not fetched are merged."""

    def __init__(
        self,
        request: GenerationRequest,
        prompt_ids: tuple[int, ...],
        renderer: PromptRenderer,
        words: Sequence[int],
        max_tokens: int,
    ) -> None:
        sampling = request.sampling
        eos = min(renderer.eos_token_ids, default=None)
        # Greedy decoding does not depend on the seed.
        seed = sampling.seed if sampling.temperature > 0 else None
        self._source = TokenSource(request.version_id or "", seed, prompt_ids, words, eos)
        self._renderer = renderer
        self._words = words
        self._detokeniser = renderer.detokeniser(prompt_ids)
        self._scanner = StopScanner(sampling.stop)
        self._sampling = sampling
        self._max_tokens = max_tokens
        self._ends = frozenset(sampling.stop_token_ids) | (
            frozenset() if sampling.ignore_eos else renderer.eos_token_ids
        )
        self._prompt_tokens = len(prompt_ids)
        self._output_tokens = 0
        self._pending = _Pending()
        self._finish: tuple[FinishReason, str | None] | None = None

    @property
    def finished(self) -> bool:
        """Whether the last token has been drawn."""
        return self._finish is not None

    def resume(self, token_ids: Sequence[int]) -> None:
        """Go on after these tokens, whose text has been given out; called once, before `extend`."""
        for token_id in token_ids:
            if not self.finished:
                self._source.follow(token_id)
                self._append(token_id)
        self._output_tokens = len(token_ids)
        self._pending = _Pending()

    def extend(self) -> None:
        """Draw one token; sets `finished` if it is the last."""
        early = self._output_tokens < self._sampling.min_tokens
        token_id, bits = self._source.draw(self._ends if early else frozenset())
        if self._sampling.logprobs is not None:
            self._pending.logprobs.append(self._logprobs(token_id, bits, self._sampling))
        self._append(token_id)

    def abort(self) -> None:
        """End the output where it is."""
        if self._finish is None:
            self._end(FinishReason.ABORTED, None)

    def take(self) -> GenerationStep | None:
        """All that is new, or None; the caller takes until a step carries a finish reason."""
        pending = self._pending
        if not pending.token_ids and self._finish is None:
            return None
        self._pending = _Pending()
        reason, stop = self._finish or (None, None)
        return GenerationStep(
            token_ids=tuple(pending.token_ids),
            text="".join(pending.text),
            prompt_tokens=self._prompt_tokens,
            output_tokens=self._output_tokens,
            finish_reason=reason,
            stop_reason=stop,
            logprobs=tuple(pending.logprobs),
        )

    def _append(self, token_id: int) -> None:
        early = self._output_tokens < self._sampling.min_tokens
        self._output_tokens += 1
        self._pending.token_ids.append(token_id)
        if token_id in self._ends:
            named = token_id in self._sampling.stop_token_ids
            self._end(FinishReason.STOP, str(token_id) if named else None)
            return
        text = self._detokeniser.push((token_id,))
        stop = None
        if not early:
            text, stop = self._scanner.push(text)
        self._pending.text.append(text)
        if stop is not None:
            self._finish = (FinishReason.STOP, stop)
        elif self._output_tokens >= self._max_tokens:
            self._end(FinishReason.LENGTH, None)

    def _end(self, reason: FinishReason, stop_reason: str | None) -> None:
        self._finish = (reason, stop_reason)
        self._pending.text.append(self._scanner.flush())
        text, stop = self._scanner.push(self._detokeniser.flush())
        self._pending.text += [text, self._scanner.flush() if stop is None else ""]

    def _logprobs(self, token_id: int, bits: int, sampling: SamplingParams) -> tuple[Logprob, ...]:
        """The drawn token as the likeliest, then as many others as asked for, ever less likely."""
        start = bits % len(self._words)
        others = (self._words[(start + at) % len(self._words)] for at in range(len(self._words)))
        wanted = max(1, sampling.logprobs or 0)
        chosen = [token_id]
        for other in others:
            if len(chosen) >= wanted:
                break
            if other not in chosen:
                chosen.append(other)
        best = -(bits % 1000) / 2000
        return tuple(
            Logprob(
                token_id=one, logprob=best - 1.5 * rank, rank=rank + 1, text=self._renderer.decode((one,))
            )
            for rank, one in enumerate(chosen)
        )
