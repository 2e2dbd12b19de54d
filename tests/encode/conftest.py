"""A toy world to change."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def world(toy_world: Path, tmp_path: Path) -> Path:
    return shutil.copytree(toy_world, tmp_path / "world")
