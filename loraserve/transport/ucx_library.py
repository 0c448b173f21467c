"""Loads ucxx and makes its contexts; the only module of the transport that imports it.

ucxx and UCX read and write the process's environment; what they leave there would reach every child, so the
variables of UCX are put back as they were.
"""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from loraserve.errors import UnavailableError
from loraserve.transport.base import Buffer

INSTALL_HINT = (
    "scripts/setup installs it where there is a wheel of it, and so does pip install 'loraserve[ucx]'"
)

_QUIET = {
    # A peer that dies is told of by the error of the fetch, in one line.
    "UCX_LOG_LEVEL": "fatal",
    "UCXX_LOG_LEVEL": "FATAL",
    "UCX_WARN_UNUSED_ENV_VARS": "n",
    # The process's own handlers of signals (faulthandler) stay; no thread that serves a file system.
    "UCX_ERROR_SIGNALS": "",
    "UCX_HANDLE_ERRORS": "none",
    "UCX_VFS_ENABLE": "n",
    "UCX_MEMTYPE_CACHE": "n",
}

_OWN = {
    "RNDV_THRESH": "8192",
    "MAX_RNDV_RAILS": "1",
    # So many pieces of half a MiB are copied before the thread looks at anything else.
    "CMA_TX_QUOTA": "8",
}

_ENVIRONMENT = threading.Lock()

SHARED_MEMORY = frozenset({"all", "sm", "shm", "mm", "posix", "sysv", "cma", "xpmem", "knem"})


class UcxLibrary:
    """ucxx's core, and the options that this process's contexts are made with.

    `tls` is UCX_TLS, a comma-separated list of UCX's transports; None leaves the choice to UCX.
    """

    def __init__(self, tls: str | None = None, options: Mapping[str, str] | None = None) -> None:
        self.core, self._array = _load()
        self.tls = tls
        self._options = {**_OWN, **(options or {})}
        if tls is not None:
            self._options["TLS"] = tls

        self._num_kept = 0
        self._lock = threading.Lock()

    @property
    def num_kept(self) -> int:
        """How many workers UCX did not let go."""
        return self._num_kept

    def count_kept(self) -> None:
        """UCX did not let a worker go."""
        with self._lock:
            self._num_kept += 1

    def context(self) -> Any:
        """A context for tagged messages whose worker can be waited for."""
        features = (self.core.Feature.TAG, self.core.Feature.WAKEUP)
        return self.core.UCXContext(dict(self._options), features)

    def check(self) -> None:
        """UnavailableError unless contexts can be made with these options."""
        try:
            self.core.UCXWorker(self.context())
        except self.core.UCXError as error:
            raise UnavailableError(f"UCX does not start: {error}") from error

    def array(self, buffer: Buffer) -> Any:
        """What ucxx takes for a buffer: it keeps the buffer alive, a request does not."""
        return self._array(buffer)


def may_share_memory(tls: str | None) -> bool:
    """Whether UCX_TLS leaves UCX a transport over shared memory."""
    if tls is None:
        return True
    named = bool(SHARED_MEMORY.intersection(tls.removeprefix("^").split(",")))
    return named != tls.startswith("^")


def _load() -> tuple[ModuleType, Any]:
    try:
        with _own_environment():
            import ucxx._lib.libucxx as core
            from ucxx._lib.arr import Array

            # ucxx reads its log level when a context is made, and keeps it.
            core.UCXContext({"TLS": "self"}, (core.Feature.TAG,))
    except (ImportError, OSError) as error:
        raise UnavailableError(f"ucxx cannot be imported ({error}); {INSTALL_HINT}") from error
    return core, Array


@contextmanager
def _own_environment() -> Iterator[None]:
    with _ENVIRONMENT:
        before = {name: value for name, value in os.environ.items() if name.startswith("UCX")}
        os.environ.update({name: value for name, value in _QUIET.items() if name not in before})
        try:
            yield
        finally:
            for name in [each for each in os.environ if each.startswith("UCX")]:
                if name not in before:
                    del os.environ[name]
            os.environ.update(before)
