"""One request on its way through the router: its deadline, its decision, what came of it."""

from grpc import StatusCode

from loraserve.router.ledger import RequestOutcome
from loraserve.rpc.codec import PROTOCOL_VERSION
from loraserve.rpc.internal.v1 import internal_pb2
from placement.routing import Decision
from placement.types import AdapterName, ReplicaId


class Flight:
    """The mutable state of one admitted request, owned by the call that serves it."""

    __slots__ = (
        "adapter",
        "attempts",
        "body",
        "code",
        "deadline_s",
        "decision",
        "excluded",
        "first_message_s",
        "messages",
        "refusals",
        "remaining_s",
        "request_id",
        "started_s",
    )

    def __init__(
        self, *, request_id: str, adapter: str, body: bytes, started_s: float, deadline_s: float
    ) -> None:
        self.request_id = request_id
        self.adapter = AdapterName(adapter) if adapter else None
        self.body = body
        self.started_s = started_s
        self.deadline_s = deadline_s
        self.remaining_s = 0.0
        self.decision: Decision | None = None
        self.excluded: frozenset[ReplicaId] = frozenset()
        self.refusals: list[StatusCode] = []
        self.attempts = 0
        self.messages = 0
        self.first_message_s: float | None = None
        self.code = StatusCode.UNKNOWN

    def execute_bytes(self) -> bytes:
        """The call to the chosen replica: the client's own bytes with the decision around them."""
        decision = self.decision
        assert decision is not None, "a request is forwarded after it has been decided"
        return internal_pb2.ExecuteRequest(
            protocol_version=PROTOCOL_VERSION,
            request_id=self.request_id,
            version_id=decision.version_id or "",
            table_version=decision.table_version,
            generate=self.body,
        ).SerializeToString()

    def outcome(self, ended_s: float) -> RequestOutcome:
        """The record of this request, which has ended."""
        decision = self.decision
        return RequestOutcome(
            request_id=self.request_id,
            adapter=self.adapter or "",
            status=self.code.name,
            replica_id=decision.replica_id if decision else None,
            version_id=decision.version_id if decision else None,
            reason=decision.reason if decision else None,
            table_version=decision.table_version if decision else None,
            attempts=self.attempts,
            messages=self.messages,
            started_s=self.started_s,
            first_message_s=self.first_message_s,
            ended_s=ended_s,
        )
