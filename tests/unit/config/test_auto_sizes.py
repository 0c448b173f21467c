"""Sizes that the configuration leaves to the start of a replica."""

from typing import get_args

from loraserve.config import LoraRank, config_tree, parse_config
from placement.engine_sizes import RANK_STEPS


def test_auto_is_kept_beside_the_default_until_a_replica_starts() -> None:
    config = parse_config({"engine": {"max_lora_rank": "auto", "adapter_slots": "auto"}})
    assert config.engine.auto == ["max_lora_rank", "adapter_slots"]
    assert (config.engine.max_lora_rank, config.engine.adapter_slots) == (128, 8)
    assert parse_config(config_tree(config)) == config
    one = parse_config({"engine": {"max_lora_rank": 64, "adapter_slots": "auto"}})
    assert (one.engine.auto, one.engine.max_lora_rank) == (["adapter_slots"], 64)


def test_the_rule_knows_the_ranks_that_the_configuration_allows() -> None:
    assert get_args(LoraRank) == RANK_STEPS
