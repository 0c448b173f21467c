"""What the CPU execution does with a layer that is not as its adapters are: another type, too few rows."""

from types import SimpleNamespace
from typing import Any

import pytest

from loraserve.engines.vllm_lora import few_rows

WIDTH, OUTPUTS = 33, 20
ROWS = (5, 5, 0, 6, 5)


@pytest.fixture(scope="module", params=[True, False], ids=["compiled", "torch alone"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the engine is told about the kernel."""
    if not request.param:
        return ""
    try:
        return str(few_rows.build(tmp_path_factory.mktemp("kernels")))
    except few_rows.BuildError as error:
        pytest.skip(f"no kernel here: {error}")


def layer_of(library: str, dtype: Any) -> tuple[Any, Any]:
    """A layer whose only adapter, 5, is of this type, and B·A of it in float64."""
    import torch

    from loraserve.engines.vllm_lora.cpu import CpuStep, LayerExecution, prepare_layer
    from loraserve.engines.vllm_lora.weights import SliceSource

    generator = torch.Generator().manual_seed(0)
    source = SliceSource(
        a=torch.randn(4, WIDTH, generator=generator),
        b=torch.randn(OUTPUTS, 4, generator=generator),
        scaling=1.0,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(few_rows.LIBRARY, library)
        step = CpuStep(dtype)
    layer = LayerExecution(step, num_slots=2)
    layer.fill(1, prepare_layer((source,), (OUTPUTS,), dtype))
    step.update_metadata(SimpleNamespace(index_mapping=ROWS), [6, 5])
    return layer, source.b.double() @ source.a.double()


@pytest.mark.parametrize(
    ("dtype", "x_dtype", "y_dtype"),
    [
        ("bfloat16", "bfloat16", "float32"),
        ("bfloat16", "float32", "float32"),
        ("float32", "bfloat16", "bfloat16"),
    ],
)
def test_a_layer_of_another_type_is_computed_and_not_misread(
    library: str, dtype: str, x_dtype: str, y_dtype: str
) -> None:
    import torch

    layer, product = layer_of(library, getattr(torch, dtype))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(ROWS), WIDTH, generator=generator).to(getattr(torch, x_dtype))
    y = torch.randn(len(ROWS), OUTPUTS, generator=generator).to(getattr(torch, y_dtype))
    expected = y.double()
    rows = torch.tensor([adapter == 5 for adapter in ROWS])
    expected[rows] += x[rows].double() @ product.t()
    layer.add_lora_linear(y, x)
    torch.testing.assert_close(y.double(), expected, rtol=0.02, atol=0.3)


def test_fewer_rows_than_the_step_has_are_an_error_and_no_write_beyond_them(library: str) -> None:
    import torch

    layer, _ = layer_of(library, torch.float32)
    memory = torch.zeros(len(ROWS), OUTPUTS)
    with pytest.raises(RuntimeError, match="LoRA for 5 rows in a layer that has 4"):
        layer.add_lora_linear(memory[:-1], torch.ones(len(ROWS) - 1, WIDTH))
    assert not memory.any()
    # Padding beyond the step's rows is what vLLM adds: it stays as it is.
    padded = torch.zeros(len(ROWS) + 3, OUTPUTS)
    layer.add_lora_linear(padded, torch.ones(len(ROWS) + 3, WIDTH))
    assert padded[0].any()
    assert not padded[len(ROWS) :].any()
