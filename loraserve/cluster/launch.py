"""Starting and ending a cluster from the command line's process, on this machine or in a Ray cluster.

Imports no Ray: the head process holds the connection, and `remote_sweep` asks a process of its own.
"""

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

from loraserve.cluster import ray_session
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
from loraserve.errors import AlreadyExistsError, BadInputError, ClusterStartError, WorkFailedError

STOP_TIMEOUT_S = 30.0
SWEEP_TIMEOUT_S = 90.0
# A Unix socket's path may have 107 characters and Ray adds about 70 to its folder's.
MAX_TEMP_DIR_CHARS = 20


def up(
    config: Config,
    *,
    fresh: bool = False,
    insecure_listen: bool = False,
    on_step: Callable[[str], None] = lambda text: None,
    hold: Callable[[RunningCluster], None] | None = None,
) -> RunningCluster:
    """Start the cluster and return when its routers serve; on any failure nothing is left running.

    With `hold`, which is called when they serve, stay until the cluster ends: it ends with this process, on
    SIGTERM and on Ctrl-C. BadInputError for what is wrong with the configuration, AlreadyExistsError if a
    cluster of this name runs, ClusterStartError with the tail of the log that says why.
    """
    folder = cluster_dir(config.cluster.name, config.cluster.state_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _refuse_running(config.cluster.name, folder)
        config = _resolve(config, on_step)
        check_before_start(config, folder, fresh=fresh, insecure_listen=insecure_listen)
        _keep_profile(config, folder, on_step)
        if fresh:
            forget(folder)
        run_id = secrets.token_hex(8)
        spec = {"config": config_tree(config), "insecure_listen": insecure_listen, "foreground": bool(hold)}
        head = _spawn_head(config, folder, run_id, spec)
        try:
            _follow(head, config.cluster.start_timeout_s + 120.0, folder, on_step)
        except BaseException:
            _end(head.pid, run_id)
            down(config.cluster.name, config.cluster.state_dir)
            raise
    running = read_running(folder)
    if running is None:
        raise ClusterStartError(f"the cluster ended right after its start; see {folder / 'logs'}")
    if hold is not None:
        hold(running)
        _hold(head, config.cluster.name, folder)
    return running


def down(
    name: str,
    state_dir: str = "",
    *,
    ray_address: str = "",
    on_step: Callable[[str], None] = lambda text: None,
) -> bool:
    """End the cluster and everything it started; False if there was nothing to end.

    `ray_address` is where to look for what is left of a cluster that this machine has forgotten. If what is
    left in a Ray cluster cannot be ended, the cluster is not forgotten: `down` can be tried again.
    """
    folder = cluster_dir(name, state_dir)
    running = read_running(folder)
    if running is None:
        return bool(ray_address) and remote_sweep(name, ray_address, on_step)
    alive = is_alive(running)
    on_step(f"stopping cluster {name}" if alive else f"cleaning up after cluster {name}, which died")
    if alive:
        os.kill(running.head_pid, signal.SIGTERM)
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        while is_alive(running) and time.monotonic() < deadline_s:
            time.sleep(0.05)
    try:
        # The head deletes the file when all is ended.
        if running.ray_goes_on and read_running(folder) is not None:
            remote_sweep(name, running.ray_address, on_step)
    finally:
        _end(running.head_pid if is_alive(running) else None, running.run_id)
    _clean(folder, running)
    return True


def remote_sweep(name: str, address: str, on_step: Callable[[str], None]) -> bool:
    """End the actors and placement groups of the cluster of this name in a Ray cluster; whether there were
    any. A Ray cluster that has gone has none left. WorkFailedError if they cannot be ended."""
    address = ray_session.find_address(address)
    if not ray_session.is_listening(address):
        on_step(f"the Ray cluster at {address} is gone, and all that ran in it")
        return False
    ray_session.check_reachable(address, os.environ)
    answer = _sweep_apart(name, address)
    if "error" in answer:
        raise WorkFailedError(f"cannot end cluster {name} in the Ray cluster at {address}: {answer['error']}")
    on_step(f"ended {answer['actors']} actors and {answer['groups']} placement groups in the Ray cluster")
    return bool(answer["actors"] or answer["groups"])


def _sweep_apart(name: str, address: str) -> dict[str, Any]:
    """What a sweep in a process of its own says, or `error`: why it says nothing."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "loraserve.cluster.sweep", address, name],
            env={**os.environ, **ray_session.token_environment(os.environ)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SWEEP_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {SWEEP_TIMEOUT_S:g} s"}
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"error": (done.stderr.strip().splitlines() or ["no answer"])[-1]}
    return answer


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
    if config.cluster.ray_address:
        ray_session.check_reachable(config.cluster.ray_address, os.environ)
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


def _resolve(config: Config, on_step: Callable[[str], None]) -> Config:
    """The configuration with names that depend on this machine replaced by what they stand for."""
    from loraserve.controller.library import resolve_model

    path = config.model.path
    if path and not Path(path).is_dir():
        on_step(f"fetching base model {path}")
    cluster = config.cluster
    if cluster.ray_address:
        address = ray_session.find_address(cluster.ray_address)
        cluster = msgspec.structs.replace(cluster, ray_address=address)
    model = msgspec.structs.replace(config.model, path=resolve_model(path))
    return msgspec.structs.replace(config, model=model, cluster=cluster)


def _keep_profile(config: Config, folder: Path, on_step: Callable[[str], None]) -> None:
    """Leave what replicas can do where the controller finds it; BadInputError for a profile that is none."""
    from loraserve.cluster.profiles import keep_profile, profile_of

    profile = profile_of(config)
    keep_profile(folder, profile)
    if profile is None:
        on_step(
            "no profile: plans take every rank to cost the same; run `loraserve profile` once and give the"
            " file with --profile"
        )


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


def _spawn_head(config: Config, folder: Path, run_id: str, spec: dict[str, Any]) -> "subprocess.Popen[bytes]":
    shutil.rmtree(folder / "logs", ignore_errors=True)
    (folder / "logs").mkdir()
    (folder / "head.json").write_text(json.dumps(spec), encoding="utf-8")
    temp_root = tempfile.gettempdir()
    temp_dir = tempfile.mkdtemp(
        prefix="lsr-", dir=temp_root if len(temp_root) <= MAX_TEMP_DIR_CHARS else "/tmp"
    )
    # The head waits for a byte: by then cluster.json names it and `down` knows what to end.
    with (folder / "logs" / "head.log").open("ab") as log:
        head = subprocess.Popen(
            [sys.executable, "-m", "loraserve.cluster.head", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=_environment(config, folder, run_id, temp_dir),
            start_new_session=True,
            cwd=folder,
        )
    running = RunningCluster(
        name=config.cluster.name,
        run_id=run_id,
        head_pid=head.pid,
        head_start_ticks=start_ticks(head.pid) or 0,
        ray_address=config.cluster.ray_address,
        temp_dir=temp_dir,
    )
    write_running(folder, running)
    if head.stdin is not None:
        head.stdin.write(b"\n")
        head.stdin.flush()
        if not spec["foreground"]:
            head.stdin.close()
    return head


def _environment(config: Config, folder: Path, run_id: str, temp_dir: str) -> dict[str, str]:
    """What every process of the run inherits."""
    shared = {
        **os.environ,
        # Sockets and scratch files of every library in every process go with the cluster.
        "TMPDIR": temp_dir,
        RUN_ID_VARIABLE: run_id,
        # Replicas see the GPUs that Ray gives them; without any, hiding them all would be a surprise.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    if config.cluster.ray_address:
        return {**shared, **ray_session.token_environment(shared)}
    token = folder / "ray.token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32), encoding="utf-8")
    # Another cluster's, which Ray would prefer.
    shared.pop("RAY_AUTH_TOKEN", None)
    return {
        **shared,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's default of 15 would let anything else on the machine go before the service.
        "RAY_worker_niceness": "0",
    }


def _hold(head: "subprocess.Popen[bytes]", name: str, folder: Path) -> None:
    """Wait for the head's end, which the signals that would end this process bring about."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: head.terminate()) for number in numbers]
    try:
        code = head.wait()
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    # `down` in another process may be doing the same, which harms neither.
    down(name, str(folder.parent))
    if code != 0:
        raise WorkFailedError(f"the head process of cluster {name} died; the cluster was ended")


def _follow(
    head: "subprocess.Popen[bytes]", timeout_s: float, folder: Path, on_step: Callable[[str], None]
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
                if message["bad_input"]:
                    raise BadInputError(message["message"])
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
