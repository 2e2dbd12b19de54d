"""`bench live`, small."""

import json

import pytest

from tests.support.cli import run_cli


@pytest.mark.slow
def test_the_shipped_world_is_timed() -> None:
    result = json.loads(
        run_cli("bench", "live", "--frames", 8, "--rounds", 1, "--steps", 1, "--soak", 20, "--json").stdout
    )
    assert {"model alone, fp32", "engine, fp32"} <= result["frames_per_second"].keys()
    assert all(rate > 0 for rate in result["frames_per_second"].values())
    assert result["resident_mb"] > 50 and "growth_after_the_first_tenth" in result
