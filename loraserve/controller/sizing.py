"""The engine sizes that a replica starts with, where the configuration leaves them to be chosen."""

import logging
from collections.abc import Collection

import msgspec

from loraserve.adapters import BaseModel
from loraserve.config import Config, EngineSection
from placement.engine_sizes import AdapterSize, SizeInputs, choose_sizes
from placement.types import AdapterVersion

logger = logging.getLogger(__name__)


def sized(config: Config, base: BaseModel | None, adapters: Collection[AdapterVersion]) -> Config:
    """The configuration for a replica that starts now: nothing in it is left to be chosen.

    `adapters` are those registered. Without a base model slots cost nothing that is known.
    """
    engine = config.engine
    if not engine.auto:
        return config
    sizes = choose_sizes(_inputs(engine, config.model.dtype, base, adapters))
    logger.info(
        "a replica starts with max_lora_rank %d, %d slots, a pool of %d: %s",
        sizes.max_lora_rank,
        sizes.adapter_slots,
        sizes.pool_adapters,
        sizes.reason,
    )
    chosen = msgspec.structs.replace(
        engine,
        max_lora_rank=sizes.max_lora_rank,
        adapter_slots=sizes.adapter_slots,
        pool_adapters=sizes.pool_adapters,
        auto=[],
    )
    return msgspec.structs.replace(config, engine=chosen)


def _inputs(
    engine: EngineSection, dtype: str, base: BaseModel | None, adapters: Collection[AdapterVersion]
) -> SizeInputs:
    """On GPUs slots are vLLM's stacked tensors, one size for all; with tensor parallelism every GPU has a
    part of them, and what one rank costs is then more than it takes."""
    on_cpu = engine.gpus_per_replica == 0
    is_stock = engine.lora_execution == "stock"
    # vLLM turns float32 checkpoints into 16 bits unless it is told not to.
    dtype_bytes = 4 if dtype == "float32" else 2
    # Our own execution makes no room for vocabularies, which no registered adapter changes.
    values_per_rank = 0 if base is None else base.lora_values_per_rank(with_vocabulary=is_stock)
    return SizeInputs(
        adapters=[AdapterSize(rank=one.rank, size_bytes=one.size_bytes) for one in adapters],
        bytes_per_rank=values_per_rank * dtype_bytes,
        slot_bytes=engine.slot_bytes,
        pool_bytes=engine.pool_bytes,
        max_num_seqs=engine.max_num_seqs,
        is_padded=engine.lora_execution != "rank-true" or not on_cpu,
        # The one that base-model rows read.
        num_spare_slots=1 if is_stock and on_cpu else 0,
        max_lora_rank=None if "max_lora_rank" in engine.auto else engine.max_lora_rank,
        adapter_slots=None if "adapter_slots" in engine.auto else engine.adapter_slots,
        pool_adapters=engine.pool_adapters or None,
    )
