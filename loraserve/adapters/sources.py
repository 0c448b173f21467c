"""Where an adapter comes from: three kinds of source, told apart by their text, and how each is fetched.

- a path: starts with `/`, `./`, `../` or `~`, is `.` or `..`, or (to `resolve_source`) names a folder of the
  working directory; `file:///path` too;
- a URL: `scheme://...`; allowed only under a prefix on the operator's list;
- a Hugging Face id: `org/name` or `org/name@revision`.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import unquote, urlsplit

from loraserve.adapters.files import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    SLICE_BYTES,
    WEIGHTS_FILE,
    open_member,
    write_file,
)
from loraserve.adapters.safetensors_file import MAX_HEADER_BYTES
from loraserve.errors import AdapterRejectedError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@([\w.-]{1,128}))?", re.ASCII)
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSource:
    """A folder of this machine, by its absolute path."""

    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSource:
    """A repository of the Hugging Face hub."""

    repository: str
    revision: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UrlSource:
    """A folder behind any fsspec URL."""

    url: str


Source = LocalSource | HubSource | UrlSource


class HubClient(Protocol):
    """Fetches files of a Hugging Face repository."""

    def download(self, repository: str, revision: str | None, into: Path, *, max_bytes: int) -> None:
        """Put adapter_config.json and adapter_model.safetensors into the folder, if the repository has them.

        AdapterRejectedError where the repository cannot be read or the files are larger than `max_bytes`.
        """
        ...


def resolve_source(text: str, working_directory: Path) -> str:
    """A source as a person typed it → the text that `parse_source` takes anywhere; paths become absolute."""
    if _URL.fullmatch(text) or not text or _UNPRINTABLE.search(text):
        return text
    if text.startswith("~"):
        return str(_expand(text))
    if _looks_like_path(text) or (working_directory / text).is_dir():
        return str((working_directory / text).resolve())
    return text


def parse_source(text: str, *, allow_urls: Sequence[str] = ()) -> Source:
    """Tell what a source is; AdapterRejectedError for one that is unsafe, not allowed or not understood."""
    shown = ascii(text)[:160]
    if not text or _UNPRINTABLE.search(text):
        raise AdapterRejectedError(f"adapter source {shown}: expected a path, a URL or a Hugging Face id")
    url = _URL.fullmatch(text)
    if url and url[1].lower() == "file":
        return LocalSource(path=_absolute(_file_path(text, shown), shown))
    if url:
        return _parse_url(text, shown, allow_urls)
    if _looks_like_path(text) or text.startswith("~"):
        return LocalSource(path=_absolute(str(_expand(text)) if text.startswith("~") else text, shown))
    match = _HUB_ID.fullmatch(text)
    if match is None or ".." in text:
        raise AdapterRejectedError(
            f"adapter source {shown}: expected an absolute path, a URL, or a Hugging Face id (org/name)"
        )
    return HubSource(repository=match[1], revision=match[2])


def copy_local(
    directory: Path, into: Path, *, max_bytes: int, stop: Callable[[], bool], where: str | None = None
) -> None:
    """Copy an adapter's two files out of a folder; `where` is what messages call it."""
    where = where or str(directory)
    for name, limit in ((CONFIG_FILE, MAX_CONFIG_BYTES), (WEIGHTS_FILE, max_bytes + MAX_HEADER_BYTES)):
        with open_member(directory, name, max_bytes=limit, where=where) as (file, _):
            write_file(into / name, capped(file, limit, f"{where}: {name}", stop))


def fetch_url(source: UrlSource, into: Path, *, max_bytes: int, stop: Callable[[], bool]) -> None:
    """Fetch an adapter's two files from a URL with fsspec; nothing else is asked for."""
    import fsspec

    for name, limit in ((CONFIG_FILE, MAX_CONFIG_BYTES), (WEIGHTS_FILE, max_bytes + MAX_HEADER_BYTES)):
        where = f"{source.url}/{name}"
        try:
            with fsspec.open(where, "rb") as file:
                write_file(into / name, capped(file, limit, where, stop))
        except AdapterRejectedError:
            raise
        except FileNotFoundError as error:
            raise AdapterRejectedError(f"{where}: not found") from error
        except ImportError as error:
            raise AdapterRejectedError(
                f"{where}: a package for this kind of URL is missing: {error}"
            ) from error
        except Exception as error:
            # Storage backends are plugins: they raise whatever they like.
            raise AdapterRejectedError(f"{where}: cannot fetch it: {_one_line(error)}") from error


