"""What operators may ask of the plan: to see it, to apply one, to freeze it, to go back."""

from loraserve.controller.controller import Controller
from loraserve.errors import NotFoundError, StaleError, UnavailableError, WorkFailedError
from loraserve.rpc.plan_codec import encode_diff, encode_plan
from loraserve.rpc.v1 import management_pb2
from placement.cluster import messages
from placement.plans.diff import PlanDiff, diff_of
from placement.types import Placement


def show_plan(controller: Controller, *, propose: bool) -> management_pb2.GetPlanResponse:
    """The plan in force, and with `propose` what the policy would make now; nothing is changed."""
    _require_begun(controller)
    state = controller.state
    answer = management_pb2.GetPlanResponse(
        current=encode_plan(state.plan),
        frozen=state.book.frozen is not None,
        problem=state.book.problem or "",
        earlier=[
            management_pb2.EarlierPlan(number=one.number, ended_by=one.ended_by) for one in state.book.earlier
        ],
    )
    if propose:
        plan, refusal = state.proposed()
        answer.proposed.CopyFrom(encode_plan(plan))
        answer.diff.CopyFrom(encode_diff(diff_of(state.snapshot(), plan)))
        answer.refusal = refusal or ""
    return answer


def apply_plan(controller: Controller, plan: Placement | None) -> management_pb2.PlanChanged:
    """Adopt this plan, which is frozen then, or the one that the policy makes now.

    NotFoundError for one with names that the cluster does not have, StaleError for one that may not be, and
    then nothing is changed; WorkFailedError if it is in force and cannot be saved.
    """
    _require_begun(controller)
    state = controller.state
    if plan is None:
        plan, refusal = state.proposed()
        whose, frozen = f"the plan of policy {state.policy.name}", state.book.frozen is not None
    else:
        _check_names(controller, plan)
        whose, frozen, refusal = "the plan", True, state.plan_problem(plan)
    if refusal is not None:
        raise StaleError(f"{whose} is refused: {refusal}")
    return _carry_out(controller, messages.PlanGiven(plan, frozen))


def freeze_plan(controller: Controller, *, frozen: bool) -> management_pb2.PlanChanged:
    """Let the plan stay as it is, or let the policy plan again, at once; WorkFailedError if it cannot be
    saved."""
    _require_begun(controller)
    return _carry_out(controller, messages.FreezeRequested(frozen))


def roll_back_plan(controller: Controller) -> management_pb2.PlanChanged:
    """Back to the plan before, frozen; StaleError if there is none, WorkFailedError if it cannot be saved."""
    _require_begun(controller)
    if not controller.state.book.earlier:
        raise StaleError("there is no plan before this one to go back to")
    return _carry_out(controller, messages.RollbackRequested())


def _check_names(controller: Controller, plan: Placement) -> None:
    state = controller.state
    replicas = {holder.replica_id for holders in plan.holders.values() for holder in holders}
    known = ", ".join(sorted(state.replicas))
    for replica in sorted(replicas.union(plan.max_lora_ranks).difference(state.replicas)):
        raise NotFoundError(f"the plan names {replica}, which is no replica here; replicas: {known}")
    # Another version of a registered adapter was right a while ago; that is for the veto.
    for version in sorted(plan.holders):
        if version.rpartition("@")[0] not in state.active:
            raise NotFoundError(f"the plan names {version}, whose adapter is not registered")


def _carry_out(controller: Controller, event: messages.Event) -> management_pb2.PlanChanged:
    state = controller.state
    before = state.snapshot()
    controller.dispatch(event)
    if controller.problem is not None:
        raise WorkFailedError(f"it is in force, but a restarted controller forgets it: {controller.problem}")
    diff: PlanDiff = diff_of(before, state.plan)
    return management_pb2.PlanChanged(diff=encode_diff(diff), frozen=state.book.frozen is not None)


def _require_begun(controller: Controller) -> None:
    if controller.table.version == 0:
        raise UnavailableError("the controller is still looking for its replicas; try again in a moment")
