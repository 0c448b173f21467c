"""Measures how often greedy output that is resumed in vLLM differs from the uninterrupted output.

A resumed request computes in one prefill what decoding computed step by step, and in another batch. Sums
of floating-point numbers depend on their order, so the likeliest token may change where two are close.
For each number format one engine runs every prompt, on the base model and on adapters: once, once more
(that is what another batch alone changes), and resumed after each cut; up to 16 requests at a time.

  resumed_<format>            resumed outputs
  mismatch_<format>           share of them whose tokens differ from the uninterrupted output's
  repeat_mismatch_<format>    share of the outputs that differ when the request is just sent again
  tokens_to_mismatch_<format> median number of new tokens up to the first that differs
  text_mismatch_<format>      outputs whose tokens agree and whose text does not: 0 or a bug
"""

import argparse
import asyncio
import dataclasses
import json
import logging
import os
import random
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import bench_common as common

from loraserve.config import EngineSection, ModelSection
from loraserve.engines.base import AdapterFiles
from loraserve.engines.vllm import VllmEngine
from loraserve.request import GenerationRequest, SamplingParams
from loraserve.samples import build_samples
from placement.types import VersionId

FORMATS = ("float32", "bfloat16")
RANKS = (8, 128)
CUTS = (1 / 64, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 63 / 64)
CONCURRENT = 16
MAX_MODEL_LEN_TOKENS = 1024
PROMPT_WORDS = (4, 60)
WORDS = (
    "the a boat left harbour before morning market was full of people who wanted to buy water and bread "
    "computer counts numbers every night while rain falls on old roofs river runs slowly through town"
)


