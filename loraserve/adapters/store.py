"""The adapter store: validated adapters on this machine's disk, addressed by their content.

Layout: `<store>/<first 16 hex of sha256>/` holds adapter_config.json, adapter_model.safetensors,
manifest.json and segment.head (what `segment_head` gives, so that nobody reads weights for it), all
read-only. An entry is complete or absent: it is made in `.tmp-<pid>-...` beside it, then brought to the disk
and renamed. segment.head alone may be missing, for it follows from the others: it is made when it is asked
for. Plain adapters are stored byte for byte, those that need it folded (see `folding`).
"""

import asyncio
import errno
import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from loraserve.adapters.base import BaseModel
from loraserve.adapters.files import CONFIG_FILE, WEIGHTS_FILE, sync_directory, write_file
from loraserve.adapters.folding import fold_adapter
from loraserve.adapters.manifest import DEFAULT_MAX_BYTES, AdapterManifest, inspect_adapter
from loraserve.adapters.names import parse_name
from loraserve.adapters.segment_folder import SEGMENT_FILE, head_of_folder, kept_form, kept_head
from loraserve.adapters.segment_head import SegmentHead
from loraserve.adapters.sources import (
    HubClient,
    HubSource,
    HuggingFaceHub,
    LocalSource,
    copy_local,
    fetch_url,
    parse_source,
)
from loraserve.errors import AdapterRejectedError, NotFoundError, WorkFailedError
from placement.types import AdapterName

logger = logging.getLogger(__name__)

_MANIFEST_FILE = "manifest.json"
_TEMPORARY = ".tmp-"
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLimits:
    """What the store takes: the largest rank any replica allows, the largest size, the URL prefixes."""

    max_lora_rank: int
    max_bytes: int = DEFAULT_MAX_BYTES
    allow_urls: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAdapter:
    """A validated adapter in the store; `directory` is in the PEFT layout and read-only."""

    name: AdapterName
    source: str
    manifest: AdapterManifest
    directory: Path


def _never() -> bool:
    return False


