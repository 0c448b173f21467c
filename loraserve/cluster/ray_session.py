"""Connecting to Ray: a local cluster of our own, or one that exists already, with its token."""

import os
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraserve.cluster.addresses import split_address
from loraserve.cluster.names import NAMESPACE
from loraserve.cluster.nodes import LOOPBACK
from loraserve.errors import BadInputError, UnavailableError
from placement.types import NodeId

# Ray refuses less than 75 MiB; nothing of ours travels through its object store.
OBJECT_STORE_BYTES = 78_643_200
PROBE_TIMEOUT_S = 5.0
# A method of Ray's GCS that needs its token, where one is wanted, and nothing else.
PROBE_METHOD = "/ray.rpc.NodeInfoGcsService/CheckAlive"
TOKEN_VARIABLES = "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE (or RAY_AUTH_TOKEN)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A connection of this process: Ray's address, and the node that the process is on."""

    address: str
    node_id: NodeId
    host: str


def start_own(num_cpus: int, temp_dir: Path) -> Session:
    """Start a local Ray cluster that ends with this process; it listens as Ray does."""
    import ray

    ray.init(
        # Whatever cluster RAY_ADDRESS names.
        address="local",
        namespace=NAMESPACE,
        num_cpus=num_cpus,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=OBJECT_STORE_BYTES,
        _temp_dir=str(temp_dir),
        _node_ip_address=LOOPBACK,
    )
    return _session()


def join(address: str, worker_environment: Mapping[str, str]) -> Session:
    """Connect to the Ray cluster at HOST:PORT; all that this process starts there gets the variables."""
    if address.rpartition(":")[0] in (LOOPBACK, "localhost"):
        # Ray would take the machine's outward address instead, which a cluster on loopback does not have.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address,
            namespace=NAMESPACE,
            log_to_driver=False,
            runtime_env={"env_vars": dict(worker_environment)},
        )
    except ConnectionError as error:
        raise UnavailableError(
            f"the Ray cluster at {address} does not take this process; a Ray daemon of that cluster must run"
            f" on this machine ({str(error).splitlines()[0]})"
        ) from error
    finally:
        signal.signal(signal.SIGTERM, handler)
    return _session()


def _session() -> Session:
    import ray

    context = ray.get_runtime_context()
    return Session(
        address=context.gcs_address,
        node_id=NodeId(context.get_node_id()),
        host=ray.util.get_node_ip_address(),
    )


def find_address(address: str, option: str = "cluster.ray_address") -> str:
    """HOST:PORT of a Ray cluster: as given, or for `auto` from RAY_ADDRESS or the last one started here.

    `option` is what the user gave it by.
    """
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "auto")
    if address == "auto":
        from ray._private.utils import read_ray_address

        address = read_ray_address() or ""
        if not address:
            raise BadInputError(
                f"{option}: auto: no Ray cluster was started on this machine; start one with"
                " `ray start --head`, or give its HOST:PORT"
            )
    if split_address(address) is None:
        raise BadInputError(
            f"{option}: {address} is neither auto nor HOST:PORT of a Ray cluster, such as 127.0.0.1:6379"
        )
    return address


def is_listening(address: str) -> bool:
    """Whether anything takes a connection at HOST:PORT."""
    where = split_address(address)
    if where is None:
        return False
    try:
        with socket.create_connection(where, PROBE_TIMEOUT_S):
            return True
    except (OSError, ValueError):
        # ValueError, of which UnicodeError is one: no host can have this name.
        return False


def token_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What must be added to the environment so that Ray uses the token that is there."""
    if environment.get("RAY_AUTH_MODE") or read_token(environment) is None:
        return {}
    return {"RAY_AUTH_MODE": "token"}


def read_token(environment: Mapping[str, str]) -> str | None:
    """The token that Ray would use, whatever its mode, or None."""
    token = environment.get("RAY_AUTH_TOKEN")
    if token:
        return token.strip()
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def check_reachable(address: str, environment: Mapping[str, str]) -> None:
    """Refuse, before Ray tries for minutes, a cluster that is not there or wants another token."""
    if not is_listening(address):
        raise UnavailableError(
            f"no Ray cluster answers at {address}; start one with `ray start --head`, or give its HOST:PORT"
        )
    if _accepts(address, None):
        return
    token = read_token(environment)
    mode = {**environment, **token_environment(environment)}.get("RAY_AUTH_MODE")
    if token is None or mode != "token":
        found = "no token was found" if token is None else f"RAY_AUTH_MODE is {mode}"
        raise BadInputError(
            f"the Ray cluster at {address} wants a token and {found}; set {TOKEN_VARIABLES} to that cluster's"
        )
    if not _accepts(address, token):
        raise BadInputError(
            f"the Ray cluster at {address} refuses the token that was found; set {TOKEN_VARIABLES} to that"
            " cluster's"
        )


def _accepts(address: str, token: str | None) -> bool:
    """Whether the cluster takes the token; True also if it cannot be told, as with TLS."""
    import grpc

    metadata: Any = () if token is None else (("authorization", f"Bearer {token}"),)
    options = (("grpc.enable_http_proxy", 0),)
    with grpc.insecure_channel(address, options=options) as channel:
        probe: Any = channel.unary_unary(PROBE_METHOD)
        try:
            probe(b"", metadata=metadata, timeout=PROBE_TIMEOUT_S)
        except grpc.RpcError as error:
            return bool(error.code() is not grpc.StatusCode.UNAUTHENTICATED)
    return True
