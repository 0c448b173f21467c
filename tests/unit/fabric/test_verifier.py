"""A body is what its head says, in whatever order its bytes come and whoever hashes them, or one line says
what is wrong; and when it is over nobody reads the body any more."""

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import fields, replace
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.adapters.body_hashes import BodyHashes, ChunkHasher, CorruptError, hash_body, hash_chunks
from loraserve.adapters.safetensors_file import TensorInfo
from loraserve.adapters.segment import SegmentHead
from loraserve.adapters.segment_head import hashed, plan_head
from loraserve.clock import ManualClock
from loraserve.fabric.peer_fetch import Body, Failure, Fetching, Head, PeerSource, fetch_body
from loraserve.fabric.verify import verifier
from loraserve.fabric.wanted import Wanted
from loraserve.transport.base import PeerGoneError
from placement.fabric.attempts import Outcome
from placement.types import VersionId
from tests.support.adapter_maker import PREFIX
from tests.support.fabric_kit import segments_mapped
from tests.support.segments import own_segments

CHUNK_BYTES = 64
WAIT_S = 20.0
SHORT_S = 0.05
"""So long a defect would have to end too early."""


class Never(Executor):
    """A pool whose threads are always busy with something else."""

    def __init__(self) -> None:
        self.asked: list[Callable[[], Any]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        self.asked.append(fn)
        return Future()


def made(width: int, seed: int) -> tuple[SegmentHead, bytearray]:
    """A head with small chunks, and the body that belongs to it."""
    tensors = [
        TensorInfo(name=f"{PREFIX}.q_proj.lora_{side}.weight", dtype="F32", shape=shape, begin=0, end=0)
        for side, shape in (("A", (1, width)), ("B", (width, 1)))
    ]
    plan = plan_head(tensors, {PREFIX.removeprefix("base_model.model.") + ".q_proj": 1.0}, name="a@0")
    body = bytearray(Random(seed).randbytes(plan.body_bytes))
    chunks = [body[at : at + CHUNK_BYTES] for at in range(0, len(body), CHUNK_BYTES)]
    head = hashed(replace(plan, chunk_bytes=CHUNK_BYTES), digest="0" * 64, hashes=hash_chunks(chunks))
    return SegmentHead.decode(head.encode()), body


def checking(head: SegmentHead, body: memoryview, pool: Executor | None) -> ChunkHasher:
    """What checks this body."""
    return verifier(head, body, pool)


def problem_of(
    head: SegmentHead, body: bytearray, pieces: list[tuple[int, int]], pool: Executor | None
) -> str:
    """What is found wrong when the bytes come in these pieces; nobody looks at the body afterwards."""
    view = memoryview(body)
    hasher = checking(head, view, pool)
    problem = ""
    try:
        for piece in pieces:
            hasher.on_bytes(*piece)
        hasher.finish()
    except CorruptError as error:
        problem = str(error)
        hasher.stop()
    view.release()
    body.append(0)  # BufferError if there is a view of it
    body.pop()
    return problem


@pytest.fixture(scope="module", params=["none", "busy", "closed", 1, 2, 4])
def pool(request: pytest.FixtureRequest) -> Any:
    """Whoever may help: nobody, or so many threads."""
    if request.param in ("none", "busy"):
        yield None if request.param == "none" else Never()
        return
    with ThreadPoolExecutor(1 if request.param == "closed" else request.param) as threads:
        if request.param == "closed":
            threads.shutdown()
        yield threads


cuts = st.lists(st.floats(0, 1), max_size=10)
dice = st.randoms(use_true_random=False)


def pieces_of(size: int, places: list[float], rng: Random) -> list[tuple[int, int]]:
    ends = sorted({0, size, *(int(place * size) for place in places)})
    pieces = list(pairwise(ends))
    rng.shuffle(pieces)
    return pieces


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 100), cuts, dice)
def test_bytes_in_any_order_are_sound(
    pool: Executor | None, width: int, places: list[float], rng: Random
) -> None:
    head, body = made(width, seed=width)
    assert problem_of(head, body, pieces_of(len(body), places, rng), pool) == ""


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 100), cuts, st.floats(0, 0.999), st.integers(1, 255), dice)
def test_one_wrong_byte_is_found(
    pool: Executor | None, width: int, places: list[float], place: float, flip: int, rng: Random
) -> None:
    head, body = made(width, seed=width)
    body[int(place * len(body))] ^= flip
    found = problem_of(head, body, pieces_of(len(body), places, rng), pool)
    assert found == f"chunk {int(place * len(body)) // CHUNK_BYTES} of {head.num_chunks} is damaged"


@settings(deadline=None, max_examples=50)
@given(st.integers(40, 100), cuts, dice)
def test_chunks_in_each_others_place_are_found(
    pool: Executor | None, width: int, places: list[float], rng: Random
) -> None:
    head, body = made(width, seed=width)
    first, second = rng.sample(range(len(body) // CHUNK_BYTES), 2)
    one, other = (slice(at * CHUNK_BYTES, (at + 1) * CHUNK_BYTES) for at in (first, second))
    body[one], body[other] = body[other], body[one]
    assert "is damaged" in problem_of(head, body, pieces_of(len(body), places, rng), pool)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 100), cuts, dice)
