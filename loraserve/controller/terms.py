"""What operators may want of an adapter: a weight and targets of its own, set with it or later."""

from dataclasses import replace

from loraserve.controller.controller import Controller
from loraserve.controller.store import Changes
from loraserve.errors import BadInputError, NotFoundError, WorkFailedError
from loraserve.rpc.v1 import management_pb2
from placement.cluster import messages
from placement.profile import Slo
from placement.types import AdapterName, AdapterTerms, VersionId


async def register(controller: Controller, request: management_pb2.RegisterAdapterRequest) -> VersionId:
    """Register an adapter and then set what is wanted of it; a name that is replaced keeps what it had.

    The errors of `Controller.register`, BadInputError for terms that cannot be, before anything is done, and
    WorkFailedError if the adapter is registered and they cannot be saved.
    """
    wanted = _merged(controller, AdapterName(request.name), request.terms)
    version = await controller.register(request.name, request.source, replace=request.replace)
    if request.HasField("terms"):
        _set(controller, AdapterName(request.name), wanted)
    return version


def set_terms(controller: Controller, request: management_pb2.SetAdapterRequest) -> VersionId:
    """Change what is wanted of a registered adapter; what the request leaves out stays.

    NotFoundError for an unknown name, BadInputError for what cannot be, WorkFailedError if it cannot be
    saved, and then nothing has changed.
    """
    name = AdapterName(request.name)
    version = controller.state.active.get(name)
    if version is None:
        raise NotFoundError(f"adapter {name} is not registered")
    _set(controller, name, _merged(controller, name, request.terms))
    return version


def usual_slo(controller: Controller) -> Slo:
    """The targets of an adapter without its own."""
    return Slo(ttft_ms=controller.config.slo.ttft_ms, tbt_ms=controller.config.slo.tbt_ms)


def _merged(controller: Controller, name: AdapterName, given: management_pb2.AdapterTerms) -> AdapterTerms:
    before = controller.state.terms.get(name, AdapterTerms())
    usual = usual_slo(controller)
    slo = before.slo or usual
    try:
        if given.HasField("slo_ttft_ms"):
            slo = replace(slo, ttft_ms=given.slo_ttft_ms or usual.ttft_ms)
        if given.HasField("slo_tbt_ms"):
            slo = replace(slo, tbt_ms=given.slo_tbt_ms or usual.tbt_ms)
        weight = given.weight if given.HasField("weight") else before.weight
        return AdapterTerms(weight=weight, slo=None if slo == usual else slo)
    except ValueError as error:
        raise BadInputError(f"terms.{error}") from error


def _set(controller: Controller, name: AdapterName, terms: AdapterTerms) -> None:
    state = controller.state
    before = state.terms.get(name, AdapterTerms())
    if name not in state.active or terms == before:
        return
    try:
        controller.save_wish(Changes(terms={name: terms}))
    except WorkFailedError as error:
        raise WorkFailedError(
            f"adapter {name} is registered, its weight and SLO are not saved: {error}"
        ) from error
    controller.dispatch(messages.AdapterTermsChanged(name, terms))
    if terms.slo == before.slo:
        return
    version = state.active[name]
    for replica in state.holders(version):
        controller.keeper.tell_targets(replica, state.adapters[version])
