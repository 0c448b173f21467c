"""HOST:PORT as operators write it."""

import re

ADDRESS = re.compile(r"([^/\s]+):([0-9]{1,5})")


def split_address(address: str) -> tuple[str, int] | None:
    """The host, if in brackets without them, and the port; None for what is not HOST:PORT with a port from 1
    to 65535. Whether there is such a host is not looked at."""
    match = ADDRESS.fullmatch(address)
    if match is None:
        return None
    host, port = match[1].strip("[]"), int(match[2])
    return (host, port) if host and 0 < port < 65536 else None
