"""Every adapter answers as it does in vLLM alone, whatever else is in the batch."""

import asyncio
import random
from collections.abc import Mapping, Sequence

import pytest

from tests.support.vllm_bench import PROMPTS, Bench

pytestmark = pytest.mark.asyncio(loop_scope="session")


NAMES = ("", "rank-8", "rank-16", "rank-32", "rank-64", "rank-128")
References = Mapping[str, Sequence[list[int]]]


async def mixed_batch(bench: Bench, order: Sequence[str]) -> dict[str, list[list[int]]]:
    """All prompts with the base model and all adapters, sent together in this order of adapters."""
    pairs = [(name, prompt) for prompt in PROMPTS for name in order]
    answers = await asyncio.gather(*(bench.ask(prompt, name or None) for name, prompt in pairs))
    found: dict[str, list[list[int]]] = {name: [] for name in order}
    for (name, _), answer in zip(pairs, answers, strict=True):
        found[name].append(answer.token_ids)
    return found


async def test_the_references_differ_so_that_a_mix_up_would_show(references: References) -> None:
    for number in range(len(references[""])):
        answers = [tuple(references[name][number]) for name in NAMES]
        assert len(set(answers)) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
async def test_one_adapter_at_a_time(bench: Bench, references: References, name: str) -> None:
    for prompt, expected in zip(PROMPTS, references[name], strict=True):
        assert (await bench.ask(prompt, name or None)).token_ids == expected


async def test_mixed_batches_with_every_slot_taken(bench: Bench, references: References) -> None:
    for seed in range(3):
        order = random.Random(seed).sample(NAMES, len(NAMES))
        assert await mixed_batch(bench, order) == references


async def test_mixed_batches_after_adapters_have_changed_their_slots(
    bench: Bench, references: References
) -> None:
    adapters = [name for name in NAMES if name]
    for seed in range(4):
        chosen = random.Random(seed).sample(adapters, 2 + seed)
        for name in chosen:
            await bench.engine.unload_adapter(bench.versions[name])
        for name in reversed(chosen):
            await bench.engine.load_adapter(bench.files(name))
        assert await mixed_batch(bench, NAMES) == references


async def test_a_slot_is_clean_for_the_next_adapter(bench: Bench, references: References) -> None:
    """Few slots taken: base rows beside one adapter, with the weights of gone adapters in the free slots."""
    adapters = [name for name in NAMES if name]
    for name in adapters[1:]:
        await bench.engine.unload_adapter(bench.versions[name])
    try:
        found = await mixed_batch(bench, ("", "rank-8"))
    finally:
        for name in adapters[1:]:
            await bench.engine.load_adapter(bench.files(name))
    assert found == {name: references[name] for name in ("", "rank-8")}
