"""The replica model takes the steps that vLLM's own scheduler takes, token by token."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from loraserve.engines.replica_model.model import ReplicaModel
from loraserve.engines.replica_model.sequence import ReplicaLimits, Sequence
from loraserve.samples import SampleSet
from placement.latency import LatencyModel, StepCost
from placement.types import VersionId
from tests.support.reference_replica import Reference, Request
from tests.support.replica_logs import step_ends, token_times

pytestmark = pytest.mark.vllm

COST = StepCost.of(
    LatencyModel(
        base_ms=5.0,
        row_ms=0.1,
        prefill_token_ms=0.05,
        prefill_pair_ms=1e-5,
        context_token_ms=1e-3,
        adapter_ms=0.2,
        decode_rank_ms=2e-3,
    )
)
BLOCK_TOKENS = 16
ADAPTERS = {"low": 8, "high": 64}


class VllmScheduled(Reference):
    """The plain reference with vLLM's scheduler deciding what each step computes."""

    def __init__(self, limits: ReplicaLimits, cost: StepCost, scheduler: Any) -> None:
        super().__init__(limits, cost)
        self.scheduler = scheduler
        self.known: dict[str, Request] = {}

    def schedule(self) -> list[tuple[Request, int]]:
        for one in self.waiting:
            if str(one.number) not in self.known:
                self.known[str(one.number)] = one
                self.scheduler.add_request(vllm_request(one))
        output = self.scheduler.schedule()
        self.output = output
        for name in output.preempted_req_ids or ():
            self.preemptions += 1
            self.known[name].decoding = False
        cached = {one.req_id: one.num_computed_tokens for one in output.scheduled_new_reqs}
        cached |= dict(
            zip(
                output.scheduled_cached_reqs.req_ids,
                output.scheduled_cached_reqs.num_computed_tokens,
                strict=True,
            )
        )
        chunks = []
        for name, tokens in output.num_scheduled_tokens.items():
            one = self.known[name]
            one.computed = cached[name]
            chunks.append((one, tokens))
        return chunks

    def finish(self, chunks: list[tuple[Request, int]], now_ps: int) -> None:
        from vllm.v1.outputs import ModelRunnerOutput

        names, sampled = [], []
        for one, tokens in chunks:
            # What was drawn is no part of the prompt: a prompt's own blocks are never found in it.
            is_drawn = one.computed + tokens == one.known
            names.append(str(one.number))
            sampled.append([30_000 + one.number] if is_drawn else [])
            if is_drawn:
                one.token_ps.append(now_ps)
                one.decoding = True
        places = {name: place for place, name in enumerate(names)}
        self.scheduler.update_from_output(
            self.output, ModelRunnerOutput(req_ids=names, req_id_to_index=places, sampled_token_ids=sampled)
        )
        self.waiting = [one for one in self.known.values() if not one.token_ps]
        self.running = [one for one in self.known.values() if 0 < len(one.token_ps) < one.output_tokens]


def prompt_ids(one: Request) -> list[int]:
    """Prompts of one family begin alike, block by block as their names say."""
    ids = [1000 + name for name in one.names for _ in range(BLOCK_TOKENS)]
    if not one.names:
        ids = [one.number + 1] * one.prompt_tokens
    return ids[: one.prompt_tokens]


def vllm_request(one: Request) -> Any:
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher
    from vllm.v1.request import Request as VllmRequest

    sampling = SamplingParams(max_tokens=one.output_tokens, ignore_eos=True)
    lora = None
    if one.adapter is not None:
        lora = LoRARequest(one.adapter, list(ADAPTERS).index(one.adapter) + 1, "nowhere")
    return VllmRequest(
        request_id=str(one.number),
        prompt_token_ids=prompt_ids(one),
        sampling_params=sampling,
        pooling_params=None,
        lora_request=lora,
        block_hasher=get_request_block_hasher(BLOCK_TOKENS, sha256),
    )


@pytest.fixture
def make_scheduler(samples: SampleSet) -> Callable[[ReplicaLimits, bool], Any]:
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import init_none_hash
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    init_none_hash(sha256)

    def make(limits: ReplicaLimits, has_names: bool) -> Any:
        config = EngineArgs(
            model=str(samples.model),
            max_model_len=512,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            block_size=BLOCK_TOKENS,
            enable_prefix_caching=has_names,
            async_scheduling=False,
            enable_lora=True,
            max_loras=len(ADAPTERS),
            max_lora_rank=max(ADAPTERS.values()),
        ).create_engine_config()
        # One block more: vLLM keeps one for padding.
        config.cache_config.num_gpu_blocks = limits.kv_blocks + 1
        spec = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=1, dtype=torch.float32)
        return Scheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=limits.kv_blocks + 1,
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
            ),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_TOKENS,
        )

    return make


def random_requests(rng: random.Random, *, has_names: bool) -> list[Request]:
    requests, at_ps = [], 0
    for number in range(60):
        at_ps += rng.choice((0, 0, 3, 20, 120)) * 10**9
        prompt_tokens = rng.randint(1, 200)
        family = rng.randint(0, 3) * 100
        names = tuple(family + place for place in range(-(-prompt_tokens // BLOCK_TOKENS)))
        adapter = rng.choice([None, *ADAPTERS])
        requests.append(
            Request(
                number=number,
                at_ps=at_ps,
                prompt_tokens=prompt_tokens,
                output_tokens=rng.randint(1, 80),
                rank=0 if adapter is None else ADAPTERS[adapter],
                adapter=adapter,
                names=names if has_names else (),
            )
        )
    return requests


@pytest.mark.parametrize("has_names", [False, True], ids=["no-prefix-cache", "prefix-cache"])
@pytest.mark.parametrize(("seed", "kv_blocks", "budget"), [(1, 1000, 256), (2, 40, 64), (3, 30, 200)])
def test_the_model_schedules_as_vllm_does(
    make_scheduler: Callable[[ReplicaLimits, bool], Any],
    seed: int,
    kv_blocks: int,
    budget: int,
    has_names: bool,
) -> None:
    limits = ReplicaLimits(
        kv_blocks=kv_blocks,
        block_tokens=BLOCK_TOKENS,
        hash_block_tokens=BLOCK_TOKENS,
        max_num_seqs=8,
        max_num_batched_tokens=budget,
    )
    requests = random_requests(random.Random(seed), has_names=has_names)
    model = ReplicaModel(limits, COST)
    for name, rank in ADAPTERS.items():
        model.hold(VersionId(name), rank, 1000, 0)
    for one in requests:
        version = None if one.adapter is None else VersionId(one.adapter)
        model.submit(
            Sequence(one.number, one.prompt_tokens, one.output_tokens, one.rank, version, one.names),
            one.at_ps,
        )
    model.advance(10**18)
    vllm = VllmScheduled(limits, COST, make_scheduler(limits, has_names))
    vllm.run(list(requests))
    assert step_ends(model.log) == vllm.steps
    assert token_times(model.log) == {one.number: one.token_ps for one in requests}
    assert model.batch.preemptions == vllm.preemptions
    assert (vllm.preemptions > 0) == (kv_blocks < 100), "the tight cases are there to preempt"
