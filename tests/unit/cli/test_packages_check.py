"""The command line refuses to run beside another project's `placement` or `traces`."""

from collections.abc import Callable
from pathlib import Path

import pytest

from loraserve import __version__
from loraserve.cli.packages_check import OWN_PACKAGES, check_own_packages, package_file, packages_problem


def finder(folder: Path, texts: dict[str, str]) -> Callable[[str], Path | None]:
    """A lookup of packages written into `folder`."""
    for name, text in texts.items():
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(text, encoding="utf-8")
    return lambda name: folder / name / "__init__.py" if name in texts else None


def own(version: str = "1.2.3") -> dict[str, str]:
    return dict.fromkeys(OWN_PACKAGES, f'"""Ours."""\n\n__version__ = "{version}"\n')


def test_the_installed_packages_agree() -> None:
    assert check_own_packages() is None


def test_own_packages_of_one_version_pass(tmp_path: Path) -> None:
    assert packages_problem("1.2.3", finder(tmp_path, own())) is None


@pytest.mark.parametrize("name", OWN_PACKAGES)
def test_another_version_is_named(tmp_path: Path, name: str) -> None:
    texts = own() | {name: '__version__ = "9.9"\n'}
    problem = packages_problem("1.2.3", finder(tmp_path, texts))
    assert problem is not None
    assert f"package {name}" in problem
    assert "version 9.9" in problem
    assert "1.2.3" in problem


def test_a_package_without_a_version_is_somebody_elses(tmp_path: Path) -> None:
    problem = packages_problem("1.2.3", finder(tmp_path, own() | {"traces": "import json\n"}))
    assert problem is not None
    assert "another project's" in problem
    assert str(tmp_path / "traces") in problem


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    texts = own()
    del texts["placement"]
    problem = packages_problem("1.2.3", finder(tmp_path, texts))
    assert problem is not None
    assert "placement of loraserve 1.2.3 is missing" in problem


def test_a_lookup_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "noisy_package").mkdir()
    (tmp_path / "noisy_package" / "__init__.py").write_text("raise SystemExit(3)\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert package_file("noisy_package") == tmp_path / "noisy_package" / "__init__.py"


def test_the_version_is_the_distribution_s() -> None:
    assert all(
        f'__version__ = "{__version__}"' in path.read_text(encoding="utf-8")
        for path in map(package_file, OWN_PACKAGES)
        if path is not None
    )
