"""What an adapter may be called."""

import re

from loraserve.errors import AdapterRejectedError
from placement.types import AdapterName

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def parse_name(text: str) -> AdapterName:
    """Check an adapter's name: 1 to 128 of A-Z a-z 0-9 . _ -, a letter or digit first, no `..` in it.

    Such a name is safe as a file name, in a URL and in `name@digest16`.
    """
    if not _NAME.fullmatch(text) or ".." in text:
        raise AdapterRejectedError(
            f"adapter name {ascii(text)[:160]}: expected 1 to 128 letters, digits, '.', '_' or '-', "
            "a letter or digit first, and no '..'"
        )
    return AdapterName(text)
