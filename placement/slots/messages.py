"""What a replica's slot table hears (events, past tense) and asks for (commands, imperative)."""

from dataclasses import dataclass

from placement.types import VersionId


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A request that names a resident version has arrived."""

    version_id: VersionId
    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A request finished, was aborted, or was given up while it waited; an unknown one is no error."""

    version_id: VersionId
    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Activated:
    """The version's weights are in a slot and may be used."""

    version_id: VersionId


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationFailed:
    """The slot could not be written, and is free again."""

    version_id: VersionId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Deactivated:
    """The version's slot is free."""

    version_id: VersionId


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A version became resident; nobody asks for it yet."""

    version_id: VersionId


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """The pool lets the version go; no request may name it."""

    version_id: VersionId


Event = Wanted | Ended | Activated | ActivationFailed | Deactivated | Loaded | Dropped


@dataclass(frozen=True, slots=True, kw_only=True)
class Activate:
    """Write the version into a free slot; answered by Activated or ActivationFailed."""

    version_id: VersionId


@dataclass(frozen=True, slots=True, kw_only=True)
class Deactivate:
    """Free the version's slot; answered by Deactivated."""

    version_id: VersionId


@dataclass(frozen=True, slots=True, kw_only=True)
class Admit:
    """Give the request to the engine: its version is active and stays so until it has ended."""

    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """End the request with this reason; nothing more is asked about it."""

    request_id: str
    reason: str


Command = Activate | Deactivate | Admit | Refuse
