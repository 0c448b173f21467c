"""Starting and ending a cluster of this machine from the command line's process. Imports no Ray."""

import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from loraserve.cluster.processes import RUN_ID_VARIABLE, end_processes, tail
from loraserve.cluster.state import (
    RunningCluster,
    cluster_dir,
    is_alive,
    read_running,
    start_ticks,
    write_running,
)
from loraserve.config import Config, config_tree
from loraserve.errors import AlreadyExistsError, BadInputError, ClusterStartError

STOP_TIMEOUT_S = 30.0
# A Unix socket's path may have 107 characters and Ray adds about 70 to its folder's.
MAX_TEMP_DIR_CHARS = 20


def up(
    config: Config,
    *,
    fresh: bool = False,
    insecure_listen: bool = False,
    on_step: Callable[[str], None] = lambda text: None,
) -> RunningCluster:
    """Start the cluster and return when its routers serve; on any failure nothing is left running.

    BadInputError for what is wrong with the configuration, AlreadyExistsError if a cluster of this name
    runs, ClusterStartError with the tail of the log that says why.
    """
    folder = cluster_dir(config.cluster.name, config.cluster.state_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _refuse_running(config.cluster.name, folder)
        model = msgspec.structs.replace(config.model, path=_resolved(config.model.path, on_step))
        config = msgspec.structs.replace(config, model=model)
        check_before_start(config, folder, fresh=fresh, insecure_listen=insecure_listen)
        if fresh:
            forget(folder)
        run_id = secrets.token_hex(8)
        head = _spawn_head(config, folder, run_id, insecure_listen)
        try:
            _follow(head, config.cluster.start_timeout_s + 120.0, folder, on_step)
        except BaseException:
            _end(head.pid, run_id)
            running = read_running(folder)
            if running is not None:
                _clean(folder, running)
            raise
    running = read_running(folder)
    if running is None:
        raise ClusterStartError(f"the cluster ended right after its start; see {folder / 'logs'}")
    return running


def down(name: str, state_dir: str = "", *, on_step: Callable[[str], None] = lambda text: None) -> bool:
    """End the cluster and everything it started; False if there was nothing to end."""
    folder = cluster_dir(name, state_dir)
    running = read_running(folder)
    if running is None:
        return False
    alive = is_alive(running)
    on_step(f"stopping cluster {name}" if alive else f"cleaning up after cluster {name}, which died")
    if alive:
        os.kill(running.head_pid, signal.SIGTERM)
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        while is_alive(running) and time.monotonic() < deadline_s:
            time.sleep(0.05)
    _end(running.head_pid if is_alive(running) else None, running.run_id)
    _clean(folder, running)
    return True


def check_before_start(config: Config, folder: Path, *, fresh: bool, insecure_listen: bool) -> None:
    """Refuse, in one line, what would otherwise fail minutes later in another process."""
    from loraserve.controller.library import open_library
    from loraserve.controller.store import Store
    from loraserve.rpc.server import check_loopback
    from placement.policies import policy

    try:
        policy(config.placement.policy)
    except KeyError as error:
        raise BadInputError(f"placement.policy: {error.args[0]}") from None
    if config.engine.kind == "vllm" and not config.model.path:
        raise BadInputError("model.path: the vllm engine needs a base model; give --model PATH")
    check_loopback(config.router.host, insecure_listen=insecure_listen)
    for index in range(config.router.routers if config.router.port else 0):
        _refuse_busy(config.router.host, config.router.port + index)
    open_library(folder / "adapters", config)
    if not fresh:
        store = Store(folder / "controller.sqlite")
        try:
            store.check_base_model(config.model.path)
        finally:
            store.close()


def forget(folder: Path) -> None:
    """Delete what the cluster of this folder remembers."""
    for name in ("controller.sqlite", "controller.sqlite-wal", "controller.sqlite-shm"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "adapters", ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One starter at a time per cluster."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyExistsError(f"another `loraserve up` is starting the cluster in {folder}") from None
        yield


def _resolved(path: str, on_step: Callable[[str], None]) -> str:
    from loraserve.controller.library import resolve_model

    if path and not Path(path).is_dir():
        on_step(f"fetching base model {path}")
    return resolve_model(path)


def _refuse_running(name: str, folder: Path) -> None:
    running = read_running(folder)
    if running is None:
        return
    if is_alive(running):
        raise AlreadyExistsError(
            f"cluster {name} is running (head process {running.head_pid});"
            f" end it with `loraserve down --cluster {name}`, or choose another --cluster name"
        )
    down(name, str(folder.parent))


def _refuse_busy(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise BadInputError(
                f"router.port: {host}:{port} is not free ({error.strerror}); choose another --port,"
                " or 0 to have one picked"
            ) from None


def _spawn_head(config: Config, folder: Path, run_id: str, insecure: bool) -> "subprocess.Popen[str]":
    shutil.rmtree(folder / "logs", ignore_errors=True)
    (folder / "logs").mkdir()
    spec = {"config": config_tree(config), "insecure_listen": insecure}
    (folder / "head.json").write_text(json.dumps(spec), encoding="utf-8")
    token = folder / "ray.token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32), encoding="utf-8")
    temp_root = tempfile.gettempdir()
    temp_dir = tempfile.mkdtemp(
        prefix="lsr-", dir=temp_root if len(temp_root) <= MAX_TEMP_DIR_CHARS else "/tmp"
    )
    # The head waits for the end of its input: by then cluster.json names it and `down` knows what to end.
    with (folder / "logs" / "head.log").open("ab") as log:
        head = subprocess.Popen(
            [sys.executable, "-m", "loraserve.cluster.head", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=_environment(run_id, temp_dir, token),
            start_new_session=True,
            cwd=folder,
        )
    running = RunningCluster(
        name=config.cluster.name,
        run_id=run_id,
        head_pid=head.pid,
        head_start_ticks=start_ticks(head.pid) or 0,
        temp_dir=temp_dir,
    )
    write_running(folder, running)
    if head.stdin is not None:
        head.stdin.close()
    return head


def _environment(run_id: str, temp_dir: str, token: Path) -> dict[str, str]:
    """What every process of the run inherits."""
    return {
        **os.environ,
        # Sockets and scratch files of every library in every process go with the cluster.
        "TMPDIR": temp_dir,
        RUN_ID_VARIABLE: run_id,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's default of 15 would let anything else on the machine go before the service.
        "RAY_worker_niceness": "0",
        # Replicas see the GPUs that Ray gives them; without any, hiding them all would be a surprise.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def _follow(
    head: "subprocess.Popen[str]", timeout_s: float, folder: Path, on_step: Callable[[str], None]
) -> None:
    """Pass the head's progress on until it is ready."""
    # Ends the head, and with it the loop below, if it neither gets ready nor fails.
    timer = threading.Timer(timeout_s, head.terminate)
    timer.daemon = True
    timer.start()
    try:
        for line in head.stdout or ():
            message: dict[str, Any] = json.loads(line)
            if message["event"] == "ready":
                return
            if message["event"] == "failed":
                raise ClusterStartError(message["message"], message["log_tail"])
            on_step(message["text"])
    finally:
        timer.cancel()
        if head.stdout is not None:
            head.stdout.close()
    head.wait(STOP_TIMEOUT_S)
    raise ClusterStartError("the head process ended early", tail(folder / "logs" / "head.log"))


def _clean(folder: Path, running: RunningCluster) -> None:
    """Delete what only a running cluster needs."""
    if running.temp_dir:
        shutil.rmtree(running.temp_dir, ignore_errors=True)
    for name in ("cluster.json", "head.json", "ray.token"):
        (folder / name).unlink(missing_ok=True)


def _end(head_pid: int | None, run_id: str) -> None:
    """End what is left of a run, the head first because it knows the order."""
    if head_pid is not None and start_ticks(head_pid) is not None:
        os.kill(head_pid, signal.SIGTERM)
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        while start_ticks(head_pid) is not None and time.monotonic() < deadline_s:
            time.sleep(0.05)
    end_processes(run_id, grace_s=2.0)
