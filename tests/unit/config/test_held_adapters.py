"""How many adapters a replica may hold, by its configuration."""

import pytest

from loraserve.config import parse_config
from placement.engine_sizes import MAX_POOL_ADAPTERS


@pytest.mark.parametrize(
    ("engine", "held"),
    [
        ({}, MAX_POOL_ADAPTERS),
        ({"pool_adapters": 20}, 20),
        ({"pool_adapters": 3, "adapter_slots": 8}, 3),
        ({"lora_execution": "padded", "pool_adapters": 20}, 20),
        ({"lora_execution": "stock"}, 8),
        ({"lora_execution": "stock", "pool_adapters": 3}, 3),
        ({"lora_execution": "off", "pool_adapters": 3}, 0),
    ],
)
def test_stock_execution_holds_no_more_than_its_slots(engine: dict[str, object], held: int) -> None:
    assert parse_config({"engine": engine}).engine.max_held_adapters == held
