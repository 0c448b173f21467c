"""`loraserve trace`: look at traces, convert and synthesise them."""

import typer

trace_app = typer.Typer(
    help="Look at traces, convert and synthesise them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@trace_app.callback()
def _group() -> None:
    """Keeps `trace` a group however many commands it has."""
