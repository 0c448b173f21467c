"""Workloads of LoRAServe: trace formats, adapter and rank assignment, pacing, metrics, reports.

`traces.synthesis` (workloads by law or preset) and `traces.report` (HTML and plots) are imported by
their own names.
"""

from traces.assign import AdapterRef, assign_adapters, map_adapters, unknown_adapters
from traces.columns import TraceAdapter, TraceColumns, columns_of, trace_of
from traces.fill import Fill
from traces.metrics import GroupSummary, Slo, Summary, formulas, summarise
from traces.pacing import PacingStats, pacing_stats, schedule
from traces.quantiles import Distribution, percentile
from traces.read import bundled_trace, read_columns, read_trace
from traces.records import Outcome, RequestRecord, read_records, write_records
from traces.summary_json import summary_to_json
from traces.types import BadRow, Trace, TraceError, TraceRequest
from traces.write import write_columns, write_trace

__version__ = "0.1.0"

__all__ = [
    "AdapterRef",
    "BadRow",
    "Distribution",
    "Fill",
    "GroupSummary",
    "Outcome",
    "PacingStats",
    "RequestRecord",
    "Slo",
    "Summary",
    "Trace",
    "TraceAdapter",
    "TraceColumns",
    "TraceError",
    "TraceRequest",
    "assign_adapters",
    "bundled_trace",
    "columns_of",
    "formulas",
    "map_adapters",
    "pacing_stats",
    "percentile",
    "read_columns",
    "read_records",
    "read_trace",
    "schedule",
    "summarise",
    "summary_to_json",
    "trace_of",
    "unknown_adapters",
    "write_columns",
    "write_records",
    "write_trace",
]
