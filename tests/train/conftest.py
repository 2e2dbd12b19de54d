"""What all tests of training train on."""

from pathlib import Path

import pytest

from halfstep.data.sources import SourceConfig
from halfstep.encode import EncodeOptions, encode


@pytest.fixture(scope="session")
def latents(toy_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 30 frames of three walks, [16, 4, 4]."""
    output = tmp_path_factory.mktemp("latents") / "store"
    encode([SourceConfig(path=toy_world)], EncodeOptions(output, size=(32, 32), precision="fp32", storage="fp32"))
    return output
