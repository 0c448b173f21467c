"""The command line: registers the commands, which import what they need when they run."""

import sys

import typer

from loraserve.cli.adapter import adapter_app
from loraserve.cli.bench import bench_app
from loraserve.cli.down import down
from loraserve.cli.drain import drain, undrain
from loraserve.cli.plan import plan_app
from loraserve.cli.status import status, top
from loraserve.cli.submit import submit
from loraserve.cli.trace import trace_app
from loraserve.cli.up import up


def make_app() -> typer.Typer:
    """The whole command tree."""
    app = typer.Typer(
        name="loraserve",
        help="Serve many LoRA adapters of different ranks over a cluster of vLLM replicas.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    from loraserve.cli.capacity import capacity
    from loraserve.cli.doctor import doctor
    from loraserve.cli.fidelity import fidelity
    from loraserve.cli.forecast import forecast
    from loraserve.cli.generate import generate
    from loraserve.cli.profile import profile
    from loraserve.cli.replay import replay
    from loraserve.cli.simulate import simulate

    for command in (
        up,
        down,
        status,
        top,
        drain,
        undrain,
        generate,
        replay,
        simulate,
        capacity,
        profile,
        forecast,
        fidelity,
        doctor,
    ):
        app.command()(command)
    # What follows `up` or `replay` is theirs.
    app.command(context_settings={"allow_interspersed_args": False})(submit)
    app.add_typer(adapter_app, name="adapter")
    app.add_typer(bench_app, name="bench")
    app.add_typer(plan_app, name="plan")
    app.add_typer(trace_app, name="trace")
    app.callback(invoke_without_command=True)(root)
    return app


def root(
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True),
) -> None:
    """Serve many LoRA adapters of different ranks over a cluster of vLLM replicas."""
    if version:
        from loraserve import __version__

        typer.echo(__version__)
        raise typer.Exit


def run() -> None:
    """The console script."""
    from loraserve.cli.packages_check import check_own_packages

    problem = check_own_packages()
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(2)
    from loraserve.rpc.tuning import tune_grpc

    tune_grpc()
    make_app()()


if __name__ == "__main__":
    run()
