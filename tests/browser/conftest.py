"""A browser for all tests here, and the pages that they open, each as the project writes it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser.chromium import Browser, find_chromium, running
from tests.browser.made_pages import capacity_report, experiment_report, replay_report, simulation_report


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium, or a skip that says that there is none."""
    program = find_chromium()
    if program is None or shutil.which("bash") is None:
        pytest.skip("no chromium here; Debian's package of that name has it, and CI installs it")
    with running(program) as started:
        yield started


@pytest.fixture(scope="session")
def reports(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One page of each kind; none is written where no browser is."""
    folder = tmp_path_factory.mktemp("reports")
    return {
        "capacity": capacity_report(folder / "capacity"),
        "experiment": experiment_report(folder / "experiment"),
        "replay": replay_report(folder / "replay"),
        "simulation": simulation_report(folder / "simulation"),
    }
