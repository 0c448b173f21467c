"""What must hold of the GPU wrapper, on any device that its kernels run on. Needs torch, Triton and vLLM."""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.config.lora import LoRAConfig
from vllm.lora.layers import LoRAMapping

from loraserve.engines.vllm_lora.cuda import RankTrueCudaWrapper
from loraserve.engines.vllm_lora.cuda_slots import readable_rank

MAX_RANK, SLOTS, IN = 32, 3, 48
SLICES = (32, 16, 16)
# Slot by slot; the ids that vLLM knows the adapters by.
IDS: list[int | None] = [11, None, 22]
RANKS = (32, 0, 5)
TOKENS = (22, 0, 11, 11, 22, 0)


def make_wrapper(device: str) -> RankTrueCudaWrapper:
    """A wrapper for three slots, with adapters in the first and the last."""
    config = LoRAConfig(max_lora_rank=MAX_RANK, max_loras=SLOTS, lora_dtype=torch.float16)
    wrapper = RankTrueCudaWrapper(64, 8, device, lora_config=config)
    for slot, rank in enumerate(RANKS):
        wrapper.set_slot_rank(slot, rank)
    return wrapper


def use(wrapper: RankTrueCudaWrapper, tokens: Sequence[int], sampled: Sequence[int] = ()) -> None:
    """Say which adapter id each token and each sampled token has."""
    mapping = LoRAMapping(tuple(tokens), tuple(sampled or tokens), is_prefill=True)
    wrapper.update_metadata(mapping, IDS, SLOTS + 1, 100)


def weights(outs: Sequence[int], device: str) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """A and B per slice, NaN wherever the kernels have no business."""
    generator = torch.Generator().manual_seed(0)
    a = tuple(torch.full((SLOTS, 1, MAX_RANK, IN), float("nan")) for _ in outs)
    b = tuple(torch.full((SLOTS, 1, out, MAX_RANK), float("nan")) for out in outs)
    for slot, rank in enumerate(RANKS):
        readable = readable_rank(rank, MAX_RANK)
        for left, right in zip(a, b, strict=True):
            left[slot, 0, :readable], right[slot, 0, :, :readable] = 0.0, 0.0
            left[slot, 0, :rank] = torch.randn(rank, IN, generator=generator) / IN**0.5
            right[slot, 0, :, :rank] = torch.randn(right.shape[2], rank, generator=generator) / 4
    return tuple(t.to(device, torch.float16) for t in a), tuple(t.to(device, torch.float16) for t in b)


def wanted(
    tokens: Sequence[int], base: torch.Tensor, inputs: torch.Tensor, a: Any, b: Any, ranks: Sequence[int]
) -> torch.Tensor:
    """`base` plus what each row's adapter adds, in float32 on the CPU."""
    result = base.float().cpu().clone()
    for row, lora_id in enumerate(tokens):
        if lora_id:
            slot = IDS.index(lora_id)
            rank = ranks[slot]
            parts = [
                inputs[row].float().cpu()
                @ left[slot, 0, :rank].float().cpu().T
                @ right[slot, 0, :, :rank].float().cpu().T
                for left, right in zip(a, b, strict=True)
            ]
            result[row] += torch.cat(parts)
    return result


def close(output: torch.Tensor, expected: torch.Tensor) -> None:
    """In half precision."""
    torch.testing.assert_close(output.float().cpu(), expected, rtol=2e-2, atol=2e-2)


def random_rows(num_rows: int, columns: int, device: str, seed: int = 1) -> torch.Tensor:
    """Half-precision rows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, columns, generator=generator).to(device, torch.float16)


def linear_layers(wrapper: RankTrueCudaWrapper, device: str) -> None:
    """Every slice of a merged layer, added to the base model's output; then as two steps, then alone."""
    a, b = weights(SLICES, device)
    inputs, base = random_rows(len(TOKENS), IN, device), random_rows(len(TOKENS), sum(SLICES), device, 2)
    use(wrapper, TOKENS)
    expected = wanted(TOKENS, base, inputs, a, b, RANKS)
    output = base.clone()
    wrapper.add_lora_linear(output, inputs, a, b, 1.0, SLICES)
    close(output, expected)
    assert not torch.equal(output, base)
    assert torch.equal(output[[1, 5]], base[[1, 5]])

    buffer = torch.full((len(SLICES), len(TOKENS), MAX_RANK), float("nan"), device=device)
    output = base.clone()
    wrapper.add_shrink(buffer, inputs, a, 1.0)
    wrapper.add_expand(output, buffer, b, SLICES)
    close(output, expected)

    output = torch.zeros_like(base)
    wrapper.add_lora_linear(output, inputs, a, b, 1.0, SLICES, add_inputs=False)
    close(output, wanted(TOKENS, torch.zeros_like(base), inputs, a, b, RANKS))


