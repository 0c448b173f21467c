"""What must be conserved in every simulation."""

import numpy as np

from loraserve.simulator.ledger import FAILED, OK, OUTCOMES, REFUSED
from loraserve.simulator.result import SimulationResult


def check_result(result: SimulationResult) -> None:
    """AssertionError unless every request ended once and its times, tokens and bytes add up."""
    ended, first = result.end_ps, result.first_ps
    ok, failed = result.outcome == OK, result.outcome == FAILED
    refused = result.outcome == REFUSED
    _require(bool(np.all(ok | failed | refused)), f"an outcome is none of {OUTCOMES}")
    _require(bool(np.all(ended >= result.arrival_ps)), "a request ended before it came")
    _require(bool(np.all(result.drawn_tokens[ok] == result.output_tokens[ok])), "an answer is not whole")
    _require(bool(np.all(result.drawn_tokens[~ok] < result.output_tokens[~ok])), "a whole answer failed")
    _require(bool(np.all((first >= 0) == (result.drawn_tokens > 0))), "first tokens and tokens disagree")
    drew = first >= 0
    _require(bool(np.all(first[drew] > result.arrival_ps[drew])), "a first token came before its request")
    _require(bool(np.all(first[drew] <= ended[drew])), "a first token came after the last")
    _require(bool(np.all(result.replica[ok] >= 0)), "an answer came from nowhere")
    _require(bool(np.all(result.attempts[ok] >= 1)), "an answer came to a request that was never sent")
    _require(set(result.statuses) == set(np.flatnonzero(failed).tolist()), "failures and lines disagree")
    _check_logs(result)
    _require(sum(epoch.bytes_moved for epoch in result.epochs) == result.bytes_moved, "bytes do not add up")
    _require(sum(epoch.cold_misses for epoch in result.epochs) == result.cold_misses, "misses do not add up")


def _check_logs(result: SimulationResult) -> None:
    """The stretches of all logs together are the tokens drawn."""
    drawn = np.zeros(len(result), dtype=np.int64)
    for log in result.logs:
        request = np.frombuffer(log.stretch_request, dtype=np.int64)
        first = np.frombuffer(log.stretch_first, dtype=np.int64)
        last = np.frombuffer(log.stretch_last, dtype=np.int64)
        _require(bool(np.all(last < log.num_steps)), "a token was drawn in a step that never was")
        drawn += np.bincount(request, weights=last - first + 1, minlength=len(drawn)).astype(np.int64)
    _require(bool(np.all(drawn == result.drawn_tokens)), "the logs' tokens are not those drawn")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)
