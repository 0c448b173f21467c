"""Scheme `ucx` moves bodies between two processes, over shared memory and over TCP, and rests when idle."""

import importlib.util
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from loraserve.errors import BadInputError, UnavailableError
from loraserve.pace import Pace
from loraserve.transport import ucx_library
from loraserve.transport.base import BadPeerError, FetchStoppedError, NotPublishedError, Region
from loraserve.transport.listener import Listener
from loraserve.transport.peers import MAX_BODIES, PeerPool
from loraserve.transport.ucx import UcxTransport, open_ucx
from loraserve.transport.ucx_buffers import as_bytes, cut
from loraserve.transport.ucx_library import UcxLibrary
from tests.support.adapter_maker import one_line
from tests.support.transport_kit import PATIENT_S, ROOT, Fetched, fetch, memory_region, nothing_leaks
from tests.support.ucx_peer import UcxPeer, large_pattern, peers_by_way, ucx_peer

needs_ucx = pytest.mark.skipif(
    importlib.util.find_spec("ucxx") is None, reason="needs ucxx: scripts/setup installs it where it can"
)
SIZES = (0, 1, 4097, 8 * 1024**2, 64 * 1024**2 + 3)
WAYS = pytest.mark.parametrize("tls", ["", "tcp,self"], ids=["shared-memory", "tcp"])


@pytest.fixture
def tls(request: pytest.FixtureRequest) -> str:
    return str(getattr(request, "param", ""))


@pytest.fixture
def here(tls: str, there: UcxPeer) -> Iterator[UcxTransport]:
    """This process's end, of which nothing is left; the other process is there before."""
    with nothing_leaks():
        transport = open_ucx(Listener("127.0.0.1"), tls=tls or None)
        yield transport
        assert transport.active_bytes() == 0
        transport.close()


@pytest.fixture(scope="module")
def peers() -> Iterator[Callable[[str], UcxPeer]]:
    with peers_by_way(*SIZES) as found:
        yield found


@pytest.fixture
def there(tls: str, peers: Callable[[str], UcxPeer]) -> UcxPeer:
    """Another process, which stays from test to test."""
    return peers(tls)


@needs_ucx
@WAYS
def test_bodies_of_all_sizes_arrive_and_again_over_the_same_lane(here: UcxTransport, there: UcxPeer) -> None:
    for _ in range(2):
        for index, size_bytes in enumerate(SIZES):
            assert here.read_head(there.address, f"k{index}", idle_timeout_s=PATIENT_S) == (
                f"head{index}".encode(),
                size_bytes,
            )
            got = fetch(here, there.address, f"k{index}", Fetched(size_bytes))
            assert got.body == large_pattern(size_bytes, index)
            assert got.covered()


@needs_ucx
@WAYS
def test_many_at_once_do_not_mix_and_leave_both_ends_at_rest(here: UcxTransport, there: UcxPeer) -> None:
    before = set(threading.enumerate())
    indexes = [1, 2] * 25 + [3, 4, 4, 3]
    with ThreadPoolExecutor(len(indexes)) as pool:
        got = list(pool.map(lambda i: fetch(here, there.address, f"k{i}", Fetched(SIZES[i])).body, indexes))
    assert got == [large_pattern(SIZES[index], index) for index in indexes]
    assert set(threading.enumerate()) == before
    state = there.ask("state")
    assert state["active_bytes"] == 0
    assert state["used_s"] < 0.05  # of 0.2 s; a thread that spins uses all of them


@needs_ucx
def test_who_asks_again_before_the_sender_knows_that_all_has_come_is_answered(there: UcxPeer) -> None:
    peers = PeerPool()
    here = UcxTransport(Listener("127.0.0.1"), UcxLibrary(), peers)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: fetch(here, there.address, f"k{i}", Fetched(SIZES[i])), [1, 2, 3] * 30))
    assert peers.num_opened <= MAX_BODIES
    here.close()


@needs_ucx
@WAYS
def test_a_fetch_that_is_stopped_ends_in_step_with_its_sender(here: UcxTransport, there: UcxPeer) -> None:
    got = Fetched(SIZES[4])
    with pytest.raises(FetchStoppedError):
        fetch(here, there.address, "k4", got, stop=lambda: len(got.ranges) > 3)
    assert not got.covered()
    left = bytes(got.body)
    assert there.ask("state")["active_bytes"] == 0
    assert got.body == left
    again = fetch(here, there.address, "k4", Fetched(SIZES[4]))
    assert again.body == large_pattern(SIZES[4], 4)


