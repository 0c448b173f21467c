"""Turns a request's prompt into token ids that the model can take."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from loraserve.errors import BadInputError
from loraserve.request import ChatTurn

# Shorter texts cost less to tokenise than a change of threads.
_INLINE_CHARS = 2048


class PromptEncoder:
    """Tokenises with the base model's own tokenizer; long texts off the event loop, one at a time."""

    def __init__(self, tokenizer: Any, *, max_model_len_tokens: int, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._max_model_len_tokens = max_model_len_tokens
        self._vocab_size = vocab_size
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loraserve-tokenize")
        # A tokenizer.json may ask for truncation or padding; the first call switches both off, which no
        # other thread may do at the same time.
        tokenizer("")

    async def encode(self, prompt: str | tuple[int, ...] | tuple[ChatTurn, ...]) -> list[int]:
        """The prompt's token ids; BadInputError if it is empty, too long or not of the vocabulary."""
        token_ids = await self._token_ids(prompt)
        longest = self._max_model_len_tokens - 1
        if not token_ids:
            raise BadInputError("prompt: it has no tokens; at least 1 is needed")
        if len(token_ids) > longest:
            raise BadInputError(
                f"prompt: {len(token_ids)} tokens do not fit; the limit is {longest} "
                f"(engine.max_model_len_tokens {self._max_model_len_tokens} less 1 for the output)"
            )
        return token_ids

    def close(self) -> None:
        """Let the thread go; safe to call twice."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _token_ids(self, prompt: str | tuple[int, ...] | tuple[ChatTurn, ...]) -> list[int]:
        if isinstance(prompt, str):
            return await self._tokenize(prompt, special=True)
        turns = [turn for turn in prompt if isinstance(turn, ChatTurn)]
        if turns:
            # The template writes the special tokens itself.
            return await self._tokenize(self._render(turns), special=False)
        return self._checked([token for token in prompt if isinstance(token, int)])

    async def _tokenize(self, text: str, *, special: bool) -> list[int]:
        if len(text) <= _INLINE_CHARS:
            return self._tokenize_now(text, special)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._tokenize_now, text, special)

    def _tokenize_now(self, text: str, special: bool) -> list[int]:
        try:
            token_ids: list[int] = self._tokenizer(text, add_special_tokens=special)["input_ids"]
        except (TypeError, ValueError) as error:  # such as a lone surrogate
            raise BadInputError(f"prompt: the tokenizer cannot read the text: {error}") from error
        return token_ids

    def _render(self, turns: Sequence[ChatTurn]) -> str:
        from jinja2 import TemplateError

        if not getattr(self._tokenizer, "chat_template", None):
            raise BadInputError("chat: the base model's tokenizer has no chat template; send text instead")
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            rendered: str = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise BadInputError(f"chat: the model's template refuses the conversation: {error}") from error
        return rendered

    def _checked(self, token_ids: list[int]) -> list[int]:
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < self._vocab_size):
            wrong = next(token for token in token_ids if not 0 <= token < self._vocab_size)
            raise BadInputError(
                f"prompt: token id {wrong} is outside the vocabulary (0 to {self._vocab_size - 1})"
            )
        return token_ids
