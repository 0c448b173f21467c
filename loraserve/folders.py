"""Where LoRAServe keeps what it may make again."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """LoRAServe's folder under the user's cache folder; LORASERVE_CACHE_DIR overrides it."""
    override = os.environ.get("LORASERVE_CACHE_DIR")
    if override:
        return Path(override)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "loraserve"