def expand_at_an_offset(wrapper: RankTrueCudaWrapper, device: str) -> None:
    """A worker that holds part of the output columns writes there and nowhere else."""
    a, b = weights((16,), device)
    inputs, base = random_rows(len(TOKENS), IN, device), random_rows(len(TOKENS), 48, device, 2)
    use(wrapper, TOKENS)
    buffer = torch.zeros(1, len(TOKENS), MAX_RANK, device=device)
    wrapper.add_shrink(buffer, inputs, a, 1.0)
    output = base.clone()
    wrapper.add_expand(output, buffer, b, (16,), offset_start=32)
    close(output[:, 32:], wanted(TOKENS, base[:, 32:], inputs, a, b, RANKS))
    assert torch.equal(output[:, :32], base[:, :32])


def embeddings(wrapper: RankTrueCudaWrapper, device: str) -> None:
    """vLLM looks up rows of A at the full width; what is above the rank is not used."""
    _, (b,) = weights((16,), device)
    rows, base = random_rows(len(TOKENS), MAX_RANK, device), random_rows(len(TOKENS), 16, device, 2)
    use(wrapper, TOKENS)
    expected = base.float().cpu()
    for row, lora_id in enumerate(TOKENS):
        if lora_id:
            slot = IDS.index(lora_id)
            rank = RANKS[slot]
            expected[row] += rows[row, :rank].float().cpu() @ b[slot, 0, :, :rank].float().cpu().T
            rows[row, readable_rank(rank, MAX_RANK) :] = float("nan")
    output = base.clone()
    wrapper.add_lora_embedding(output, rows, b)
    close(output, expected)


def logits(wrapper: RankTrueCudaWrapper, device: str) -> None:
    """One row per sampled token, in float32 where the head is."""
    (a,), (b,) = weights((40,), device)
    sampled = (11, 0, 22)
    use(wrapper, TOKENS, sampled)
    inputs, base = random_rows(3, IN, device), random_rows(3, 40, device, 2).float()
    output = base.clone()
    wrapper.add_lora_logits(output, inputs, a, b, 1.0)
    close(output, wanted(sampled, base, inputs, (a,), (b,), RANKS))
    assert torch.equal(output[1], base[1])


def base_model_alone(wrapper: RankTrueCudaWrapper, device: str) -> None:
    """Without an adapter in the batch nothing runs."""
    a, b = weights(SLICES, device)
    base = random_rows(2, sum(SLICES), device, 2)
    output = base.clone()
    use(wrapper, (0, 0))
    wrapper.add_lora_linear(output, random_rows(2, IN, device), a, b, 1.0, SLICES)
    assert torch.equal(output, base)


def ranks_between_steps(wrapper: RankTrueCudaWrapper, device: str) -> None:
    """A rank set after the batch was described holds for its next launch; a slot set to 0 is left out."""
    a, b = weights((16,), device)
    inputs, base = random_rows(2, IN, device), random_rows(2, 16, device, 2)
    use(wrapper, (11, 22))
    for ranks in ((8, 0, 5), (32, 0, 5), (0, 0, 5), (32, 0, 0)):
        for slot, rank in enumerate(ranks):
            wrapper.set_slot_rank(slot, rank)
        output = base.clone()
        wrapper.add_lora_linear(output, inputs, a, b, 1.0, (16,))
        close(output, wanted((11, 22), base, inputs, a, b, ranks))
    for rank in (-1, MAX_RANK + 1):
        try:
            wrapper.set_slot_rank(0, rank)
        except ValueError:
            continue
        raise AssertionError(f"rank {rank} was taken")


def traced_as_one_operator(wrapper: RankTrueCudaWrapper, device: str) -> None:
    """torch.compile takes the layer whole, and a graph made for one batch serves the next."""
    a, b = weights(SLICES, device)

    def layer(base: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        output = base.clone()
        wrapper.add_lora_linear(output, inputs, a, b, 1.0, SLICES)
        return output * 2

    compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for tokens in ((22, 0, 22), (11, 22, 0)):
        use(wrapper, tokens)
        inputs, base = random_rows(3, IN, device), random_rows(3, sum(SLICES), device, 2)
        close(compiled(base, inputs) / 2, wanted(tokens, base, inputs, a, b, RANKS))


WRAPPER_CHECKS = (
    linear_layers,
    expand_at_an_offset,
    embeddings,
    logits,
    base_model_alone,
    ranks_between_steps,
    traced_as_one_operator,
)
