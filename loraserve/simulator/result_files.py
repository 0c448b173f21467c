"""A simulation's result as files: Parquet for its columns, JSON for the rest.

The same result gives the same bytes: what differs from run to run is in `timing.json` alone. pyarrow is
imported when the first file is written or read.
"""

import json
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from loraserve.engines.replica_model.log import ReplicaLog
from loraserve.errors import BadInputError
from loraserve.simulator.figures import column
from loraserve.simulator.result import EpochRecord, SimulationResult
from traces.columns import TraceAdapter
from traces.metrics import Summary
from traces.records import Outcome
from traces.summary_json import summary_to_json

if TYPE_CHECKING:
    import pyarrow as pa

REQUESTS, RUNS, STRETCHES, EPOCHS = (
    "requests.parquet",
    "runs.parquet",
    "stretches.parquet",
    "epochs.parquet",
)
SCENARIO, SUMMARY, TIMING = "scenario.json", "summary.json", "timing.json"

_REQUEST_COLUMNS: Mapping[str, str] = {
    "arrival_ps": "int64",
    "first_ps": "int64",
    "end_ps": "int64",
    "prompt_tokens": "int32",
    "output_tokens": "int32",
    "drawn_tokens": "int32",
    "router": "int16",
    "attempts": "int16",
}
_RUN_COLUMNS = (
    "run_step",
    "run_ps",
    "run_step_ps",
    "run_growth_ps",
    "run_rows",
    "run_prefill_tokens",
    "run_max_rank",
    "run_blocks",
)
_STRETCH_COLUMNS = ("stretch_request", "stretch_first", "stretch_last")
_EPOCH_COLUMNS = ("time_ps", "table_version", "resident_bytes", "bytes_moved", "loads", "cold_misses")
_EPOCH_RATES = ("demand_tokens_per_s", "forecast_tokens_per_s")
_KEY = b"loraserve"


