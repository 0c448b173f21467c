"""Prompts to token ids and tokens back to text, for a model folder or for no model at all.

Owns tokenisation, chat templates and incremental decoding. Imports neither transformers nor a model:
`tokenizer.json` and the template are read directly. Without a folder, a token is a byte.
"""

import codecs
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from loraserve.engines.chat import ChatTemplate, read_json
from loraserve.errors import BadInputError, ConfigError
from loraserve.request import ChatTurn

if TYPE_CHECKING:
    from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
MAX_HELD_TOKENS = 64
"""How long bytes that form no character are held back: far more than one character needs."""

BYTE_BOS, BYTE_EOS = 256, 257
BYTE_VOCAB = 258
BYTE_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class Detokeniser(Protocol):
    """Turns one request's tokens into text as they come; a character is never split over two calls."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete, possibly empty."""
        ...

    def flush(self) -> str:
        """What was held back, incomplete characters as U+FFFD; ends the stream."""
        ...


class Codec(Protocol):
    """Text to ids and back; `clean_ids` decode, each alone, to whole characters, and may repeat."""

    vocab_size: int
    eos_token_ids: frozenset[int]

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def clean_ids(self) -> tuple[int, ...]: ...

    def detokeniser(self, prompt_ids: Sequence[int]) -> Detokeniser: ...


