"""The adapter store as one cluster's configuration wants it."""

import logging
from pathlib import Path

from loraserve.adapters import AdapterStore, StoreLimits, read_base
from loraserve.config import Config
from loraserve.errors import BadInputError, WorkFailedError
from placement.engine_sizes import RANK_STEPS

logger = logging.getLogger(__name__)


def open_library(directory: Path, config: Config) -> AdapterStore:
    """The store in `directory`, checking adapters against the configured base model.

    BadInputError for a base model that cannot be read; without one (the emulated engine allows that)
    adapters are checked for themselves alone.
    """
    base = read_base(Path(config.model.path)) if config.model.path else None
    # Where replicas choose theirs, it is they who say no.
    is_chosen = "max_lora_rank" in config.engine.auto
    limits = StoreLimits(
        max_lora_rank=RANK_STEPS[-1] if is_chosen else config.engine.max_lora_rank,
        max_bytes=config.adapters.max_size_bytes,
        allow_urls=tuple(config.adapters.allow_urls),
    )
    return AdapterStore(directory, base=base, limits=limits)


def is_removed(library: AdapterStore, sha256: str) -> bool:
    """Delete content that nobody needs; False, and a line in the log, if that failed."""
    try:
        library.remove(sha256)
    except WorkFailedError as error:
        logger.warning("files that nobody needs any more are kept for now: %s", error)
        return False
    return True


def resolve_model(path: str) -> str:
    """A local folder as it is; a Hugging Face id as the folder of its snapshot, downloaded if need be."""
    if not path or Path(path).is_dir():
        return path
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise BadInputError(
            f"model.path: {path} is no folder and no Hugging Face id (organisation/name);"
            " give a folder with config.json, tokenizer and safetensors"
        )
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]))
    except Exception as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInputError(f"model.path: cannot download {path}: {first_line}") from error
