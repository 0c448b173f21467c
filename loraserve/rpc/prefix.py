"""The names of a prompt's first blocks, by which routers know prompts that begin alike.

A name says all of the prompt up to its block's end, so equal names mean equal beginnings, but for one pair in
four billion: what follows from a name is where a request goes, never what it is answered. Names are the same
in every process. Adapters share names and not caches; who compares names compares adapters as well.
"""

from array import array
from zlib import crc32

from loraserve.rpc.v1 import inference_pb2

BLOCK_TOKENS = 64
MAX_BLOCKS = 64
"""Of longer prompts the first 4,096 tokens are named."""

BLOCK_BYTES = 256
"""64 token ids of four bytes, or as many characters as are 64 tokens by `TEXT_CHARACTERS_PER_TOKEN`."""

_MAX_BYTES = MAX_BLOCKS * BLOCK_BYTES
_MAX_TOKENS = MAX_BLOCKS * BLOCK_TOKENS


def prefix_blocks(message: inference_pb2.GenerateRequest) -> tuple[int, ...]:
    """The names of the whole blocks that the prompt begins with, the first one first; () for a short one."""
    match message.WhichOneof("prompt"):
        case "token_ids":
            if len(message.token_ids.ids) < BLOCK_TOKENS:
                return ()
            data = array("I", message.token_ids.ids[:_MAX_TOKENS]).tobytes()
        case "text":
            if len(message.text) < BLOCK_BYTES // 4:
                return ()
            data = message.text[:_MAX_BYTES].encode()
        case _:
            turns = message.chat.messages[:MAX_BLOCKS]
            data = "".join([f"{one.role}\0{one.content[:_MAX_BYTES]}\0" for one in turns]).encode()
    names = []
    name = 0
    for end in range(BLOCK_BYTES, min(len(data), _MAX_BYTES) + 1, BLOCK_BYTES):
        name = crc32(data[end - BLOCK_BYTES : end], name)
        names.append(name)
    return tuple(names)
