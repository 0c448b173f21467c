"""One request on its way through the router: its deadline, its decision, what came of it."""

import asyncio

from grpc import StatusCode

from loraserve.router.ledger import RequestOutcome
from loraserve.rpc.codec import is_resumable
from loraserve.rpc.internal.v1 import internal_pb2
from loraserve.rpc.v1 import inference_pb2
from placement.routing.chooser import Decision
from placement.types import AdapterName, ReplicaId, VersionId


class Flight:
    """The mutable state of one admitted request, owned by the call that serves it."""

    __slots__ = (
        "adapter",
        "attempt",
        "attempts",
        "body",
        "closed",
        "code",
        "deadline_s",
        "decision",
        "earlier_messages",
        "excluded",
        "excluded_at",
        "first_message_s",
        "has_waited",
        "losses",
        "max_tokens",
        "messages",
        "pinned_version",
        "prefix",
        "prompt_tokens",
        "refusals",
        "remaining_s",
        "request_id",
        "resumed_ids",
        "sent",
        "started_s",
        "task",
        "timer",
        "verdict",
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
        self.attempt = 0
        self.max_tokens = 0
        self.prompt_tokens = 0
        # The names of its prompt's first blocks, if anybody looks at them.
        self.prefix: tuple[int, ...] = ()
        self.decision: Decision | None = None
        # What must not change any more, once the client has seen output: "" is the base model.
        self.pinned_version: str | None = None
        self.excluded: frozenset[ReplicaId] = frozenset()
        self.excluded_at = 0
        self.refusals: list[StatusCode] = []
        # Whether there was no holder at some moment.
        self.has_waited = False
        self.losses = 0
        self.attempts = 0
        self.messages = 0
        # Those of them that came before the present attempt.
        self.earlier_messages = 0
        self.first_message_s: float | None = None
        # The messages as they were sent, one after the other: read as one, protobuf joins their tokens.
        self.sent: bytearray | None = bytearray()
        self.resumed_ids: tuple[int, ...] = ()
        self.code = StatusCode.UNKNOWN
        # Why this router itself ends the request, when it is not the client who does.
        self.verdict: tuple[StatusCode, str] | None = None
        self.task: asyncio.Task[object] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.closed: asyncio.Event | None = None

    def start(self, *, unary: bool) -> internal_pb2.Start:
        """The request to the chosen replica: the client's own bytes with the decision around them."""
        decision = self.decision
        assert decision is not None, "a request is forwarded after it has been decided"
        return internal_pb2.Start(
            request_id=self.request_id,
            version_id=decision.version_id or "",
            table_version=decision.table_version,
            generate=self.body,
            resume_token_ids=self.resumed_ids,
            remaining_s=self.remaining_s,
            unary=unary,
            router_attempt=self.attempts,
            waited_s=self.deadline_s - self.started_s - self.remaining_s,
            has_missed=self.has_missed,
        )

    def end(self, code: StatusCode, message: str) -> None:
        """End the request from this side, whatever it is waiting for."""
        if self.verdict is None and self.task is not None:
            self.verdict = (code, message)
            self.task.cancel()

    def note_loss(self) -> bool:
        """Take stock of what the client has, to go on from it; True if that is the whole answer."""
        if self.sent is None:
            return False
        so_far = inference_pb2.GenerateResponse.FromString(bytes(self.sent))
        self.resumed_ids = tuple(so_far.token_ids)
        return so_far.finish_reason != inference_pb2.FINISH_REASON_UNSPECIFIED

    def obstacle(self) -> str | None:
        """Why the request cannot go on elsewhere after what was sent; None if it can."""
        if not self.messages:
            return None
        message = inference_pb2.GenerateRequest.FromString(self.body)
        if self.sent is None or not is_resumable(message.sampling):
            return "with a seed, a presence or frequency penalty, or logprobs it cannot be resumed exactly"
        return None

    @property
    def has_missed(self) -> bool:
        """Whether it met no copy of its adapter somewhere on its way."""
        return self.adapter is not None and (
            self.has_waited or StatusCode.FAILED_PRECONDITION in self.refusals
        )

    @property
    def version(self) -> VersionId | None:
        """The weights that the last decision named."""
        return self.decision.version_id if self.decision is not None else None

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