class HuggingFaceHub:
    """The real hub, through huggingface_hub and its settings (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE)."""

    def download(self, repository: str, revision: str | None, into: Path, *, max_bytes: int) -> None:
        """See `HubClient`."""
        import huggingface_hub

        try:
            info = huggingface_hub.HfApi().model_info(
                repository, revision=revision, files_metadata=True, timeout=30.0
            )
            sizes = {item.rfilename: item.size or 0 for item in info.siblings or ()}
            if sizes.get(WEIGHTS_FILE, 0) > max_bytes + MAX_HEADER_BYTES:
                raise AdapterRejectedError(
                    f"{repository}: {WEIGHTS_FILE} has {sizes[WEIGHTS_FILE]} bytes; "
                    f"at most {max_bytes} are allowed"
                )
            huggingface_hub.snapshot_download(
                repository, revision=info.sha, local_dir=into, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]
            )
        except AdapterRejectedError:
            raise
        except Exception as error:
            # The hub's client raises its own errors, its HTTP library's and OSError.
            raise AdapterRejectedError(
                f"{repository}: cannot fetch it from the Hugging Face hub: {_one_line(error)}"
            ) from error


def capped(file: BinaryIO, max_bytes: int, where: str, stop: Callable[[], bool]) -> Iterator[bytes]:
    """The file in slices; AdapterRejectedError once it grows too large or the caller gave up."""
    total = 0
    while piece := file.read(SLICE_BYTES):
        total += len(piece)
        if total > max_bytes:
            raise AdapterRejectedError(f"{where}: more than the {max_bytes} bytes that are allowed")
        if stop():
            raise AdapterRejectedError(f"{where}: fetching was stopped")
        yield piece


def _looks_like_path(text: str) -> bool:
    return text in {".", ".."} or text.startswith(("/", "./", "../"))


def _expand(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise AdapterRejectedError(f"adapter source {ascii(text)[:160]}: no such home folder") from error


def _absolute(text: str, shown: str) -> Path:
    path = Path(text)
    if not path.is_absolute() or ".." in path.parts or "\x00" in text:
        raise AdapterRejectedError(f"adapter source {shown}: expected an absolute path without '..'")
    return path


def _file_path(text: str, shown: str) -> str:
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise AdapterRejectedError(f"adapter source {shown}: not a valid URL") from error
    if parts.netloc not in {"", "localhost"} or parts.query or parts.fragment:
        raise AdapterRejectedError(f"adapter source {shown}: expected file:///absolute/path")
    return unquote(parts.path)


def _parse_url(text: str, shown: str, allow_urls: Sequence[str]) -> UrlSource:
    url = text.rstrip("/")
    decoded = unquote(unquote(url))
    # '::' chains filesystems in fsspec, so that the prefix would say nothing of what is opened.
    if "::" in decoded or any(character in decoded for character in "?#\\"):
        raise AdapterRejectedError(
            f"adapter source {shown}: a URL without '::', '?', '#' and '\\' is expected"
        )
    if {"..", "."} & set(decoded.split("/")):
        raise AdapterRejectedError(f"adapter source {shown}: a URL without '.' and '..' segments is expected")
    if not any(f"{url}/".startswith(prefix.rstrip("/") + "/") for prefix in allow_urls if prefix):
        allowed = ", ".join(allow_urls) or "none"
        raise AdapterRejectedError(
            f"adapter source {shown}: not under a prefix of adapters.allow_urls (allowed: {allowed})"
        )
    return UrlSource(url=url)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
