"""Adapters over HTTP: an fsspec URL, and the real Hugging Face client against a hub on loopback."""

import functools
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from loraserve.adapters import AdapterStore, BaseModel, StoreLimits
from loraserve.errors import AdapterRejectedError
from tests.support.adapter_maker import AdapterMaker

FILES = ("adapter_config.json", "adapter_model.safetensors")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
DOWNLOAD = """
import sys
from pathlib import Path
from loraserve.adapters.sources import HuggingFaceHub
from loraserve.errors import AdapterRejectedError
repository, revision, into, max_bytes = sys.argv[1:]
try:
    HuggingFaceHub().download(repository, revision or None, Path(into), max_bytes=int(max_bytes))
except AdapterRejectedError as error:
    print(error)
    sys.exit(3)
"""


class Hub(http.server.SimpleHTTPRequestHandler):
    """Static files, and of the hub's interface what fetching one repository, acme/sql, asks for."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path, _, _ = self.path.partition("?")
        folder = Path(self.directory)
        if path in {
            "/api/models/acme/sql",
            *(f"/api/models/acme/sql/revision/{r}" for r in ("main", COMMIT)),
        }:
            siblings = [{"rfilename": name, "size": (folder / name).stat().st_size} for name in FILES]
            self._send_json({"id": "acme/sql", "sha": COMMIT, "siblings": siblings}, with_body=with_body)
        elif path == f"/api/models/acme/sql/tree/{COMMIT}":
            self._send_json(
                [
                    {"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": COMMIT}
                    for name in (*FILES, "README.md")
                ],
                with_body=with_body,
            )
        elif path.startswith(f"/acme/sql/resolve/{COMMIT}/"):
            body = (folder / path.rpartition("/")[2]).read_bytes()
            digest = hashlib.sha256(body).hexdigest()
            self._send(body, {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT}, with_body=with_body)
        elif with_body:
            super().do_GET()
        else:
            super().do_HEAD()

    def _send_json(self, content: object, *, with_body: bool) -> None:
        self._send(json.dumps(content).encode(), {"Content-Type": "application/json"}, with_body=with_body)

    def _send(self, body: bytes, headers: dict[str, str], *, with_body: bool) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture
def source(make: AdapterMaker) -> Path:
    """An adapter with a file beside its two that must not be asked for."""
    folder = make()
    (folder / "README.md").write_text("more", encoding="utf-8")
    return folder


@pytest.fixture
def server(source: Path) -> Iterator[str]:
    """Its address; `/` is the adapter's folder."""
    handler = functools.partial(Hub, directory=str(source))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def _bytes(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


def test_an_allowed_http_url_is_fetched(tmp_path: Path, base: BaseModel, source: Path, server: str) -> None:
    limits = replace(StoreLimits(max_lora_rank=64), allow_urls=(server,))
    store = AdapterStore(tmp_path / "store", base=base, limits=limits)
    assert _bytes(store.add("a", server).directory) == _bytes(source)
    with pytest.raises(AdapterRejectedError, match=r"/other/adapter_config\.json: not found"):
        store.add("b", f"{server}/other")


def _download(
    server: str, into: Path, *, revision: str, max_bytes: int
) -> "subprocess.CompletedProcess[str]":
    into.mkdir()
    # The client reads its settings when it is imported.
    settings = {"HF_ENDPOINT": server, "HF_HUB_OFFLINE": "0", "HF_HOME": str(into.parent / "home")}
    proxies = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, "-c", DOWNLOAD, "acme/sql", revision, str(into), str(max_bytes)],
        env={**os.environ, **settings, **proxies},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("revision", ["", "main"])
def test_the_hubs_own_client_fetches_exactly_the_two_files(
    tmp_path: Path, source: Path, server: str, revision: str
) -> None:
    done = _download(server, tmp_path / "into", revision=revision, max_bytes=10**9)
    assert done.returncode == 0, done.stdout + done.stderr
    assert _bytes(tmp_path / "into") == _bytes(source)
    assert not (tmp_path / "into" / "README.md").exists()


def test_the_hubs_own_client_refuses_what_is_too_large_before_it_is_fetched(
    tmp_path: Path, source: Path, server: str
) -> None:
    weights = source / FILES[1]
    # Above what a header may add to the bytes allowed; sparse, so nothing is written.
    with weights.open("r+b") as file:
        file.truncate(200 * 1024**2)
    done = _download(server, tmp_path / "into", revision="", max_bytes=1000)
    assert done.returncode == 3, done.stderr
    assert "acme/sql: adapter_model.safetensors has 209715200 bytes; at most 1000 are allowed" in done.stdout
    assert list((tmp_path / "into").iterdir()) == []
