"""Options that one command takes over from another, with their types, defaults and help."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., None])
KEYWORDS = "options"
"""The `**options` of a function that takes options over."""


def taking_options(source: Callable[..., Any], names: Iterable[str]) -> Callable[[Function], Function]:
    """A decorator: the function's `**options` are these parameters of `source`, on its command line as well.

    They come after the function's own, so that both have to be given by keyword.
    """

    def decorate(function: Function) -> Function:
        signature, theirs = inspect.signature(function), inspect.signature(source).parameters
        own = [one for one in signature.parameters.values() if one.name != KEYWORDS]
        taken = [theirs[name].replace(kind=inspect.Parameter.KEYWORD_ONLY) for name in names]
        vars(function)["__signature__"] = signature.replace(parameters=[*own, *taken])
        return function

    return decorate
