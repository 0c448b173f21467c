"""What comes over the wire is what was sent, and nothing that nobody of ours sends is taken for it."""

import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.transport.address import Address
from loraserve.transport.base import (
    MAX_KEY_BYTES,
    BadPeerError,
    NotPublishedError,
    PeerBusyError,
    PeerFailedError,
    PeerGoneError,
    TransportError,
)
from loraserve.transport.wire import (
    HEADER_BYTES,
    HELLO_BYTES,
    MAGIC,
    MAX_ANSWER_PAYLOAD_BYTES,
    MAX_REQUEST_PAYLOAD_BYTES,
    TOKEN_BYTES,
    VERSION,
    WELCOME,
    ErrorCode,
    Frame,
    Op,
    check_welcome,
    decode_header,
    decode_hello,
    encode_hello,
    error_frame,
    error_of,
    range_frame,
    range_of,
)
from tests.support.adapter_maker import one_line

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
KEYS = st.text(st.characters(exclude_categories=["Cs"]), max_size=MAX_KEY_BYTES // 4)
FRAMES = st.builds(
    Frame,
    op=st.integers(1, 255),
    request_id=U32,
    key=KEYS,
    begin=U64,
    end=U64,
    payload=st.binary(max_size=200),
)


@given(FRAMES)
def test_a_frame_comes_as_it_was_sent(frame: Frame) -> None:
    raw = frame.encode()
    header = decode_header(raw[:HEADER_BYTES], MAX_REQUEST_PAYLOAD_BYTES)
    assert header.rest_bytes == len(raw) - HEADER_BYTES
    assert header.frame(raw[HEADER_BYTES:]) == frame


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_no_header_asks_for_more_than_a_frame_may_have(raw: bytes) -> None:
    with suppress(BadPeerError):
        header = decode_header(raw, MAX_REQUEST_PAYLOAD_BYTES)
        assert header.rest_bytes <= MAX_KEY_BYTES + MAX_REQUEST_PAYLOAD_BYTES


@pytest.mark.parametrize(
    ("key_bytes", "payload_bytes", "limit"),
    [
        (MAX_KEY_BYTES + 1, 0, MAX_REQUEST_PAYLOAD_BYTES),
        (0, MAX_REQUEST_PAYLOAD_BYTES + 1, MAX_REQUEST_PAYLOAD_BYTES),
        (0, MAX_ANSWER_PAYLOAD_BYTES + 1, MAX_ANSWER_PAYLOAD_BYTES),
        (0xFFFF, 0xFFFFFFFF, MAX_ANSWER_PAYLOAD_BYTES),
    ],
)
def test_a_length_beyond_its_limit_is_refused(key_bytes: int, payload_bytes: int, limit: int) -> None:
    raw = struct.pack(">BBHIQQI", Op.HEAD, 0, key_bytes, 1, 0, 0, payload_bytes)
    with pytest.raises(BadPeerError, match="at most"):
        decode_header(raw, limit)


def test_a_key_that_is_no_text_is_refused() -> None:
    header = decode_header(struct.pack(">BBHIQQI", Op.HEAD, 0, 2, 1, 0, 0, 0), 0)
    with pytest.raises(BadPeerError, match="UTF-8"):
        header.frame(b"\xff\xfe")


@given(st.binary(min_size=TOKEN_BYTES, max_size=TOKEN_BYTES))
def test_a_hello_names_the_life_of_a_process(token: bytes) -> None:
    assert decode_hello(encode_hello(token)) == token


@given(st.binary(max_size=2 * HELLO_BYTES).filter(lambda raw: not raw.startswith(MAGIC)))
def test_what_is_no_hello_is_refused(raw: bytes) -> None:
    with pytest.raises(BadPeerError):
        decode_hello(raw)


def test_another_version_is_named() -> None:
    with pytest.raises(BadPeerError, match=f"version {VERSION + 1} .* not {VERSION}"):
        check_welcome(struct.pack(">8sH", MAGIC, VERSION + 1))
    check_welcome(WELCOME)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (ErrorCode.NOT_PUBLISHED, NotPublishedError),
        (ErrorCode.BUSY, PeerBusyError),
        (ErrorCode.BAD_REQUEST, BadPeerError),
        (ErrorCode.OTHER_INSTANCE, PeerGoneError),
        (ErrorCode.FAILED, PeerFailedError),
        (77, BadPeerError),
    ],
)
def test_a_refusal_is_raised_as_what_it_is(code: ErrorCode, kind: type[TransportError]) -> None:
    error = error_of(error_frame(7, code, "two\nlines\x00" + "x" * 10_000))
    assert type(error) is kind
    assert one_line(error)
    assert len(str(error)) < 1000


@given(st.binary(max_size=3000), U64)
def test_any_refusal_is_one_line(payload: bytes, code: int) -> None:
    assert one_line(error_of(Frame(op=Op.ERROR, begin=code, payload=payload)))


@given(U64, U64, U64)
def test_a_range_lies_inside_its_body(begin: int, end: int, of_bytes: int) -> None:
    frame = range_frame(Op.DATA, 1, begin, end, of_bytes=of_bytes)
    if begin <= end <= of_bytes:
        assert range_of(frame) == (begin, end, of_bytes)
    else:
        with pytest.raises(BadPeerError):
            range_of(frame)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "node-7.example"])
def test_an_address_is_text_that_can_be_read_back(host: str) -> None:
    address = Address(host=host, port=4711, token=bytes(range(TOKEN_BYTES)))
    assert Address.decode(address.encode()) == address
    assert address.encode().decode("ascii").isprintable()


@given(st.binary(max_size=100) | st.text(max_size=60).map(str.encode))
def test_what_is_no_address_is_refused(raw: bytes) -> None:
    with pytest.raises(BadPeerError, match="is no address"):
        Address.decode(raw)


@pytest.mark.parametrize(
    "raw", [b"h:0/" + b"00" * 16, b"h:65536/" + b"00" * 16, b"h:1/00", b":1/" + b"00" * 16]
)
def test_an_address_with_a_wrong_part_is_refused(raw: bytes) -> None:
    with pytest.raises(BadPeerError, match="is no address"):
        Address.decode(raw)
