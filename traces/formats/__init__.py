"""The trace formats: one file each, and one line in this table."""

from traces.formats.azure import AZURE
from traces.formats.base import TraceFormat
from traces.formats.burstgpt import BURSTGPT
from traces.formats.mooncake import MOONCAKE
from traces.formats.slora import SLORA

FORMATS: dict[str, TraceFormat] = {
    "azure": AZURE,
    "burstgpt": BURSTGPT,
    "mooncake": MOONCAKE,
    "slora": SLORA,
}
