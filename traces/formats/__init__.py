"""The trace formats: one file each, and one line in this table. Parquet, which has no lines, is read by
`traces.files.parquet`."""

from traces.formats.azure import AZURE
from traces.formats.base import TraceFormat
from traces.formats.burstgpt import BURSTGPT
from traces.formats.functions import FUNCTIONS_2019, FUNCTIONS_2021
from traces.formats.genai import GENAI
from traces.formats.mooncake import MOONCAKE, QWEN
from traces.formats.servegen import SERVEGEN
from traces.formats.slora import SLORA
from traces.formats.toppings import TOPPINGS
from traces.formats.vidur import VIDUR

FORMATS: dict[str, TraceFormat] = {
    known.name: known
    for known in (
        AZURE,
        BURSTGPT,
        MOONCAKE,
        SLORA,
        QWEN,
        VIDUR,
        FUNCTIONS_2019,
        FUNCTIONS_2021,
        SERVEGEN,
        TOPPINGS,
        GENAI,
    )
}
