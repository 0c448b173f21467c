"""Small clusters for tests of the state machine: specs, adapters, and answers to its commands."""

from placement.cluster import messages
from placement.cluster.invariants import check_cluster
from placement.cluster.state import ClusterState
from placement.policies import policy
from placement.types import AdapterName, AdapterVersion, ReplicaId, ReplicaSpec, version_id

R0, R1 = ReplicaId("replica-0"), ReplicaId("replica-1")


def spec(replica: ReplicaId, *, slots: int = 4, max_rank: int = 128, pool_bytes: int = 1000) -> ReplicaSpec:
    """A replica's limits."""
    return ReplicaSpec(replica_id=replica, max_lora_rank=max_rank, pool_adapters=slots, pool_bytes=pool_bytes)


def adapter(name: str, *, digest: str = "0" * 64, rank: int = 8, size_bytes: int = 10) -> AdapterVersion:
    """An adapter's version."""
    key = AdapterName(name)
    return AdapterVersion(
        version_id=version_id(key, digest), name=key, sha256=digest, rank=rank, size_bytes=size_bytes
    )


def cluster(*, slots: int = 4, replicas: tuple[ReplicaId, ...] = (R0, R1)) -> ClusterState:
    """A cluster whose replicas are all up."""
    state = ClusterState(replica_ids=replicas, policy=policy("least-loaded"), base_model="m")
    for replica in replicas:
        state.handle(messages.ReplicaReady(spec(replica, slots=slots), f"127.0.0.1:{replica[-1]}"))
    return state


def acknowledge(state: ClusterState, commands: list[messages.Command]) -> list[messages.Command]:
    """Answer every load and drop with success until the state machine asks for nothing more."""
    seen = list(commands)
    queue = list(commands)
    while queue:
        command = queue.pop(0)
        more: list[messages.Command] = []
        if isinstance(command, messages.LoadAdapter):
            more = state.handle(messages.AdapterLoaded(command.replica_id, command.adapter.version_id))
        elif isinstance(command, messages.UnloadAdapter):
            more = state.handle(messages.AdapterUnloaded(command.replica_id, command.version_id))
        queue += more
        seen += more
        check_cluster(state)
    return seen
