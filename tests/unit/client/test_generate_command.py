"""`loraserve generate` streams text, or one JSON object, and its errors are one line and a code."""

from collections.abc import AsyncIterator

import pytest

from loraserve.errors import OverloadedError
from tests.support.cli import run_cli
from tests.support.fake_router import FakeRouter, fake_router


@pytest.fixture
async def router() -> AsyncIterator[FakeRouter]:
    async with fake_router() as router:
        yield router


async def test_text_and_json_tell_the_same_answer(router: FakeRouter) -> None:
    version = await router.add("a", 8)
    arguments = ("generate", "-", "--adapter", "a", "--max-tokens", "12", "--seed", "1", "--ignore-eos")
    plain = await run_cli(*arguments, "--address", router.address, stdin="hi €")
    assert (plain.exit_code, plain.stderr) == (0, "")
    ran = await run_cli(*arguments, "--address", router.address, "--json", stdin="hi €")
    answer = ran.json()
    assert (ran.exit_code, ran.stderr) == (0, "")
    assert answer["text"] + "\n" == plain.stdout
    assert (len(answer["token_ids"]), answer["output_tokens"]) == (12, 12)
    assert (answer["adapter_version"], answer["finish_reason"]) == (version, "length")
    assert (answer["replica"], answer["table_version"], answer["reason"]) == ("replica-0", 7, "only holder")
    assert 0 < answer["ttft_ms"] <= answer["e2e_ms"]
    assert router.requests[0].text == "hi €"


async def test_a_chat_is_sent_as_messages(router: FakeRouter) -> None:
    ran = await run_cli(
        "generate", "hi", "--chat", "--system", "be brief", "--address", router.address, "--max-tokens", "2"
    )
    assert ran.exit_code == 0
    assert [(one.role, one.content) for one in router.requests[0].chat.messages] == [
        ("system", "be brief"),
        ("user", "hi"),
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (("--adapter", "nobody"), 2, "error: adapter nobody is not registered\n"),
        (("--temperature", "-1"), 2, "error: sampling.temperature: -1"),
        (("--system", "x"), 2, "error: --system: needs --chat\n"),
        (("--timeout", "0"), 2, "error: --timeout: 0 is not a positive number"),
        (("--seed", str(2**70)), 2, "error: the request cannot be sent"),
        (("--timeout", "0.001", "--max-tokens", "500", "--ignore-eos"), 1, "error: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
async def test_errors_are_one_line_and_the_right_code(
    router: FakeRouter, arguments: tuple[str, ...], code: int, line: str
) -> None:
    ran = await run_cli("generate", "hi", "--address", router.address, "--json", *arguments)
    assert (ran.exit_code, ran.stdout) == (code, "")
    assert ran.stderr.startswith(line)
    assert ran.stderr.count("\n") == 1


async def test_a_full_cluster_and_an_absent_one_are_failures_of_the_work(router: FakeRouter) -> None:
    router.refusal = OverloadedError("256 requests wait already")
    full = await run_cli("generate", "hi", "--address", router.address)
    assert (full.exit_code, full.stderr) == (1, "error: 256 requests wait already\n")
    absent = await run_cli("generate", "hi", "--address", "127.0.0.1:1")
    assert (absent.exit_code, absent.stdout) == (1, "")
    assert absent.stderr == "error: router 127.0.0.1:1: cannot be reached; is the cluster up?\n"


async def test_several_routers_may_be_given_and_one_of_them_is_enough(router: FakeRouter) -> None:
    for given in (
        ("--address", f"127.0.0.1:1, {router.address}"),
        ("--address", router.address, "--address", "127.0.0.1:1"),
    ):
        ran = await run_cli("generate", "hi", *given, "--max-tokens", "2", "--json")
        assert (ran.exit_code, ran.stderr, ran.json()["attempts"]) == (0, "", 1), given
    none = await run_cli("generate", "hi", "--address", "127.0.0.1:1,127.0.0.1:2")
    assert none.stderr == "error: routers 127.0.0.1:1, 127.0.0.1:2: cannot be reached; is the cluster up?\n"


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1:", ":50051", "127.0.0.1:99999", "a:b"])
async def test_an_address_needs_a_host_and_a_port(address: str) -> None:
    ran = await run_cli("generate", "hi", "--address", address)
    assert ran.exit_code == 2
    assert ran.stderr == f"error: --address: {address} is not HOST:PORT, such as 127.0.0.1:50051\n"
