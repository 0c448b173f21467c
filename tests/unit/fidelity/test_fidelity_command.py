"""`loraserve fidelity` refuses what cannot be before anything is started."""

import asyncio
from pathlib import Path

from tests.support.cli import run_cli


async def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    cases = (
        (("--engine", "warp"), "--engine warp: expected emulated or vllm"),
        (("--loads", "0.5,x"), "--loads: got '0.5,x'"),
        (("--profile", "vllm-llama2-7b"), "--profile: the emulated engine's latency model is known"),
        (("--out", str(file)), "--out: "),
        (("--model", str(tmp_path / "none")), "no such folder"),
    )
    done = await asyncio.gather(*(run_cli("fidelity", *arguments) for arguments, _ in cases))
    for ran, (arguments, said) in zip(done, cases, strict=True):
        assert ran.exit_code == 2, (arguments, ran.stderr)
        assert len(ran.stderr.strip().splitlines()) == 1, ran.stderr
        assert said in ran.stderr
        assert ran.stdout == ""
