"""The head process: holds the local Ray cluster, or its place in one that exists already; starts everything
in order, ends everything.

Started by `loraserve up` as `python -m loraserve.cluster.head FOLDER`; says how far it is in one JSON
object per line on its standard output, and then waits for SIGTERM. In the foreground it also ends when its
standard input does, which is when `up` dies.
"""

import contextlib
import json
import math
import os
import shutil
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraserve.cluster.actors import ControllerActor, RouterActor
from loraserve.cluster.fleet import MAX_PENDING_CALLS
from loraserve.cluster.names import NAMESPACE, actor_name
from loraserve.cluster.nodes import check_listening, read_nodes, replica_need, shortage, usable
from loraserve.cluster.processes import RUN_ID_VARIABLE, redirect_output, tail
from loraserve.cluster.ray_session import Session, join, start_own
from loraserve.cluster.state import RunningCluster, read_running, write_running
from loraserve.cluster.sweep import leftovers, sweep
from loraserve.config import Config, parse_config
from loraserve.errors import (
    AlreadyExistsError,
    BadInputError,
    LoraServeError,
    ReplicaStartError,
    WorkFailedError,
)

CALL_TIMEOUT_S = 60.0
SERVING_TIMEOUT_S = 30.0


class Head:
    """One run of one cluster on this machine."""

    def __init__(self, folder: Path) -> None:
        spec = json.loads((folder / "head.json").read_text(encoding="utf-8"))
        running = read_running(folder)
        if running is None:
            raise WorkFailedError(f"{folder}: no cluster.json; start through `loraserve up`")
        self.folder = folder
        self.config: Config = parse_config(spec["config"])
        self.tree: dict[str, Any] = spec["config"]
        self.insecure: bool = spec["insecure_listen"]
        self.foreground: bool = spec["foreground"]
        self.running: RunningCluster = running
        self.stopping = threading.Event()
        self._session: Session | None = None
        self._controller: Any = None
        self._routers: list[Any] = []
        # Progress keeps the original standard output; everything else goes to the log.
        self._progress = os.fdopen(os.dup(1), "w", encoding="utf-8")
        redirect_output(folder / "logs" / "head.log")

    def say(self, event: str, **fields: object) -> None:
        """One line of progress; nobody listening any more is no error."""
        with contextlib.suppress(BrokenPipeError, ValueError):
            self._progress.write(json.dumps({"event": event, **fields}) + "\n")
            self._progress.flush()

    def run(self) -> int:
        """Start, wait to be told to stop, stop. The exit code."""
        signal.signal(signal.SIGTERM, lambda *_: self.stopping.set())
        signal.signal(signal.SIGINT, lambda *_: self.stopping.set())
        if self.foreground:
            threading.Thread(target=self._watch_starter, daemon=True).start()
        code = 0
        try:
            self._start()
            self.say("ready", routers=self.running.router_addresses)
            self._progress.close()
            while not self.stopping.wait(3600.0):
                pass
        except Exception as error:
            code = 1
            log_tail = error.log_tail if isinstance(error, ReplicaStartError) else ""
            if not isinstance(error, LoraServeError):
                log_tail = log_tail or tail(self.folder / "logs" / "controller.log")
                error = WorkFailedError(f"{type(error).__name__}: {str(error).splitlines()[0]}")
            is_input = isinstance(error, BadInputError)
            self.say("failed", message=str(error), log_tail=log_tail, bad_input=is_input)
        self._stop()
        return code

    def _watch_starter(self) -> None:
        """Nothing is written to the pipe: it ends with the process at its other end."""
        os.read(0, 1)
        self.stopping.set()

    # -- starting ------------------------------------------------------------------------------

    def _start(self) -> None:
        self._start_ray()
        self.say("step", text="Ray is up")
        self._start_controller()
        self.say("step", text="controller is up")
        self._wait_replicas()
        self.say("step", text="routing table is published")
        self._start_routers()
        self.running = replace(self.running, ready=True)
        write_running(self.folder, self.running)

    def _start_ray(self) -> None:
        cluster = self.config.cluster
        temp_dir = Path(self.running.temp_dir)
        if cluster.ray_address:
            session = join(cluster.ray_address, self._worker_environment())
        else:
            num_cpus = math.ceil(cluster.replicas * cluster.cpus_per_replica) + self.config.router.routers + 1
            session = start_own(num_cpus, temp_dir / "ray")
        # Ray's handler would end the process without ending the cluster in order.
        signal.signal(signal.SIGTERM, lambda *_: self.stopping.set())
        self._session = session
        self.running = replace(self.running, ray_address=session.address)
        write_running(self.folder, self.running)
        self._check_ray(session)
        if cluster.ray_address:
            # Not before: what has this name there would be of another cluster, and `down` sweeps by name.
            self.running = replace(self.running, ray_goes_on=True)
            write_running(self.folder, self.running)

    def _worker_environment(self) -> dict[str, str]:
        """What actors would inherit from a Ray cluster of our own."""
        names = (RUN_ID_VARIABLE, "TMPDIR", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO")
        return {name: os.environ[name] for name in names}

    def _check_ray(self, session: Session) -> None:
        """Refuse a Ray cluster that has no room, or has a cluster of this name already."""
        name = self.config.cluster.name
        actors, groups = leftovers(name)
        if actors or groups:
            raise AlreadyExistsError(
                f"cluster {name} runs in the Ray cluster at {session.address} already; end it with `loraserve"
                f" down --cluster {name} --ray-address {session.address}`, or choose another --cluster name"
            )
        nodes = read_nodes()
        check_listening(nodes, session.host, insecure_listen=self.insecure)
        need = replica_need(self.config.cluster.cpus_per_replica, self.config.engine.gpus_per_replica)
        count = self.config.cluster.replicas
        problem = shortage(usable(nodes, session.host, insecure_listen=self.insecure), need, count)
        if problem is not None:
            raise WorkFailedError(problem)

    def _options(self, name: str) -> dict[str, Any]:
        """For an actor on this process's node, where its address is known."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        session = self._session
        if session is None:
            raise WorkFailedError("not connected to Ray")
        return {
            "name": actor_name(self.config.cluster.name, name),
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "max_restarts": -1,
            "max_concurrency": MAX_PENDING_CALLS,
            "num_cpus": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(session.node_id, soft=False),
        }

    def _start_controller(self) -> None:
        import ray

        host = self.config.router.host
        port = free_port(host)
        self._controller = (
            ray.remote(ControllerActor)
            .options(**self._options("controller"))
            .remote(self.tree, str(self.folder), host, port, self.running.run_id, self.insecure)
        )
        ray.get(self._controller.port.remote(), timeout=CALL_TIMEOUT_S)
        self.running = replace(self.running, controller_address=f"{host}:{port}")
        write_running(self.folder, self.running)

    def _wait_replicas(self) -> None:
        import ray

        timeout_s = self.config.cluster.start_timeout_s + CALL_TIMEOUT_S
        ready = self._controller.wait_ready.remote(timeout_s)
        seen: dict[str, str] = {}
        while not ray.wait([ready], timeout=0.2)[0]:
            if self.stopping.is_set():
                raise WorkFailedError("stopped while starting")
            self._say_phases(seen)
        try:
            done = ray.get(ready)
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, LoraServeError) else error from None
        self._say_phases(seen)
        if not done:
            raise WorkFailedError(f"no routing table within {timeout_s:.0f} s")

    def _say_phases(self, seen: dict[str, str]) -> None:
        import ray

        for replica, phase in ray.get(self._controller.progress.remote(), timeout=CALL_TIMEOUT_S).items():
            if seen.get(replica) != phase and phase != "starting":
                self.say("step", text=f"{replica} is {phase}")
            seen[replica] = phase

    def _start_routers(self) -> None:
        import ray

        section = self.config.router
        addresses = []
        for index in range(section.routers):
            name = f"router-{index}"
            port = section.port + index if section.port else free_port(section.host)
            tree = {**self.tree, "router": {**self.tree["router"], "port": port}}
            router = (
                ray.remote(RouterActor)
                .options(**self._options(name))
                .remote(name, tree, str(self.folder), self.running.controller_address, self.insecure)
            )
            self._routers.append(router)
            addresses.append(f"{section.host}:{port}")
        for router, address in zip(self._routers, addresses, strict=True):
            ray.get(router.port.remote(), timeout=CALL_TIMEOUT_S)
            wait_serving(address, SERVING_TIMEOUT_S)
            self.say("step", text=f"router serves at {address}")
        self.running = replace(self.running, router_addresses=tuple(addresses))

    # -- stopping ------------------------------------------------------------------------------

    def _stop(self) -> None:
        """Routers first, so that nothing new comes in; then replicas, controller, Ray, files."""
        import ray

        if self._controller is not None:
            self._call([router.stop.remote(1.0) for router in self._routers], 5.0)
            self._call([self._controller.stop.remote()], 5.0)
            replicas = []
            for index in range(self.config.cluster.replicas):
                name = actor_name(self.config.cluster.name, f"replica-{index}")
                with contextlib.suppress(ValueError):
                    replicas.append(ray.get_actor(name, namespace=NAMESPACE).stop.remote(0.5))
            self._call(replicas, 10.0)
            if self.config.cluster.ray_address:
                sweep(self.config.cluster.name)
        ray.shutdown()
        shutil.rmtree(self.running.temp_dir, ignore_errors=True)
        (self.folder / "cluster.json").unlink(missing_ok=True)

    @staticmethod
    def _call(calls: list[Any], timeout_s: float) -> None:
        import ray

        # What does not stop in time is killed.
        with contextlib.suppress(ray.exceptions.RayError):
            if calls:
                ray.wait(calls, num_returns=len(calls), timeout=timeout_s)


def free_port(host: str) -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def wait_serving(address: str, timeout_s: float) -> None:
    """Wait until the router's health is SERVING; WorkFailedError after `timeout_s`."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    begun_s = time.monotonic()
    request = health_pb2.HealthCheckRequest()
    with grpc.insecure_channel(address, options=(("grpc.enable_http_proxy", 0),)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        # A refused or broken watch ends the wait like a late one: with the error below.
        with contextlib.suppress(grpc.RpcError):
            for update in stub.Watch(request, timeout=timeout_s, wait_for_ready=True):  # type: ignore[attr-defined]
                if update.status == health_pb2.HealthCheckResponse.SERVING:
                    return
    waited_s = time.monotonic() - begun_s
    raise WorkFailedError(f"the router at {address} did not begin to serve within {waited_s:.0f} s")


def main() -> int:
    """Run the head of the cluster in the folder given."""
    # Written by `up` once cluster.json names this process; the end of the file instead: it has died.
    if not os.read(0, 1):
        return 1
    return Head(Path(sys.argv[1])).run()


if __name__ == "__main__":
    sys.exit(main())
