"""`loraserve generate`: one prompt, its answer streamed to the terminal."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraserve.cli.common import command, echo_json, resolve_addresses, run_async
from loraserve.errors import BadInputError
from loraserve.request import ChatTurn, GenerationStep, SamplingParams

if TYPE_CHECKING:
    from loraserve.client import GenerationStream


@command
def generate(
    prompt: Annotated[str, typer.Argument(help="The text, or - to read it from standard input.")],
    adapter: Annotated[str, typer.Option(help="A registered adapter; the base model without it.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token every time.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this total.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many tokens; 0 means all.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Draw the same tokens every time.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on to --max-tokens.")] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Send the prompt as a user's message, in the model's template.")
    ] = False,
    system: Annotated[str, typer.Option(help="A system message before it; needs --chat.")] = "",
    timeout: Annotated[float, typer.Option(help="Seconds until the request is given up.")] = 600.0,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one JSON object when the answer is complete.")
    ] = False,
    address: Annotated[
        list[str] | None,
        typer.Option(help="A router, HOST:PORT; may be repeated; by default all of the running cluster."),
    ] = None,
    cluster: Annotated[str, typer.Option(help="Which cluster of this machine.")] = "default",
) -> None:
    """Generate text, streamed as it comes."""
    if system and not chat:
        raise BadInputError("--system: needs --chat")
    if timeout <= 0:
        raise BadInputError(f"--timeout: {timeout:g} is not a positive number of seconds")
    text = sys.stdin.read() if prompt == "-" else prompt
    _check_encodable(text, "PROMPT")
    turns = [ChatTurn(role="system", content=system)] if system else []
    turns.append(ChatTurn(role="user", content=text))
    sampling = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=tuple(stop or ()),
        max_tokens=max_tokens,
        ignore_eos=ignore_eos,
    )
    where = resolve_addresses(address, cluster)

    async def run() -> None:
        from loraserve.client import Client

        async with Client(where, timeout_s=timeout) as client:
            stream = client.generate(tuple(turns) if chat else text, adapter=adapter, sampling=sampling)
            answer = await _show(stream, quiet=json_output)
        if json_output:
            echo_json({"adapter": adapter, **answer})

    run_async(run)


async def _show(stream: "GenerationStream", *, quiet: bool) -> dict[str, Any]:
    """Read the whole answer, print its text as it comes unless `quiet`, and sum it up."""
    from loraserve.clock import WallClock

    clock = WallClock()
    start_s = clock.now_s()
    first_s: float | None = None
    steps: list[GenerationStep] = []
    async for step in stream:
        if first_s is None and step.token_ids:
            first_s = clock.now_s()
        steps.append(step)
        if not quiet:
            print(step.text, end="", flush=True)
    if not quiet:
        print(flush=True)
    last = steps[-1] if steps else None
    return {
        "adapter_version": stream.adapter_version,
        "request_id": stream.request_id,
        "text": "".join(step.text for step in steps),
        "token_ids": [token_id for step in steps for token_id in step.token_ids],
        "finish_reason": last.finish_reason if last else None,
        "stop_reason": last.stop_reason if last else None,
        "prompt_tokens": last.prompt_tokens if last else 0,
        "output_tokens": last.output_tokens if last else 0,
        "ttft_ms": None if first_s is None else (first_s - start_s) * 1e3,
        "e2e_ms": (clock.now_s() - start_s) * 1e3,
        "replica": stream.served_by.replica,
        "table_version": stream.served_by.table_version,
        "reason": stream.served_by.reason,
        "attempts": stream.attempts,
        "resumed": stream.resumed,
    }


def _check_encodable(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInputError(f"{what}: not valid UTF-8 at character {error.start}") from error