def write_result(result: SimulationResult, folder: Path, *, summary: Summary | None = None) -> None:
    """Write the result into a folder, which is made; names and ranks stand beside the numbers.

    OSError if the disk refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / REQUESTS, _requests_table(result))
    _write(folder / RUNS, _log_table(result, _RUN_COLUMNS))
    _write(folder / STRETCHES, _log_table(result, _STRETCH_COLUMNS))
    _write(folder / EPOCHS, _epochs_table(result))
    tree: dict[str, Any] = {
        "policy": result.policy,
        "routing": result.routing,
        "seed": result.seed,
        "requests": len(result),
        "events": result.num_events,
        "bytes_moved": result.bytes_moved,
        "cold_misses": result.cold_misses,
        "replicas": list(result.replica_ids),
        "lives": [
            {"replica": place, "steps": log.num_steps}
            for place, log in zip(result.log_replica, result.logs, strict=True)
        ],
        "scenario": dict(result.scenario),
    }
    _write_json(folder / SCENARIO, tree)
    if summary is not None:
        _write_json(folder / SUMMARY, summary_to_json(summary))
    _write_json(folder / TIMING, {"wall_s": result.wall_s})


def read_result(folder: Path) -> SimulationResult:
    """What `write_result` wrote; BadInputError names the file that is missing or is none of it."""
    tree = _read_json(folder / SCENARIO)
    requests, runs = _read(folder / REQUESTS), _read(folder / RUNS)
    stretches, epochs = _read(folder / STRETCHES), _read(folder / EPOCHS)
    try:
        return _result(tree, requests, runs, stretches, epochs, _wall_s(folder))
    except (KeyError, TypeError, ValueError) as error:
        raise BadInputError(
            f"{folder}: not a simulation's result ({error}); expected a folder of --out"
        ) from error


def _requests_table(result: SimulationResult) -> "pa.Table":
    import pyarrow as pa

    ranks = np.array([one.rank if one.rank is not None else 0 for one in result.adapters] + [0], np.int32)
    known = np.array([one.rank is not None for one in result.adapters] + [False])
    statuses = [result.statuses.get(index) for index in range(len(result))] if result.statuses else None
    columns: dict[str, Any] = {
        name: pa.array(getattr(result, name), pa.type_for_alias(kind))
        for name, kind in _REQUEST_COLUMNS.items()
    }
    columns |= {
        "adapter": _named(result.adapter, [one.name for one in result.adapters]),
        "adapter_place": pa.array(result.adapter, pa.int32()),
        "rank": pa.array(ranks[result.adapter], mask=~known[result.adapter]),
        "replica": _named(result.replica, result.replica_ids),
        "outcome": _named(result.outcome.astype(np.int32), [outcome.value for outcome in Outcome]),
        "status": pa.array(statuses or [None] * len(result), pa.string()),
    }
    kept = {"adapters": [[one.name, one.rank] for one in result.adapters]}
    return pa.table(columns, metadata={_KEY: json.dumps(kept, separators=(",", ":")).encode()})


def _named(places: NDArray[np.int32], names: Sequence[str]) -> "pa.DictionaryArray":
    import pyarrow as pa

    return pa.DictionaryArray.from_arrays(
        pa.array(places, pa.int32(), mask=places < 0), pa.array(names, pa.string())
    )


def _log_table(result: SimulationResult, names: Sequence[str]) -> "pa.Table":
    import pyarrow as pa

    lengths = [len(getattr(log, names[0])) for log in result.logs]
    life = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    place = np.asarray(result.log_replica, dtype=np.int32)[life]
    columns: dict[str, Any] = {"replica": _named(place, result.replica_ids), "life": pa.array(life)}
    for name in names:
        parts = [column(getattr(log, name)) for log in result.logs]
        columns[name] = pa.chunked_array([pa.array(part) for part in parts], pa.int64()).combine_chunks()
    return pa.table(columns)


def _epochs_table(result: SimulationResult) -> "pa.Table":
    import pyarrow as pa

    columns: dict[str, Any] = {
        name: pa.array([getattr(epoch, name) for epoch in result.epochs], pa.int64())
        for name in _EPOCH_COLUMNS
    }
    for name in _EPOCH_RATES:
        columns[name] = pa.array([getattr(epoch, name) for epoch in result.epochs], pa.float64())
    columns["copies"] = pa.array([list(epoch.copies) for epoch in result.epochs], pa.list_(pa.int64()))
    return pa.table(columns)


def _write(path: Path, table: "pa.Table") -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [field.name for field in table.schema if pa.types.is_dictionary(field.type)]
    wholes = [field.name for field in table.schema if pa.types.is_integer(field.type)]
    pq.write_table(
        table,
        path,
        compression="zstd",
        use_dictionary=texts,
        column_encoding=dict.fromkeys(wholes, "DELTA_BINARY_PACKED"),
        write_statistics=False,
    )


def _read(path: Path) -> "pa.Table":
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path, memory_map=False)
    except (OSError, pa.ArrowException) as error:
        line = " ".join(str(error).split())
        raise BadInputError(f"{path}: cannot be read ({line}); expected a file that --out wrote") from error


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInputError(f"{path}: cannot be read ({error}); expected a file that --out wrote") from error
    return tree


def _wall_s(folder: Path) -> float:
    path = folder / TIMING
    return float(_read_json(path)["wall_s"]) if path.exists() else 0.0


def _result(
    tree: Mapping[str, Any],
    requests: "pa.Table",
    runs: "pa.Table",
    stretches: "pa.Table",
    epochs: "pa.Table",
    wall_s: float,
) -> SimulationResult:
    kept = json.loads((requests.schema.metadata or {})[_KEY])
    replica_ids, lives = tuple(tree["replicas"]), tree["lives"]
    outcomes = {outcome.value: place for place, outcome in enumerate(Outcome)}
    statuses = requests["status"]
    failed = np.flatnonzero(statuses.is_valid().to_numpy())
    columns: dict[str, Any] = {
        name: np.ascontiguousarray(requests[name].to_numpy(), dtype=kind)
        for name, kind in _REQUEST_COLUMNS.items()
    }
    return SimulationResult(
        **columns,
        adapter=requests["adapter_place"].to_numpy(),
        adapters=tuple(TraceAdapter(name=name, rank=rank) for name, rank in kept["adapters"]),
        replica=_places(requests["replica"], {name: place for place, name in enumerate(replica_ids)}),
        replica_ids=replica_ids,
        outcome=_places(requests["outcome"], outcomes).astype(np.int8),
        statuses={int(row): statuses[int(row)].as_py() for row in failed},
        logs=_logs(runs, stretches, lives),
        log_replica=tuple(life["replica"] for life in lives),
        epochs=tuple(EpochRecord(copies=tuple(row.pop("copies")), **row) for row in epochs.to_pylist()),
        policy=tree["policy"],
        routing=tree["routing"],
        seed=tree["seed"],
        wall_s=wall_s,
        num_events=tree["events"],
        bytes_moved=tree["bytes_moved"],
        cold_misses=tree["cold_misses"],
        scenario=tree["scenario"],
    )


def _places(names: "pa.ChunkedArray", places: Mapping[str, int]) -> NDArray[np.int32]:
    """Names as places, -1 where there is none."""
    found = np.full(len(names), -1, dtype=np.int32)
    at = 0
    for chunk in names.chunks:
        of = np.array([places[name] for name in chunk.dictionary.to_pylist()] + [-1], dtype=np.int32)
        found[at : at + len(chunk)] = of[chunk.indices.fill_null(-1).to_numpy()]
        at += len(chunk)
    return found


def _logs(
    runs: "pa.Table", stretches: "pa.Table", lives: Sequence[Mapping[str, Any]]
) -> tuple[ReplicaLog, ...]:
    logs = [ReplicaLog(num_steps=life["steps"]) for life in lives]
    for table, names in ((runs, _RUN_COLUMNS), (stretches, _STRETCH_COLUMNS)):
        bounds = np.searchsorted(table["life"].to_numpy(), np.arange(len(lives) + 1))
        for name in names:
            values = table[name].to_numpy()
            for place, log in enumerate(logs):
                part = values[bounds[place] : bounds[place + 1]].astype(np.int64)
                setattr(log, name, array("q", part.tobytes()))
    return tuple(logs)
