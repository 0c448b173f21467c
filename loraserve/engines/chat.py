"""A model's chat template, rendered in jinja2's sandbox as the Hugging Face tokenizers do it."""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from loraserve.errors import BadInputError, ConfigError
from loraserve.request import ChatTurn

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class ChatTemplate:
    """One template; `special_tokens` are the names that it may use, such as `bos_token`."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        from jinja2 import TemplateSyntaxError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise ConfigError(f"model.path: the chat template does not parse: {error}") from error
        self._special_tokens = special_tokens

    @classmethod
    def of_folder(cls, folder: Path, settings: dict[str, Any]) -> "ChatTemplate | None":
        """The template of a model folder: its own file first, then `tokenizer_config.json`'s."""
        own = folder / "chat_template.jinja"
        source = own.read_text(encoding="utf-8") if own.is_file() else settings.get("chat_template")
        if isinstance(source, list):
            source = next((one["template"] for one in source if one.get("name") == "default"), None)
        return cls(source, _special_tokens(settings)) if isinstance(source, str) else None

    def render(self, turns: Sequence[ChatTurn]) -> str:
        """The conversation as text; BadInputError with the template's own reason if it refuses it."""
        from jinja2 import TemplateError

        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, **self._special_tokens
            )
        except (TemplateError, TypeError) as error:
            raise BadInputError(f"chat: the model's template refuses the conversation: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file, {} if there is no file; ConfigError if it is no JSON object."""
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"model.path: {path} is not valid JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"model.path: {path}: expected an object, got {type(tree).__name__}")
    return tree


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    found = {}
    for name in SPECIAL_TOKENS:
        token = settings.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            found[name] = text
    return found


def _to_json(value: object, indent: int | None = None) -> str:
    """JSON without HTML escapes, which jinja's own filter would add."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
