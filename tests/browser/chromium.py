"""A headless Chromium, driven over the DevTools protocol through two pipes: JSON messages that end in NUL.

Nothing is listened on, every wait is bounded, and neither process nor profile outlives the context.
"""

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser")
WAIT_S = 60.0
_LOOK_EVERY_S = 0.5
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-breakpad",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
# The pipe's ends are the descriptors 3 and 4, which only a shell puts there.
_START = 'browser=$1 from=$2 to=$3; shift 3; exec "$browser" "$@" 3<&"$from" 4>&"$to"'
_LOWEST_DESCRIPTOR = 10

# A picture is exchanged some time after the medium has changed; until then the former one is shown.
_PICTURES_THERE = """(async () => {
  const wanted = one => {
    const other = one.parentElement.querySelector(':scope > source');
    return other && matchMedia(other.media).matches ? other.srcset : one.src;
  };
  for (let frames = 0; frames < 600; frames++) {
    await new Promise(done => requestAnimationFrame(done));
    if ([...document.images].every(one => one.complete && one.currentSrc === wanted(one))) {
      await Promise.all([...document.images].map(one => one.decode().catch(() => 0)));
      return true;
    }
  }
  return false;
})()"""


def find_chromium() -> str | None:
    """The program, None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass(slots=True)
class Problems:
    """What a page did that a report must not do, in words."""

    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def all(self) -> list[str]:
        """All of it."""
        return [*self.console, *self.requests]


class Pipe:
    """Messages to and from the browser; TimeoutError after WAIT_S, EOFError when it has ended."""

    def __init__(self, to_browser: int, from_browser: int, process: "subprocess.Popen[bytes]") -> None:
        self._out, self._in, self._process = to_browser, from_browser, process
        self._buffer = b""
        self._number = 0

    def ask(
        self,
        method: str,
        params: Mapping[str, Any],
        session: str | None,
        hear: Callable[[Mapping[str, Any]], None],
    ) -> dict[str, Any]:
        """A command's answer; `hear` is told of all that comes before it. RuntimeError if it is refused."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": dict(params)}
        if session is not None:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        until_s = time.monotonic() + WAIT_S
        while (answer := self.read(until_s)).get("id") != self._number:
            hear(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    def read(self, until_s: float) -> dict[str, Any]:
        """The next message."""
        while b"\0" not in self._buffer:
            left_s = until_s - time.monotonic()
            ready, _, _ = select.select([self._in], [], [], min(max(0.0, left_s), _LOOK_EVERY_S))
            # The pipe stays open while we hold its other end, so its end is no sign.
            if not ready and self._process.poll() is not None:
                raise EOFError(f"the browser has ended with {self._process.returncode}")
            if not ready and left_s > 0:
                continue
            if not ready:
                raise TimeoutError(f"no answer from the browser in {WAIT_S:g} s")
            data = os.read(self._in, 1 << 20)
            if not data:
                raise EOFError("the browser has ended")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        decoded: dict[str, Any] = json.loads(message)
        return decoded


class Tab:
    """One page; what it does wrong is in `problems` from the start."""

    def __init__(self, pipe: Pipe, session: str) -> None:
        self._pipe, self._session = pipe, session
        self._loads = 0
        self._url = ""
        self.problems = Problems()
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command and its answer; RuntimeError if the browser refuses it."""
        return self._pipe.ask(method, params, self._session, self._hear)

    def open(self, path: Path) -> None:
        """Load a file, and wait for all its pictures."""
        before = self._loads
        self._url = path.resolve().as_uri()
        self.call("Page.navigate", url=self._url)
        until_s = time.monotonic() + WAIT_S
        while self._loads == before:
            self._hear(self._pipe.read(until_s))
        self.pictures_decoded()

    def pictures_decoded(self) -> None:
        """Wait until the pictures for this medium are there, or have failed."""
        if not self.run(_PICTURES_THERE):
            raise TimeoutError("the pictures for this medium did not come")

    def run(self, script: str) -> Any:
        """What a script gives, as JSON has it; RuntimeError if it fails."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{answer['exceptionDetails']}")
        return answer["result"].get("value")

    def size(self, width: int, height: int, *, is_phone: bool = False) -> None:
        """The window's, in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=is_phone,
        )

    def media(self, kind: str, scheme: str) -> None:
        """`screen` or `print`, `light` or `dark`."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=kind, features=features)
        self.pictures_decoded()

    def _hear(self, message: Mapping[str, Any]) -> None:
        if message.get("sessionId") != self._session:
            return
        method, params = message.get("method"), message.get("params", {})
        if method == "Page.loadEventFired":
            self._loads += 1
        elif method == "Runtime.exceptionThrown":
            self.problems.console.append(f"exception: {params['exceptionDetails']['text']}")
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            said = " ".join(str(one.get("value", one["type"])) for one in params["args"])
            self.problems.console.append(f"console {params['type']}: {said}")
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.console.append(f"log {params['entry']['level']}: {params['entry']['text']}")
        elif method == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if url != self._url and not url.startswith("data:"):
                self.problems.requests.append(f"request: {url}")


class Browser:
    """A running browser."""

    def __init__(self, pipe: Pipe, profile: Path) -> None:
        self._pipe = pipe
        self.profile = profile

    @contextmanager
    def tab(self) -> Iterator[Tab]:
        """A new page, closed in the end."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        try:
            yield Tab(self._pipe, session)
        finally:
            self._call("Target.closeTarget", targetId=target)

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._pipe.ask(method, params, None, lambda _: None)


@contextmanager
def running(program: str) -> Iterator[Browser]:
    """The browser with an empty profile; both are gone afterwards."""
    profile = Path(tempfile.mkdtemp(prefix="loraserve-browser-"))
    try:
        with contextlib.ExitStack() as stack:
            commands_out, commands_in = _pipe(stack)
            answers_out, answers_in = _pipe(stack)
            process = _start(program, profile, commands_out, answers_in)
            try:
                yield Browser(Pipe(commands_in, answers_out, process), profile)
            finally:
                _end(process)
    finally:
        shutil.rmtree(profile, ignore_errors=True)


def _start(program: str, profile: Path, from_us: int, to_us: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [
            "bash",
            "-c",
            _START,
            "bash",
            program,
            str(from_us),
            str(to_us),
            *_FLAGS,
            f"--user-data-dir={profile}",
        ],
        pass_fds=(from_us, to_us),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Its settings and caches are in the profile too.
        env={
            **os.environ,
            "HOME": str(profile),
            "XDG_CONFIG_HOME": str(profile),
            "XDG_CACHE_HOME": str(profile),
        },
        start_new_session=True,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """The browser and its helpers, which are in the session that was made for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(WAIT_S)


def _pipe(stack: contextlib.ExitStack) -> tuple[int, int]:
    """Its end to read and its end to write, neither of them 3 or 4, so that putting one there overwrites no
    other."""
    ends = []
    for low in os.pipe():
        ends.append(fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, _LOWEST_DESCRIPTOR))
        os.close(low)
        stack.callback(os.close, ends[-1])
    return ends[0], ends[1]
