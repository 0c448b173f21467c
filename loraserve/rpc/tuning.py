"""gRPC's process-wide settings, which it reads from the environment when it is first imported.

Imports nothing of gRPC, so that an entry point can call `tune_grpc` before anything else.
"""

import os
import sys
from collections.abc import Mapping, MutableMapping
from importlib.metadata import version
from types import MappingProxyType

TUNED_RELEASES = ("1.85.",)
"""The grpcio releases that the settings were measured with; others run with their defaults."""

GRPC_ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        # gRPC's newer event engine reads sockets on threads of its own and wakes Python's poller for
        # each event; the older one reads them on the poller itself. ARCHITECTURE.md has the figures.
        "GRPC_EXPERIMENTS": (
            "-event_engine_client,-event_engine_listener,-event_engine_for_all_other_endpoints"
        ),
    }
)


def tune_grpc(environment: MutableMapping[str, str] | None = None) -> bool:
    """Put the settings into the environment (the process's own by default), those already there
    left alone; False when gRPC is imported already or its release was not measured."""
    target = os.environ if environment is None else environment
    if environment is None and "grpc._cython.cygrpc" in sys.modules:
        return False
    if not version("grpcio").startswith(TUNED_RELEASES):
        return False
    for key, value in GRPC_ENVIRONMENT.items():
        target.setdefault(key, value)
    return True
