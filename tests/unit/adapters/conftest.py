"""Fixtures of the adapter tests."""

from pathlib import Path

import pytest

from loraserve.adapters import BaseModel
from tests.support.adapter_maker import AdapterMaker, small_base


@pytest.fixture
def make(tmp_path: Path) -> AdapterMaker:
    return AdapterMaker(tmp_path / "made")


@pytest.fixture(scope="session")
def base() -> BaseModel:
    return small_base()
