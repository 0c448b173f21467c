"""A body is what its head says, in whatever order its bytes come, or the verifier says what is wrong."""

import threading
from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.adapters.safetensors_file import TensorInfo
from loraserve.adapters.segment import SegmentHead
from loraserve.adapters.segment_head import hash_body, hashed, plan_head
from loraserve.fabric.verify import CorruptError, Verifier
from tests.support.adapter_maker import PREFIX

CHUNK_BYTES = 64


def made(width: int, seed: int) -> tuple[SegmentHead, bytearray]:
    """A head with small chunks, and the body that belongs to it."""
    tensors = [
        TensorInfo(name=f"{PREFIX}.q_proj.lora_{side}.weight", dtype="F32", shape=shape, begin=0, end=0)
        for side, shape in (("A", (1, width)), ("B", (width, 1)))
    ]
    plan = plan_head(tensors, {PREFIX.removeprefix("base_model.model.") + ".q_proj": 1.0}, name="a@0")
    body = bytearray(Random(seed).randbytes(plan.body_bytes))
    chunks = [body[at : at + CHUNK_BYTES] for at in range(0, len(body), CHUNK_BYTES)]
    head = hashed(plan, digest="0" * 64, hashes=hash_body(chunks))
    return replace(head, chunk_bytes=CHUNK_BYTES), body


def problem_of(head: SegmentHead, body: bytearray, pieces: list[tuple[int, int]]) -> str:
    """What is found wrong when the bytes come in these pieces."""
    with memoryview(body) as view:
        verifier = Verifier(head, view)
        thread = threading.Thread(target=verifier.run)
        thread.start()
        try:
            for piece in pieces:
                verifier.on_bytes(*piece)
        except CorruptError as error:
            verifier.stop()
            return str(error)
        else:
            verifier.finish()
        finally:
            thread.join()
        return verifier.problem


cuts = st.lists(st.floats(0, 1), max_size=10)


def pieces_of(size: int, places: list[float], rng: Random) -> list[tuple[int, int]]:
    ends = sorted({0, size, *(int(place * size) for place in places)})
    pieces = list(pairwise(ends))
    rng.shuffle(pieces)
    return pieces


@given(st.integers(1, 100), cuts, st.randoms(use_true_random=False))
def test_bytes_in_any_order_are_sound(width: int, places: list[float], rng: Random) -> None:
    head, body = made(width, seed=width)
    assert problem_of(head, body, pieces_of(len(body), places, rng)) == ""


@given(st.integers(1, 100), cuts, st.floats(0, 0.999), st.integers(0, 7), st.randoms(use_true_random=False))
def test_one_wrong_bit_is_found(width: int, places: list[float], place: float, bit: int, rng: Random) -> None:
    head, body = made(width, seed=width)
    pieces = pieces_of(len(body), places, rng)
    body[int(place * len(body))] ^= 1 << bit
    assert "is damaged" in problem_of(head, body, pieces)


@given(st.integers(1, 100), cuts, st.randoms(use_true_random=False))
def test_a_missing_piece_is_found(width: int, places: list[float], rng: Random) -> None:
    head, body = made(width, seed=width)
    pieces = pieces_of(len(body), places, rng)
    begin, end = pieces.pop()
    assert problem_of(head, body, pieces) == f"{end - begin} of {len(body)} bytes never came"


def test_a_body_whose_chunks_hash_alike_and_that_is_another_is_found_by_its_sha256() -> None:
    head, body = made(30, seed=1)
    other = replace(head, body_sha256="0" * 64)
    assert "its body hashes to" in problem_of(other, body, [(0, len(body))])


@pytest.mark.parametrize("piece", [(-1, 3), (5, 4), (0, 10_000)])
def test_pieces_that_cannot_be_are_refused(piece: tuple[int, int]) -> None:
    head, body = made(30, seed=1)
    assert "it sent bytes" in problem_of(head, body, [piece])
