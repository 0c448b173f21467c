"""What a replica lists of its requests, and ends so that routers go on with it elsewhere."""

import grpc

from loraserve.engines.description import RequestReport
from loraserve.replica.listing import MAX_ATTEMPTS, listed
from loraserve.request import GenerationRequest, SamplingParams
from tests.support.replica_bench import ReplicaBench, status_of_call


async def test_requests_that_are_moved_end_and_the_replica_serves_on(bench: ReplicaBench) -> None:
    running = await bench.running("q1", max_tokens=30)
    (one,) = bench.server.in_flight()
    assert (one.request_id, one.may_move) == ("q1", True)
    assert one.drawn_tokens + one.remaining_tokens == 30
    assert await bench.server.move(["q1", "gone"]) == 1
    code, _ = await status_of_call(running)
    assert code is grpc.StatusCode.UNAVAILABLE
    assert bench.server.in_flight() == ()
    assert not bench.server.describe().draining, "new ones are taken"


def _listed(*, drawn: int, attempt: int = 0, seed: int | None = None) -> RequestReport:
    sampling = SamplingParams(max_tokens=10, seed=seed)
    return listed(
        GenerationRequest(request_id="q", prompt=(1, 2, 3), sampling=sampling), 10 - drawn, (0, attempt)
    )


def test_what_cannot_be_resumed_exactly_and_what_was_sent_often_stays() -> None:
    found = _listed(drawn=4)
    assert (found.prompt_tokens, found.drawn_tokens, found.remaining_tokens) == (3, 4, 6)
    assert found.may_move
    assert not _listed(drawn=4, seed=1).may_move
    assert _listed(drawn=0, seed=1).may_move
    assert not _listed(drawn=0, attempt=MAX_ATTEMPTS).may_move