@needs_ucx
def test_progress_that_raises_ends_the_fetch_and_nothing_else(here: UcxTransport, there: UcxPeer) -> None:
    got = Fetched(SIZES[4])

    def wrong() -> None:
        raise RuntimeError("a chunk has another hash")

    got.at_first = wrong
    with pytest.raises(RuntimeError, match="another hash"):
        fetch(here, there.address, "k4", got)
    assert fetch(here, there.address, "k4", Fetched(SIZES[4])).body == large_pattern(SIZES[4], 4)


@needs_ucx
def test_refusals_are_one_line_and_cost_no_lane(here: UcxTransport, there: UcxPeer) -> None:
    fetch(here, there.address, "k1", Fetched(1))
    for key, size_bytes, error in (("none", 1, NotPublishedError), ("k1", 2, BadPeerError)):
        with pytest.raises(error) as raised:
            fetch(here, there.address, key, Fetched(size_bytes))
        assert one_line(raised.value)
    with pytest.raises(ValueError, match="cannot be written"):
        here.fetch(
            there.address, "k1", b"1", on_bytes=lambda b, e: None, idle_timeout_s=1, stop=lambda: False
        )
    assert fetch(here, there.address, "k2", Fetched(4097)).body == large_pattern(4097, 2)


@needs_ucx
def test_what_is_withdrawn_is_read_to_its_end_and_closing_leaves_nothing(here: UcxTransport) -> None:
    with ucx_peer(SIZES[4]) as there:
        got = Fetched(SIZES[4])
        got.at_first = lambda: there.ask("withdraw k0")
        assert fetch(here, there.address, "k0", got).body == large_pattern(SIZES[4])
        with pytest.raises(NotPublishedError):
            fetch(here, there.address, "k0", Fetched(SIZES[4]))
        state = there.ask("close")
        assert state["threads"] == ["MainThread"]
        assert state["active_bytes"] == 0


@needs_ucx
def test_closing_ends_a_fetch_and_gives_everything_back(tls: str, there: UcxPeer) -> None:
    with nothing_leaks():
        here = open_ucx(Listener("127.0.0.1"))
        got = Fetched(SIZES[4])
        closing = threading.Thread(target=here.close)
        got.at_first = closing.start
        entered = threading.Event()

        def slowly(begin: int, end: int) -> None:
            got.on_bytes(begin, end)
            entered.wait(0.01)

        with pytest.raises(FetchStoppedError):
            here.fetch(
                there.address, "k4", got.body, on_bytes=slowly, idle_timeout_s=PATIENT_S, stop=lambda: False
            )
        closing.join(PATIENT_S)
        assert here.active_bytes() == 0
        here.close()


