"""What scripts/setup concludes from pip's reports and from a wheel's metadata."""

import json
from collections.abc import Iterable
from pathlib import Path

import lib_setup
import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "lib_setup.py"


def report(folder: Path, packages: Iterable[tuple[str, str]]) -> Path:
    """A dry run's report, as `pip install --report` writes it."""
    path = folder / "report.json"
    items = [{"metadata": {"name": name, "version": version}} for name, version in packages]
    path.write_text(json.dumps({"version": "1", "install": items}), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("packages", "found"),
    [
        ([("torch", "2.13.0+cpu"), ("sympy", "1.14")], []),
        ([("torch", "2.13.0+cpu"), ("triton", "3.9.0")], []),
        ([("torch", "2.13.0"), ("nvidia-cublas-cu12", "12.8")], ["nvidia-cublas-cu12 12.8"]),
        ([("torch", "2.13.0"), ("NVIDIA_NCCL_cu12", "2.27")], ["nvidia-nccl-cu12 2.27"]),
        ([("torch", "2.13.0+cu130")], ["torch 2.13.0+cu130"]),
        ([("cuda-bindings", "13.0"), ("triton", "3.9.0")], ["cuda-bindings 13.0", "triton 3.9.0"]),
        ([], []),
    ],
)
def test_a_cuda_stack_is_seen_before_it_is_downloaded(
    tmp_path: Path, packages: list[tuple[str, str]], found: list[str]
) -> None:
    assert lib_setup.cuda_packages(report(tmp_path, packages)) == found


def test_what_was_resolved_is_installed_exactly_but_for_loraserve(tmp_path: Path) -> None:
    packages = [("numpy", "2.1.0"), ("loraserve", "0.1.0"), ("MarkupSafe", "3.0.4")]
    assert lib_setup.resolved(report(tmp_path, packages)) == ["numpy==2.1.0", "markupsafe==3.0.4"]


def _wheel_metadata(folder: Path, name: str, needs: Iterable[str]) -> None:
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        "Version: 1.0",
        *(f"Requires-Dist: {one}" for one in needs),
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_requirements_leave_out_the_torch_family_extras_and_other_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    needs = (
        'regex; python_version >= "3"',
        'numba==0.65.0; platform_machine != "no-such-machine"',
        'py-cpuinfo; platform_machine == "no-such-machine"',
        "torch==2.13.0+cpu",
        "torchvision",
        "torchaudio",
        "torchcodec>=0.14",
        "xgrammar<1.0.0,>=0.2.1",
        'pandas; extra == "bench"',
        "fastapi[standard]>=0.133",
    )
    _wheel_metadata(tmp_path, "some-engine", needs)
    _wheel_metadata(tmp_path, "some-grammar", ["triton", "numpy"])
    assert lib_setup.needs(["some-engine", "some-grammar"]) == [
        "fastapi[standard]>=0.133",
        "numba==0.65.0",
        "numpy",
        "regex",
    ]
    assert lib_setup.alone("some-engine") == ["xgrammar<1.0.0,>=0.2.1"]


def test_another_use_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert lib_setup.main(["cuda"]) == 2
    assert "usage:" in capsys.readouterr().err


def test_ucx_is_left_with_what_is_loaded_and_each_library_once(tmp_path: Path) -> None:
    kept = {
        "libucx/lib/libucp.so": b"p" * 90,
        "libucx/lib/ucx/libuct_cma.so": b"c" * 80,
        "ucxx/core.py": b"pass",
    }
    copies = {"libucx/lib/libucp.so.0": b"p" * 90, "libucx/lib/ucx/libuct_cma.so.0.0.0": b"c" * 80}
    unread = {
        "libucx/lib/libucp.a": b"a" * 70,
        "libucx/bin/ucx_info": b"b" * 60,
        "librmm/include/rmm/x.hpp": b"h" * 50,
    }
    for name, content in {**kept, **copies, **unread, "libucx/lib/libucs.so.0": b"another"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert lib_setup.trim(tmp_path) == 90 + 80 + 70 + 60 + 50
    for name, content in {**kept, **copies}.items():
        assert (tmp_path / name).read_bytes() == content
    assert not any((tmp_path / name).exists() for name in unread)
    assert lib_setup.trim(tmp_path) == 0