def test_a_missing_piece_is_found(
    pool: Executor | None, width: int, places: list[float], rng: Random
) -> None:
    head, body = made(width, seed=width)
    pieces = pieces_of(len(body), places, rng)
    begin, end = pieces.pop()
    assert problem_of(head, body, pieces, pool) == f"{end - begin} of {len(body)} bytes never came"


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 100), cuts, dice)
def test_a_piece_that_comes_twice_is_found(
    pool: Executor | None, width: int, places: list[float], rng: Random
) -> None:
    head, body = made(width, seed=width)
    pieces = pieces_of(len(body), places, rng)
    pieces.insert(rng.randrange(len(pieces) + 1), rng.choice(pieces))
    assert "twice" in problem_of(head, body, pieces, pool)


@pytest.mark.parametrize("piece", [(-1, 3), (5, 4), (0, 10_000)])
def test_pieces_that_cannot_be_are_refused(pool: Executor | None, piece: tuple[int, int]) -> None:
    head, body = made(30, seed=1)
    assert "it sent bytes" in problem_of(head, body, [piece], pool)


def test_damage_ends_it_before_the_rest_has_come() -> None:
    head, body = made(100, seed=1)
    body[0] ^= 1
    never = Never()
    hasher = checking(head, memoryview(body), never)
    hasher.on_bytes(0, CHUNK_BYTES)
    assert not hasher.has_failed
    never.asked[0]()
    assert hasher.has_failed
    with pytest.raises(CorruptError, match="chunk 0 of"):
        hasher.on_bytes(CHUNK_BYTES, 2 * CHUNK_BYTES)
    hasher.stop()


def test_what_waits_behind_damage_is_not_hashed() -> None:
    head, body = made(100, seed=1)
    body[0] ^= 1
    hasher = checking(head, memoryview(body), None)
    hasher.on_bytes(0, len(body))
    assert [hasher.work() for _ in range(2)] == [True, False]
    hasher.stop()


class Standing:
    """Stands still in a thread of the pool, while it has a chunk."""

    def __init__(self, then: BaseException | None = None) -> None:
        self.reached, self.released = threading.Event(), threading.Event()
        self._then = then

    def take(self, index: int, chunk: memoryview) -> str:
        """As the hasher calls it."""
        self.reached.set()
        assert self.released.wait(WAIT_S)
        if self._then is not None:
            raise self._then
        return ""


@pytest.mark.parametrize("way", ["finish", "stop"])
def test_who_has_begun_is_waited_for_and_who_is_late_finds_nothing(way: str) -> None:
    body, standing, never = bytearray(4 * CHUNK_BYTES), Standing(), Never()
    hasher = ChunkHasher(memoryview(body), CHUNK_BYTES, standing.take, never)
    hasher.on_bytes(0, len(body))
    with ThreadPoolExecutor(2) as threads:
        threads.submit(never.asked[0])
        assert standing.reached.wait(WAIT_S)
        ended = threads.submit(getattr(hasher, way))
        assert not wait([ended], timeout=SHORT_S).done
        standing.released.set()
        ended.result(WAIT_S)
    assert [late() for late in never.asked[1:]] == [False] * 3
    body.append(0)


def test_nobody_waits_for_a_thread_of_the_pool_that_rests() -> None:
    body, resting, rested = bytearray(2 * CHUNK_BYTES), threading.Event(), threading.Event()

    def rest() -> None:
        resting.set()
        rested.wait(WAIT_S)

    with ThreadPoolExecutor(1) as threads:
        hasher = ChunkHasher(memoryview(body), CHUNK_BYTES, lambda index, chunk: "", threads, rest)
        hasher.on_bytes(0, CHUNK_BYTES)
        assert resting.wait(WAIT_S)
        hasher.on_bytes(CHUNK_BYTES, len(body))
        hasher.finish()
        body.append(0)
        rested.set()


@pytest.mark.parametrize("error", [MemoryError("no room"), SystemExit(1)])
def test_what_fails_in_a_thread_of_the_pool_is_not_lost(error: BaseException) -> None:
    body, standing = bytearray(4 * CHUNK_BYTES), Standing(error)
    with ThreadPoolExecutor(1) as threads:
        hasher = ChunkHasher(memoryview(body), CHUNK_BYTES, standing.take, threads)
        hasher.on_bytes(0, CHUNK_BYTES)
        assert standing.reached.wait(WAIT_S)
        standing.released.set()
        with pytest.raises(type(error)):
            hasher.finish()
    assert hasher.has_failed
    hasher.stop()
    body.append(0)


def test_several_threads_hash_chunks_of_one_body_at_the_same_time() -> None:
    body = bytearray(3 * CHUNK_BYTES)
    meeting = threading.Barrier(3)

    def meet(index: int, chunk: memoryview) -> str:
        meeting.wait(WAIT_S)
        return ""

    with ThreadPoolExecutor(2) as threads:
        hasher = ChunkHasher(memoryview(body), CHUNK_BYTES, meet, threads)
        hasher.on_bytes(0, len(body))
        hasher.finish()  # the third is the one that waits
    assert not meeting.broken