def listening_at() -> set[str]:
    """The addresses at which this process listens over IPv4."""
    mine, found = set[str](), set[str]()
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the one that listed them
            mine.add(os.readlink(f"/proc/self/fd/{fd}"))
    for line in Path("/proc/self/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine:
            packed = bytes.fromhex(fields[1].partition(":")[0])
            found.add(socket.inet_ntoa(packed[::-1]))
    return found


@needs_ucx
@WAYS
def test_where_the_listener_is_local_nobody_else_can_connect_to_ucx(
    here: UcxTransport, there: UcxPeer
) -> None:
    """UCX has listening sockets of its own, at every device that it may use."""
    before, seen = listening_at(), set[str]()
    got = Fetched(SIZES[-1])
    got.at_first = lambda: seen.update(listening_at())
    fetch(here, there.address, f"k{len(SIZES) - 1}", got)
    assert before == {"127.0.0.1"}
    assert seen == {"127.0.0.1"}


@needs_ucx
def test_an_address_of_a_format_that_ucx_does_not_know_ends_no_process() -> None:
    code = (
        "from loraserve.transport.base import TransportError\n"
        "from loraserve.transport.ucx_library import UcxLibrary\n"
        "from loraserve.transport.ucx_lane import Lane\n"
        "library = UcxLibrary()\n"
        "here, there = Lane(library), Lane(library)\n"
        "for other in range(1, 16):\n"
        "    address = bytes([there.address[0] ^ other]) + there.address[1:]\n"
        "    try:\n"
        "        here.connect(address, error_handling=False)\n"
        "    except TransportError as error:\n"
        "        assert 'another format' in str(error)\n"
        "    else:\n"
        "        raise AssertionError(address)\n"
        "here.connect(there.address, error_handling=False)\n"
        "print('alive', flush=True)\n"
        "here.discard(), there.discard()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "alive\n", done.stderr


@needs_ucx
def test_a_lane_that_messages_came_to_which_nobody_receives_is_given_back() -> None:
    code = (
        "import os\n"
        "from loraserve.transport.base import PeerGoneError\n"
        "from loraserve.transport.ucx_library import UcxLibrary\n"
        "from loraserve.transport.ucx_lane import Lane\n"
        "class GivesUp:\n"
        "    def fileno(self):\n"
        "        return 0\n"
        "    def look(self, quiet_s):\n"
        "        for _ in range(9):\n"
        "            here._worker.progress_once()\n"
        "        if quiet_s > 0.05:\n"
        "            raise PeerGoneError('nobody answers')\n"
        "library = UcxLibrary()\n"
        "here, there = Lane(library), Lane(UcxLibrary())\n"
        "there.connect(here.address, error_handling=False)\n"
        "try:\n"
        "    there.send_from([bytes(100_000)] * 3, 1 << 32)\n"
        "    there.send(GivesUp(), lambda: True)\n"
        "except PeerGoneError:\n"
        "    here.discard()\n"
        "    print(library.num_kept, flush=True)\n"
        "os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "0\n", done.stderr


@needs_ucx
def test_nothing_of_ucx_stays_in_the_environment_or_in_shared_memory() -> None:
    before = set(os.listdir("/dev/shm"))
    code = (
        "import os; before = dict(os.environ)\n"
        "from loraserve.transport.ucx_library import UcxLibrary\n"
        "from loraserve.transport.ucx_lane import Lane\n"
        "lane = Lane(UcxLibrary())\n"
        "assert dict(os.environ) == before\n"
        "print('\\n'.join(os.listdir('/dev/shm')), flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    assert not [name for name in set(done.stdout.split()) - before if name.startswith("ucx")]


@needs_ucx
def test_options_that_ucx_does_not_take_are_one_clear_error() -> None:
    listener = Listener("127.0.0.1")
    with pytest.raises(UnavailableError) as raised:
        open_ucx(listener, tls="no_such_transport")
    assert one_line(raised.value)
    listener.close()


def test_without_ucxx_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ucxx", None)
    for name in [each for each in sys.modules if each.startswith("ucxx.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnavailableError, match="scripts/setup installs it") as raised:
        UcxLibrary()
    assert one_line(raised.value)


@pytest.mark.parametrize(
    ("tls", "shared"),
    [
        (None, True),
        ("all", True),
        ("tcp,self", False),
        ("posix,self", True),
        ("tcp,cma", True),
        ("^sm", False),
        ("^tcp", True),
    ],
)
def test_error_handling_is_on_where_no_memory_can_be_shared(tls: str | None, shared: bool) -> None:
    assert ucx_library.may_share_memory(tls) == shared


class Device:
    """Looks like an array in device memory."""

    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...] | None = None) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": "<f4",
            "data": (4096, False),
            "strides": strides,
            "version": 3,
        }


def test_device_memory_is_cut_by_address_and_must_be_contiguous() -> None:
    for strides in (None, (12, 4)):
        with as_bytes(Device((5, 3), strides), to_write=True) as body:
            assert body.nbytes == 60
            parts = [each.__cuda_array_interface__ for each in cut(body, 32)]
        assert [(part["data"], part["shape"]) for part in parts] == [
            ((4096, False), (32,)),
            ((4128, False), (28,)),
        ]
    with pytest.raises(BadInputError, match="contiguous"), as_bytes(Device((5, 3), (4, 20)), to_write=True):
        pass


def test_host_memory_is_cut_without_copies() -> None:
    body = bytearray(large_pattern(10))
    with as_bytes(body, to_write=True) as view:
        parts = cut(view, 4)
        parts[2][:] = b"zz"
        assert [len(part) for part in parts] == [4, 4, 2]
        parts.clear()
    assert body.endswith(b"zz")


@needs_ucx
def test_a_region_that_is_no_memory_is_refused(here: UcxTransport) -> None:
    here.publish("k", memory_region(b"body"))
    with pytest.raises(BadInputError):
        here.publish("j", Region(head=b"", body=b"body", size_bytes=5))


@needs_ucx
def test_who_sends_keeps_a_pace_chunk_by_chunk() -> None:
    asked: set[str] = set()

    def is_busy() -> bool:
        asked.add(threading.current_thread().name)
        return False

    with nothing_leaks():
        here = open_ucx(Listener("127.0.0.1"), chunk_bytes=64 * 1024)
        there = open_ucx(Listener("127.0.0.1"))
        there.pace = Pace(is_busy=is_busy)
        there.publish("k", memory_region(large_pattern(1024**2, 0)))
        assert fetch(here, there.address, "k", Fetched(1024**2)).body == large_pattern(1024**2, 0)
        here.close()
        there.close()
    assert asked
    assert threading.current_thread().name not in asked
