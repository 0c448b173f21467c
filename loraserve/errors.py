"""Every error that LoRAServe raises on purpose.

LoraServeError
├── BadInputError            the caller's input is wrong: exit code 2, INVALID_ARGUMENT
│   ├── ConfigError          a configuration key or value
│   ├── AdapterRejectedError an adapter's files or its place in this cluster
│   ├── NotFoundError        a name that is not registered: NOT_FOUND
│   └── AlreadyExistsError   a name that is taken: ALREADY_EXISTS
├── OverloadedError          a bounded queue or pool is full: RESOURCE_EXHAUSTED
├── UnavailableError         nobody can serve this now: UNAVAILABLE
│   └── StreamBrokenError    a stream ended too early and cannot go on; carries its tokens so far
├── DeadlineError            the request's time ran out: DEADLINE_EXCEEDED
├── StaleError               the caller decided on a state that no longer holds: FAILED_PRECONDITION
├── SupersededError          a later attempt at the same request has taken over: ABORTED
└── WorkFailedError          the work was right but failed: exit code 1, INTERNAL
    ├── ClusterStartError    `up` failed; carries the tail of the log that says why
    ├── ReplicaStartError    a replica did not come up; carries the tail of its log
    └── EngineDeadError      the engine behind a replica is gone: UNAVAILABLE
"""


class LoraServeError(Exception):
    """Base of all; `str(error)` is one clear line for a person."""


class BadInputError(LoraServeError):
    """The caller's input is wrong; the message says what, where, and what would be right."""


class ConfigError(BadInputError):
    """A configuration key or value is wrong."""


class AdapterRejectedError(BadInputError):
    """An adapter cannot be served as it is."""


class NotFoundError(BadInputError):
    """A name is not known."""


class AlreadyExistsError(BadInputError):
    """A name is taken."""


class OverloadedError(LoraServeError):
    """A bounded queue or pool is full."""


class UnavailableError(LoraServeError):
    """Nobody can serve this at the moment."""


class StreamBrokenError(UnavailableError):
    """A stream ended before its answer did and could not go on elsewhere.

    `token_ids` and `text` are all that came of the answer, `reason` says what broke and why that was
    the end.
    """

    def __init__(self, request_id: str, reason: str, token_ids: tuple[int, ...], text: str) -> None:
        super().__init__(f"request {request_id} ended after {len(token_ids)} tokens: {reason}")
        self.request_id = request_id
        self.reason = reason
        self.token_ids = token_ids
        self.text = text

    def __reduce__(self) -> tuple[type["StreamBrokenError"], tuple[str, str, tuple[int, ...], str]]:
        return StreamBrokenError, (self.request_id, self.reason, self.token_ids, self.text)


class DeadlineError(LoraServeError):
    """The request's time ran out before its work was done."""


class StaleError(LoraServeError):
    """The caller's decision rests on a state that no longer holds; decide again."""


class SupersededError(LoraServeError):
    """A later attempt at the same request has taken over."""


class WorkFailedError(LoraServeError):
    """The input was right and the work failed."""


class ClusterStartError(WorkFailedError):
    """A cluster did not start and nothing of it is left running; `log_tail` says more."""

    def __init__(self, message: str, log_tail: str = "") -> None:
        super().__init__(message)
        self.log_tail = log_tail


class ReplicaStartError(WorkFailedError):
    """A replica did not become ready; `log_tail` holds the last lines of its log."""

    def __init__(self, replica_id: str, reason: str, log_tail: str = "") -> None:
        super().__init__(f"replica {replica_id} did not start: {reason}")
        self.replica_id = replica_id
        self.reason = reason
        self.log_tail = log_tail

    def __reduce__(self) -> tuple[type["ReplicaStartError"], tuple[str, str, str]]:
        return ReplicaStartError, (self.replica_id, self.reason, self.log_tail)


class EngineDeadError(WorkFailedError):
    """The engine behind a replica is gone and takes no more requests."""


def verdict_of(cancelled: BaseException) -> LoraServeError | None:
    """Why our own side has cancelled a task: the error that it gave `Task.cancel` as message; None for a
    cancellation by anybody else."""
    found = cancelled.args[0] if cancelled.args else None
    return found if isinstance(found, LoraServeError) else None