def test_many_bodies_at_once_share_two_threads() -> None:
    made_here = [made(60 + number, seed=number) for number in range(20)]
    with ThreadPoolExecutor(2) as shared, ThreadPoolExecutor(len(made_here)) as fetchers:
        problems = fetchers.map(
            lambda one: problem_of(one[0], one[1], pieces_of(len(one[1]), [0.3, 0.7], Random(1)), shared),
            made_here,
        )
        assert set(problems) == {""}


def test_a_chunk_is_taken_with_its_number() -> None:
    body = bytearray(Random(5).randbytes(5 * CHUNK_BYTES - 7))
    taken = {}

    def take(index: int, chunk: memoryview) -> str:
        taken[index] = bytes(chunk)
        return ""

    hasher = ChunkHasher(memoryview(body), CHUNK_BYTES, take)
    hasher.on_bytes(0, len(body))
    hasher.finish()
    parts = [bytes(body[at : at + CHUNK_BYTES]) for at in range(0, len(body), CHUNK_BYTES)]
    assert taken == dict(enumerate(parts))


@given(st.binary(min_size=1, max_size=500), st.integers(1, 200))
def test_a_body_that_is_there_is_hashed_by_several_threads_as_by_one(body: bytes, chunk_bytes: int) -> None:
    with memoryview(body) as view:
        parts = [view[at : at + chunk_bytes] for at in range(0, len(body), chunk_bytes)]
        assert hash_body(view, chunk_bytes) == hash_chunks(parts)


@pytest.mark.parametrize("kind", ["fast", "sha256"])
def test_a_chunk_must_have_both_of_its_hashes(kind: str) -> None:
    head, body = made(60, seed=1)
    hashes = {"fast": head.chunk_hashes, "sha256": head.chunk_sha256s}
    hashes[kind] = hashes[kind][:-1] + bytes([hashes[kind][-1] ^ 1])
    other = hashed(head, digest=head.digest, hashes=BodyHashes(**hashes))
    problem = problem_of(other, body, [(0, len(body))], None)
    assert problem == f"chunk {head.num_chunks - 1} of {head.num_chunks} is damaged"


class Bringer:
    """As much of a transport as brings a body at once."""

    def __init__(self, body: bytearray, then: Callable[[], None]) -> None:
        self._body = body
        self._then = then

    def fetch(self, address: bytes, key: str, into: memoryview, **told: Any) -> None:
        """As a transport does."""
        into[:] = self._body
        told["on_bytes"](0, len(into))
        self._then()


def fetched(
    head: SegmentHead, bringer: Any, pool: Executor, is_stopped: Callable[[], bool] = lambda: False
) -> Body | Failure:
    """What comes of one attempt with this transport."""
    fetching = Fetching(
        clock=ManualClock(),
        verifiers=pool,
        idle_timeout_s=1.0,
        is_stopped=is_stopped,
        tell=lambda num_bytes: None,
    )
    return fetch_body(
        PeerSource(transport=bringer, address=b"", replica_id="peer"),
        Wanted(version_id=VersionId(head.name), digest=head.digest, rank=1, size_bytes=head.body_bytes),
        Head(raw=head.encode(), decoded=head),
        fetching,
    )


@pytest.mark.parametrize("leaves", [True, False])
def test_who_leaves_while_the_body_is_verified_ends_it_and_nothing_of_it_stays(leaves: bool) -> None:
    head, body = made(100, seed=3)
    left = threading.Event()
    before = own_segments(), segments_mapped()
    found = fetched(head, Bringer(body, left.set if leaves else lambda: None), Never(), left.is_set)
    if isinstance(found, Body):
        assert not leaves
        assert found.segment.region().body == body
        found.segment.close()
    else:
        assert found.outcome is Outcome.STOPPED
        assert leaves
    assert (own_segments(), segments_mapped()) == before


class StandingHead(SegmentHead):
    """Its hashes are not told before the test says so."""

    __slots__ = ("standing",)
    standing: Standing

    def chunk_hash(self, index: int) -> bytes:
        self.standing.take(index, memoryview(b""))
        return SegmentHead.chunk_hash(self, index)


def test_a_peer_that_dies_is_left_only_when_nobody_hashes_what_it_sent() -> None:
    plain, body = made(100, seed=3)
    head = StandingHead(**{one.name: getattr(plain, one.name) for one in fields(plain)})
    object.__setattr__(head, "standing", standing := Standing())

    def die() -> None:
        assert standing.reached.wait(WAIT_S)
        raise PeerGoneError("it died")

    before = own_segments(), segments_mapped()
    with ThreadPoolExecutor(2) as threads:
        running = threads.submit(fetched, head, Bringer(body, die), threads)
        assert standing.reached.wait(WAIT_S)
        assert not wait([running], timeout=SHORT_S).done
        standing.released.set()
        found = running.result(WAIT_S)
    assert isinstance(found, Failure)
    assert (found.outcome, found.text) == (Outcome.GONE, "it died")
    assert (own_segments(), segments_mapped()) == before
