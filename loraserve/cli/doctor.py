"""`loraserve doctor`: whether this machine can run LoRAServe, and what would make it right."""

import typer

from loraserve.cli.common import command, echo_json, fail


@command
def doctor(json: bool = typer.Option(False, "--json", help="Print one JSON object.")) -> None:
    """Look at this machine: versions, GPUs, memory, ports, leftovers. Exit code 1 if something fails."""
    from loraserve.cli.doctor_checks import Status
    from loraserve.cli.doctor_probes import examine

    found = examine()
    failed = [check.name for check in found if check.status is Status.FAIL]
    if json:
        echo_json({"ok": not failed, "checks": found})
    else:
        for check in found:
            print(f"{check.status.value:4}  {check.name:13}  {check.found}")
            if check.advice:
                print(f"{'':21}-> {check.advice}")
    if failed:
        fail(f"LoRAServe cannot run here: {', '.join(failed)}", 1)