class AdapterStore:
    """Adapters on local disk by content; safe to use from several threads and processes at once."""

    def __init__(
        self, directory: Path, *, base: BaseModel | None, limits: StoreLimits, hub: HubClient | None = None
    ) -> None:
        self._directory = directory
        self.base = base
        self._limits = limits
        self._hub = hub or HuggingFaceHub()
        directory.mkdir(parents=True, exist_ok=True)
        _sweep(directory)

    def add(self, name: str, source: str, *, stop: Callable[[], bool] = _never) -> StoredAdapter:
        """Fetch, check and store an adapter; content that is there already is reused.

        Blocks on disk and network; `stop` is asked between slices. AdapterRejectedError says why the adapter
        cannot be served, WorkFailedError that the store's disk failed; both leave nothing behind.
        """
        adapter_name = parse_name(name)
        with self._temporary() as temporary:
            fetched = temporary / "fetched"
            fetched.mkdir()
            self._fetch(source, fetched, temporary, stop)
            staged, manifest = self._stage(fetched, temporary / "folded", source)
            write_file(staged / _MANIFEST_FILE, iter((_dump(manifest, source),)))
            head = self._head_of(staged, manifest.sha256, source)
            write_file(staged / SEGMENT_FILE, iter((kept_form(head),)))
            sync_directory(staged)
            directory = self._install(staged, manifest, temporary)
        return StoredAdapter(name=adapter_name, source=source, manifest=manifest, directory=directory)

    async def add_async(self, name: str, source: str, *, timeout_s: float) -> StoredAdapter:
        """`add` in a thread; AdapterRejectedError after `timeout_s`.

        A fetch that timed out or was cancelled stops at its next slice and cleans up behind itself.
        """
        stop = threading.Event()
        work = asyncio.create_task(asyncio.to_thread(self.add, name, source, stop=stop.is_set))
        work.add_done_callback(_retrieve)
        try:
            done, _ = await asyncio.wait({work}, timeout=timeout_s)
        finally:
            stop.set()
        if not done:
            raise AdapterRejectedError(f"{source}: not fetched and checked within {timeout_s:g} s")
        return work.result()

    def directory_of(self, sha256: str) -> Path:
        """Where the content is; NotFoundError if the store does not hold it."""
        directory = self._entry(sha256)
        if _stored_sha256(directory) != sha256:
            raise NotFoundError(f"adapter content {sha256[:16]}: not in the store {self._directory}")
        return directory

    def verify(self, sha256: str) -> AdapterManifest:
        """Read the content again, to the last byte; AdapterRejectedError if it is not what was stored."""
        directory = self.directory_of(sha256)
        manifest = self._inspect(directory, str(directory))
        if manifest.sha256 != sha256:
            raise AdapterRejectedError(
                f"{directory}: corrupt: its files have sha256 {manifest.sha256[:16]}, not {sha256[:16]}"
            )
        return manifest

    def segment_head(self, sha256: str, name: str) -> bytes:
        """The encoded head that `build_segment` makes of this content under this name.

        Reads no weights, but once where the entry has no sound head yet. NotFoundError if the store does not
        hold the content, AdapterRejectedError if it is corrupt.
        """
        directory = self.directory_of(sha256)
        head = kept_head(directory, name=name)
        if head is None or head.digest != sha256:
            head = replace(self._make_head(sha256, directory), name=name)
        return head.encode()

    def remove(self, sha256: str) -> None:
        """Delete the content; what is not there is no error."""
        with self._temporary() as temporary:
            _move_away(self._entry(sha256), temporary)

    def contents(self) -> tuple[str, ...]:
        """The sha256 of everything in the store, sorted."""
        stored = (_stored_sha256(path) for path in self._directory.iterdir() if not _is_temporary(path))
        return tuple(sorted(sha256 for sha256 in stored if sha256 is not None))

    def _fetch(self, text: str, into: Path, temporary: Path, stop: Callable[[], bool]) -> None:
        source = parse_source(text, allow_urls=self._limits.allow_urls)
        max_bytes = self._limits.max_bytes
        if isinstance(source, LocalSource):
            copy_local(source.path, into, max_bytes=max_bytes, stop=stop)
        elif isinstance(source, HubSource):
            downloaded = temporary / "hub"
            downloaded.mkdir()
            self._hub.download(source.repository, source.revision, downloaded, max_bytes=max_bytes)
            copy_local(downloaded, into, max_bytes=max_bytes, stop=stop, where=text)
        else:
            fetch_url(source, into, max_bytes=max_bytes, stop=stop)

    def _stage(self, fetched: Path, folded: Path, where: str) -> tuple[Path, AdapterManifest]:
        """The folder to store, with its manifest."""
        manifest = self._inspect(fetched, where)
        if not manifest.needs_folding:
            return fetched, manifest
        folded.mkdir()
        fold_adapter(fetched, folded, manifest)
        return folded, self._inspect(folded, f"{where} (folded)")

    def _make_head(self, sha256: str, directory: Path) -> SegmentHead:
        """The head of an entry that has none, which then has it, if the disk takes it."""
        self.verify(sha256)
        head = self._head_of(directory, sha256, str(directory))
        try:
            with self._temporary() as temporary:
                write_file(temporary / SEGMENT_FILE, iter((kept_form(head),)))
                os.rename(temporary / SEGMENT_FILE, directory / SEGMENT_FILE)
        except WorkFailedError as error:
            logger.warning("the head of a segment will have to be worked out again: %s", error)
        return head

    def _head_of(self, directory: Path, sha256: str, where: str) -> SegmentHead:
        rank = self._limits.max_lora_rank
        return head_of_folder(directory, digest=sha256, where=where, max_lora_rank=rank)

    def _inspect(self, directory: Path, where: str) -> AdapterManifest:
        return inspect_adapter(
            directory,
            base=self.base,
            max_lora_rank=self._limits.max_lora_rank,
            max_bytes=self._limits.max_bytes,
            where=where,
        )

    def _install(self, staged: Path, manifest: AdapterManifest, temporary: Path) -> Path:
        """Put the entry in place, unless a sound one with the same content is there."""
        entry = self._entry(manifest.sha256)
        if self._is_sound(manifest.sha256):
            return entry
        _move_away(entry, temporary)
        try:
            os.rename(staged, entry)
        except OSError:
            # Another thread or process may have stored the same content in between.
            if not self._is_sound(manifest.sha256):
                raise
        sync_directory(self._directory)
        return entry

    def _is_sound(self, sha256: str) -> bool:
        try:
            self.verify(sha256)
        except (AdapterRejectedError, NotFoundError):
            return False
        return True

    def _entry(self, sha256: str) -> Path:
        if len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
            raise NotFoundError(f"adapter content {ascii(sha256)[:80]}: expected 64 hexadecimal digits")
        return self._directory / sha256[:16]

    @contextmanager
    def _temporary(self) -> Iterator[Path]:
        try:
            path = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{os.getpid()}-", dir=self._directory))
            try:
                yield path
            finally:
                shutil.rmtree(path)
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise WorkFailedError(
                    f"{self._directory}: no room for the adapter ({error.strerror}); free some and try again"
                ) from error
            raise WorkFailedError(f"{self._directory}: the adapter store failed: {error}") from error


def _move_away(entry: Path, temporary: Path) -> None:
    try:
        os.rename(entry, temporary / "removed")
    except FileNotFoundError:
        return


def _dump(manifest: AdapterManifest, source: str) -> bytes:
    return (json.dumps({"source": source, **asdict(manifest)}, indent=2) + "\n").encode()


def _stored_sha256(entry: Path) -> str | None:
    """What the entry says it holds; None if it is no entry."""
    try:
        value = json.loads((entry / _MANIFEST_FILE).read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    complete = all((entry / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE))
    return value if complete and isinstance(value, str) else None


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(_TEMPORARY)


def _sweep(directory: Path) -> None:
    """Delete what processes that are gone left half-done."""
    for path in directory.iterdir():
        owner = path.name.removeprefix(_TEMPORARY).partition("-")[0]
        if _is_temporary(path) and owner.isdecimal() and not _is_alive(int(owner)):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _retrieve(work: "asyncio.Task[StoredAdapter]") -> None:
    """Look at the outcome of a fetch that nobody may wait for, so that asyncio does not complain of it."""
    if not work.cancelled():
        work.exception()