@dataclass(frozen=True, slots=True)
class Output:
    """One request's whole output, with the tokens and the text after every step."""

    token_ids: tuple[int, ...]
    text: str
    text_after: dict[int, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A resumed output beside the uninterrupted one; `first_difference` counts new tokens from 0."""

    first_difference: int | None
    same_text: bool


class Requests:
    """Runs requests on an engine, a bounded number at a time."""

    def __init__(self, engine: VllmEngine) -> None:
        self._engine = engine
        self._slots = asyncio.Semaphore(CONCURRENT)
        self._number = 0

    async def run(self, asked: GenerationRequest, resumed: tuple[int, ...] = ()) -> Output:
        """The request's output after `resumed`."""
        async with self._slots:
            self._number += 1
            name = f"request-{self._number}"
            request = dataclasses.replace(asked, request_id=name, resumed_token_ids=resumed)
            token_ids: list[int] = []
            text = ""
            text_after = {0: ""}
            async for step in self._engine.generate(request):
                token_ids += step.token_ids
                text += step.text
                text_after[len(token_ids)] = text
            return Output(tuple(token_ids), text, text_after)

    async def all(self, jobs: Iterable[tuple[GenerationRequest, tuple[int, ...]]]) -> list[Output]:
        """Several outputs, in order."""
        return await asyncio.gather(*(self.run(asked, resumed) for asked, resumed in jobs))


def prompts(count: int, seed: int) -> list[str]:
    """Texts of different lengths."""
    drawn = random.Random(seed)
    words = WORDS.split()
    return [" ".join(drawn.choices(words, k=drawn.randint(*PROMPT_WORDS))) for _ in range(count)]


def cut_points(output: Output) -> list[int]:
    """Steps of the output after which it is resumed: a few, over all of its length."""
    ends = sorted(output.text_after)[1:-1]
    wanted = [share * len(output.token_ids) for share in CUTS] if ends else []
    return sorted({min(ends, key=lambda end: abs(end - at)) for at in wanted})


def compare(whole: Output, cut: int, rest: Output) -> Comparison:
    """What came after the cut beside what had come there."""
    expected = whole.token_ids[cut:]
    pairs = zip(expected, rest.token_ids, strict=False)
    first = next((at for at, (one, other) in enumerate(pairs) if one != other), None)
    if first is None and expected != rest.token_ids:
        first = min(len(expected), len(rest.token_ids))
    return Comparison(first_difference=first, same_text=whole.text_after[cut] + rest.text == whole.text)


@asynccontextmanager
async def started(model: Path, adapters: dict[str, Path], dtype: str) -> Any:
    """An engine with the adapters loaded."""
    engine = VllmEngine(
        ModelSection(path=str(model), dtype=dtype),  # type: ignore[arg-type]
        EngineSection(
            adapter_slots=max(1, len(adapters)),
            max_num_seqs=CONCURRENT,
            max_model_len_tokens=MAX_MODEL_LEN_TOKENS,
        ),
    )
    try:
        await engine.start()
        for name, directory in adapters.items():
            rank = int(name.removeprefix("rank-"))
            await engine.load_adapter(
                AdapterFiles(version_id=VersionId(name), directory=directory, rank=rank, size_bytes=1)
            )
        yield engine
    finally:
        await engine.close()


async def measure(
    model: Path, adapters: dict[str, Path], dtype: str, texts: Sequence[str], max_tokens: int
) -> dict[str, float | None]:
    """The figures of one number format."""
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    asked = [
        GenerationRequest(
            request_id="", prompt=text, version_id=VersionId(name) if name else None, sampling=sampling
        )
        for text in texts
        for name in ("", *adapters)
    ]
    async with started(model, adapters, dtype) as engine:
        requests = Requests(engine)
        wholes = await requests.all((one, ()) for one in asked)
        repeats = await requests.all((one, ()) for one in asked)
        cuts = [
            (one, whole, cut) for one, whole in zip(asked, wholes, strict=True) for cut in cut_points(whole)
        ]
        rests = await requests.all((one, whole.token_ids[:cut]) for one, whole, cut in cuts)
    found = [compare(whole, cut, rest) for (_, whole, cut), rest in zip(cuts, rests, strict=True)]
    differ = [one.first_difference for one in found if one.first_difference is not None]
    again = [whole.token_ids != repeat.token_ids for whole, repeat in zip(wholes, repeats, strict=True)]
    return {
        f"resumed_{dtype}": len(found),
        f"mismatch_{dtype}": len(differ) / len(found),
        f"repeat_mismatch_{dtype}": sum(again) / len(again),
        f"tokens_to_mismatch_{dtype}": median(differ) if differ else None,
        f"text_mismatch_{dtype}": sum(one.first_difference is None and not one.same_text for one in found),
    }


async def measure_all(options: argparse.Namespace) -> dict[str, float | None]:
    """One engine after the other."""
    texts = prompts(options.prompts, options.seed)
    found: dict[str, float | None] = {}
    with tempfile.TemporaryDirectory(prefix="resume-") as folder:
        if options.model:
            model, adapters = Path(options.model), {}
        else:
            samples = build_samples(Path(folder) / "samples", ranks=RANKS)
            model, adapters = samples.model, dict(samples.adapters)
        for dtype in FORMATS:
            found |= await measure(model, adapters, dtype, texts, options.max_tokens)
    return found


def conditions(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures hold for."""
    import vllm

    return common.conditions(
        "resume",
        vllm=vllm.__version__,
        model=Path(options.model).name if options.model else "sample",
        prompts=options.prompts,
        max_tokens=options.max_tokens,
        seed=options.seed,
    )


def print_table(found: dict[str, float | None], told: dict[str, Any]) -> None:
    """One line per figure, then what they hold for."""
    for name, value in found.items():
        print(f"{name:32} {'-' if value is None else f'{value:g}'}")
    print("\n" + ", ".join(f"{name} {value}" for name, value in told.items()))


def main() -> int:
    """Measure and print."""
    parser = common.parser("resume", __doc__, quick="a few prompts, to see that it works")
    parser.add_argument(
        "--prompts", type=int, default=16, help="texts, each on the base model and adapters (16)"
    )
    parser.add_argument("--max-tokens", type=int, default=64, help="length of each output (64)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (0)")
    parser.add_argument("--model", help="another base model's folder, without adapters")
    options = parser.parse_args()
    if options.quick:
        options.prompts, options.max_tokens = 4, 32
    if options.prompts < 1 or not 2 <= options.max_tokens <= MAX_MODEL_LEN_TOKENS // 2:
        parser.error(f"expected --prompts of at least 1 and --max-tokens of 2 to {MAX_MODEL_LEN_TOKENS // 2}")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.disable(logging.WARNING)
    found = asyncio.run(measure_all(options))
    told = conditions(options)
    if options.json:
        print(json.dumps({**found, **told}))
    else:
        print_table(found, told)
    return 0


if __name__ == "__main__":
    sys.exit(main())
