"""Prompts of a given length, a pure function of the seed and the request's index."""

import random

FIRST_SAFE_ID = 16
SAFE_VOCAB_SIZE = 250
"""Ids from `FIRST_SAFE_ID` up to this exist in every tokenizer worth serving, and are rarely special."""

INDEX_DIGITS = 4
"""Leading tokens that spell the request's index, so that no prefix cache takes two prompts for one."""


class PromptSource:
    """Draws prompts as slices of one long random text, which is much cheaper than drawing tokens."""

    def __init__(self, *, seed: int, longest_tokens: int, vocab_size: int = SAFE_VOCAB_SIZE) -> None:
        if vocab_size <= FIRST_SAFE_ID:
            raise ValueError(f"a vocabulary of {vocab_size} is too small; give more than {FIRST_SAFE_ID}")
        self._base = vocab_size - FIRST_SAFE_ID
        generator = random.Random(seed)
        size = longest_tokens + 4096
        self._text = tuple(FIRST_SAFE_ID + generator.randrange(self._base) for _ in range(size))
        self._seed = seed

    def prompt(self, index: int, num_tokens: int) -> tuple[int, ...]:
        """The token ids of one request's prompt."""
        digits = []
        rest = index
        for _ in range(min(INDEX_DIGITS, num_tokens)):
            digits.append(FIRST_SAFE_ID + rest % self._base)
            rest //= self._base
        size = num_tokens - len(digits)
        start = random.Random(self._seed * 1_000_003 + index).randrange(len(self._text) - size)
        return (*digits, *self._text[start : start + size])
