"""The compiled kernel for a few rows per adapter: built once per machine, called without torch's overhead.

`build` runs in the replica and needs a C compiler; where there is none, LoRA is computed by torch alone.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

LIBRARY = "LORASERVE_FEW_ROWS"
"""The variable that names the built library; absent: there is none."""
_SOURCES = ("few_rows.c", "few_rows_of_type.h", "transpose_to_type.h")
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
_BUILD_TIMEOUT_S = 60.0
_CPUINFO = Path("/proc/cpuinfo")


class BuildError(Exception):
    """Why there is no compiled kernel, in one line."""


def build(cache_dir: Path) -> Path:
    """The library for this machine, built unless it was before; BuildError if that does not work.

    It is named by what went into it: the sources, the flags, the compiler and the processor.
    """
    compiler = shutil.which(os.environ.get("CC", "") or "cc") or shutil.which("gcc")
    if compiler is None:
        raise BuildError("there is no C compiler (cc)")
    sources = [Path(__file__).with_name(name) for name in _SOURCES]
    target = cache_dir / f"few_rows-{_fingerprint(compiler, sources)}.so"
    if target.is_file():
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir, prefix="build-") as scratch:
            made = Path(scratch) / target.name
            done = subprocess.run(
                [compiler, *_FLAGS, "-o", str(made), str(sources[0])],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_BUILD_TIMEOUT_S,
                check=False,
            )
            if done.returncode:
                reason = next(iter(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
                raise BuildError(f"{compiler} failed: {reason}")
            # Into place at once: another replica may be building the same.
            os.replace(made, target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{compiler} failed: {error}") from error
    return target


def _fingerprint(compiler: str, sources: Sequence[Path]) -> str:
    digest = hashlib.sha256(" ".join((compiler, *_FLAGS)).encode())
    for source in sources:
        digest.update(source.read_bytes())
    with contextlib.suppress(OSError):
        digest.update(str(os.stat(compiler).st_mtime_ns).encode())
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
        # What the processor can do: "flags" on x86, "Features" on ARM; the same for all of them.
        able = next((line for line in lines if line.startswith(("flags", "Features"))), "")
        digest.update(f"{os.uname().machine} {able}".encode())
    return digest.hexdigest()[:16]


def load(dtype: str) -> Any | None:
    """The kernel for `float32` or `bfloat16`, as a C function; None if there is none that can be loaded.

    Its arguments: x, its row stride, y, its row stride, width of x, spans, their number, order or None, the
    layer's slots, scratch, row pointers; strides in elements, all others addresses.
    """
    path = os.environ.get(LIBRARY, "")
    name = {"float32": "few_rows_float", "bfloat16": "few_rows_bf16"}.get(dtype)
    if not path or name is None:
        return None
    try:
        function = getattr(ctypes.CDLL(path), name)
    except (OSError, AttributeError) as error:
        logger.warning("LoRA for a few rows runs without its compiled kernel, slower: %s", error)
        return None
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [
        pointer,
        count,
        pointer,
        count,
        count,
        pointer,
        count,
        pointer,
        pointer,
        pointer,
        pointer,
    ]
    function.restype = None
    return function