class PromptRenderer:
    """The base model's tokenizer and chat template."""

    def __init__(self, codec: Codec, template: ChatTemplate | None) -> None:
        self._codec = codec
        self._template = template
        self.vocab_size = codec.vocab_size
        self.eos_token_ids = codec.eos_token_ids

    @classmethod
    def load(cls, model_path: str) -> "PromptRenderer":
        """Read a model's folder or Hugging Face id; '' gives the built-in byte-level tokenizer."""
        if not model_path:
            return cls(ByteCodec(), ChatTemplate(BYTE_TEMPLATE, {}))
        folder = _model_folder(model_path)
        settings = read_json(folder / "tokenizer_config.json")
        return cls(HuggingFaceCodec(folder, settings), ChatTemplate.of_folder(folder, settings))

    def encode(self, text: str) -> tuple[int, ...]:
        """The text's ids, with the special tokens that the tokenizer adds to a plain prompt."""
        return self._codec.encode(text, add_special_tokens=True)

    def render_chat(self, turns: Sequence[ChatTurn]) -> str:
        """The conversation as the model's template writes it, up to where the answer starts."""
        if self._template is None:
            raise BadInputError("chat: the base model has no chat template; send text or token ids")
        return self._template.render(turns)

    def prompt_ids(self, prompt: str | tuple[int, ...] | tuple[ChatTurn, ...]) -> tuple[int, ...]:
        """The ids of any kind of prompt; BadInputError if it is empty or outside the vocabulary."""
        if isinstance(prompt, str):
            token_ids = self.encode(prompt)
        else:
            turns = tuple(part for part in prompt if isinstance(part, ChatTurn))
            if turns:
                token_ids = self._codec.encode(self.render_chat(turns), add_special_tokens=False)
            else:
                token_ids = tuple(part for part in prompt if isinstance(part, int))
        if not token_ids:
            raise BadInputError("prompt: empty; send at least one token")
        if min(token_ids) < 0 or max(token_ids) >= self.vocab_size:
            raise BadInputError(f"token_ids: outside the vocabulary of {self.vocab_size} tokens")
        return token_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of these ids alone, special tokens left out."""
        return self._codec.decode(token_ids)

    def clean_ids(self) -> tuple[int, ...]:
        """The ids that decode, each alone, to whole characters and are no special tokens."""
        return self._codec.clean_ids()

    def detokeniser(self, prompt_ids: Sequence[int]) -> Detokeniser:
        """A decoder for the tokens that follow this prompt."""
        return self._codec.detokeniser(prompt_ids)


class ByteCodec:
    """One token per byte of UTF-8, then the special tokens."""

    vocab_size = BYTE_VOCAB
    eos_token_ids = frozenset({BYTE_EOS})

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """The text's bytes, after a beginning-of-text token if asked for."""
        return ((BYTE_BOS,) if add_special_tokens else ()) + tuple(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        """The bytes as text, invalid ones as U+FFFD."""
        return bytes(one for one in token_ids if one < BYTE_BOS).decode(errors="replace")

    def clean_ids(self) -> tuple[int, ...]:
        """Lowercase letters, and spaces often enough to make words."""
        return tuple(b"abcdefghijklmnopqrstuvwxyz     ")

    def detokeniser(self, prompt_ids: Sequence[int]) -> Detokeniser:
        """A UTF-8 decoder; bytes need no context."""
        return _ByteDetokeniser()


class _ByteDetokeniser:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(bytes(one for one in token_ids if one < BYTE_BOS))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class HuggingFaceCodec:
    """A `tokenizer.json`."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"model.path: {path} is missing; LoRAServe needs a fast tokenizer")
        try:
            self._tokenizer: Tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more particular
            raise ConfigError(f"model.path: {path} is not a tokenizer: {error}") from error
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.eos_token_ids = _eos_token_ids(folder, settings, self._tokenizer)

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """The text's ids."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text, special tokens left out."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def clean_ids(self) -> tuple[int, ...]:
        """The ids whose own text is not empty and holds no broken character."""
        texts = self._tokenizer.decode_batch([[one] for one in range(self.vocab_size)])
        return tuple(one for one, text in enumerate(texts) if text and REPLACEMENT not in text)

    def detokeniser(self, prompt_ids: Sequence[int]) -> Detokeniser:
        """A decoder that sees the prompt's end, which decides leading spaces."""
        return _WindowDetokeniser(self, prompt_ids)


class _WindowDetokeniser:
    """Decodes a short window of tokens; only what can no longer change is given out."""

    CONTEXT_TOKENS = 4

    def __init__(self, codec: HuggingFaceCodec, prompt_ids: Sequence[int]) -> None:
        self._codec = codec
        self._window = list(prompt_ids[-self.CONTEXT_TOKENS :])
        self._num_known = len(self._window)
        self._given_chars = len(codec.decode(self._window).rstrip(REPLACEMENT))

    def push(self, token_ids: Sequence[int]) -> str:
        if not token_ids:
            return ""
        self._window.extend(token_ids)
        text = self._codec.decode(self._window)
        incomplete = text.endswith(REPLACEMENT)
        if incomplete and len(self._window) < MAX_HELD_TOKENS:
            text = text.rstrip(REPLACEMENT)
            return self._give(text)
        new = self._give(text)
        self._window = self._window[self._num_known :][-self.CONTEXT_TOKENS :]
        self._num_known = len(self._window)
        self._given_chars = len(self._codec.decode(self._window))
        return new

    def flush(self) -> str:
        return self._give(self._codec.decode(self._window))

    def _give(self, text: str) -> str:
        new = text[self._given_chars :]
        self._given_chars = max(self._given_chars, len(text))
        return new


def _model_folder(model_path: str) -> Path:
    folder = Path(model_path).expanduser()
    if folder.is_dir():
        return folder
    if model_path.startswith((".", "/", "~")) or model_path.count("/") != 1:
        raise ConfigError(f"model.path: {model_path} is no folder and no Hugging Face id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(model_path, allow_patterns=["*.json", "chat_template.jinja"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(f"model.path: cannot fetch {model_path}: {error}") from error
    return Path(found)


def _eos_token_ids(folder: Path, settings: dict[str, Any], tokenizer: "Tokenizer") -> frozenset[int]:
    """Generation settings name the ends of a text best; then the model's, then the tokenizer's."""
    for name in ("generation_config.json", "config.json"):
        found = read_json(folder / name).get("eos_token_id")
        if isinstance(found, int):
            return frozenset({found})
        if isinstance(found, list):
            return frozenset(int(one) for one in found)
    token = settings.get("eos_token")
    text = token.get("content", "") if isinstance(token, dict) else token
    token_id = tokenizer.token_to_id(text) if text else None
    return frozenset() if token_id is None else frozenset({token_id})
