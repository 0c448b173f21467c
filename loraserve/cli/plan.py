"""`loraserve plan show | apply | freeze | rollback`: which replica is to hold which adapter, and why."""

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from loraserve.cli.common import command, echo_json, resolve_addresses, run_async
from loraserve.errors import BadInputError, WorkFailedError

if TYPE_CHECKING:
    from loraserve.client import Client
    from loraserve.client_types import PlanChange, PlanStatus
    from placement.types import Placement

plan_app = typer.Typer(
    help="Show, apply, freeze and roll back plans: which replica is to hold which adapter.",
    no_args_is_help=True,
)

CLUSTER = typer.Option("default", help="The cluster's name on this machine.")
ADDRESS = typer.Option(None, help="A router's HOST:PORT, instead of --cluster; may be repeated.")
JSON = typer.Option(False, "--json", help="Print one JSON object.")

T = TypeVar("T")


@plan_app.command("show")
@command
def show(
    save: str = typer.Option(None, metavar="FILE", help="Write the plan in force to a file for `apply`."),
    cluster: str = CLUSTER,
    address: list[str] = ADDRESS,
    json: bool = JSON,
) -> None:
    """Show the plan in force, and what the policy would change if it planned now."""
    status = _ask(lambda client: client.plan(propose=True), cluster, address)
    if save is not None:
        _save(Path(save), status.current)
    if json:
        echo_json(_tree(status))
        return
    from loraserve.cli.plan_output import print_diff, print_plan

    print_plan(status)
    if status.diff is not None:
        print("the policy would leave it as it is" if status.diff.is_empty else "the policy would change:")
        print_diff(status.diff)
    if status.refusal:
        print(f"and it would be refused: {status.refusal}")


@plan_app.command("apply")
@command
def apply(
    file: str = typer.Argument(None, help="A plan that `plan show --save` wrote; it is frozen then."),
    cluster: str = CLUSTER,
    address: list[str] = ADDRESS,
    json: bool = JSON,
) -> None:
    """Plan now; or with FILE adopt exactly that plan, which stays until `plan freeze --off`."""
    plan = None if file is None else _load(Path(file))
    _show_change(_ask(lambda client: client.apply_plan(plan), cluster, address), json=json)


@plan_app.command("freeze")
@command
def freeze(
    off: bool = typer.Option(False, "--off", help="Let the policy plan again, at once."),
    cluster: str = CLUSTER,
    address: list[str] = ADDRESS,
    json: bool = JSON,
) -> None:
    """Keep the plan as it is: only what a lost replica alone held is placed anew, and new adapters."""
    _show_change(_ask(lambda client: client.freeze_plan(frozen=not off), cluster, address), json=json)


@plan_app.command("rollback")
@command
def rollback(cluster: str = CLUSTER, address: list[str] = ADDRESS, json: bool = JSON) -> None:
    """Go back to the plan before this one, which stays until `plan freeze --off`."""
    _show_change(_ask(lambda client: client.roll_back_plan(), cluster, address), json=json)


def _ask(act: "Callable[[Client], Coroutine[Any, Any, T]]", cluster: str, address: list[str] | None) -> T:
    from loraserve.client import Client

    async def run() -> T:
        async with Client(resolve_addresses(address, cluster)) as client:
            return await act(client)

    return run_async(run)


def _show_change(change: "PlanChange", *, json: bool) -> None:
    if json:
        echo_json(change)
        return
    from loraserve.cli.plan_output import print_diff

    print("nothing changes" if change.diff.is_empty else "changed:")
    print_diff(change.diff)
    if change.frozen:
        print("the plan is frozen; `loraserve plan freeze --off` lets the policy plan again")


def _tree(status: "PlanStatus") -> dict[str, Any]:
    from placement.plans.text import plan_tree

    return {
        "current": plan_tree(status.current),
        "frozen": status.frozen,
        "problem": status.problem or None,
        "earlier": status.earlier,
        "proposed": None if status.proposed is None else plan_tree(status.proposed),
        "diff": status.diff,
        "refusal": status.refusal or None,
    }


def _save(path: Path, plan: "Placement") -> None:
    from placement.plans.text import plan_text

    try:
        path.write_text(plan_text(plan) + "\n", encoding="utf-8")
    except OSError as error:
        raise WorkFailedError(f"{path}: cannot write the plan: {error.strerror}") from error


def _load(path: Path) -> "Placement":
    from placement.plans.text import parse_plan

    try:
        return parse_plan(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInputError(f"{path}: cannot read the plan: {error.strerror}") from error
    except ValueError as error:
        raise BadInputError(f"{path}: {error}; write one with `loraserve plan show --save FILE`") from error
