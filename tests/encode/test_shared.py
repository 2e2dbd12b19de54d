"""Several processes share a run: torchrun and Ray."""

import json
import shutil
from pathlib import Path

import pytest

from halfstep.store import verify
from tests.support.cli import run_process, torchrun
from tests.support.encoding import content, run, same

OPTIONS = ["--precision", "fp32", "--storage", "fp32", "--size", "32", "--batch-size", "4", "--json", "--quiet"]


@pytest.mark.slow
def test_torchrun_gives_the_same_store_and_resumes_under_another_count(toy_world: Path, tmp_path: Path) -> None:
    world = shutil.copytree(toy_world, tmp_path / "world")
    run(world, tmp_path / "one")
    report = json.loads(torchrun(2, "encode", "-i", world, "-o", tmp_path / "two", *OPTIONS).stdout)
    assert (report["encoded"], report["items"], report["failed"]) == (30, 30, 0)
    assert report["source_bytes"] == sum(path.stat().st_size for path in world.rglob("*.jpg"))
    assert same(content(tmp_path / "two"), content(tmp_path / "one"))
    assert verify(tmp_path / "two").ok
    shutil.rmtree(world / "walk_000")
    shutil.copy(world / "walk_001" / "0.jpg", world / "walk_002" / "5.jpg")
    report = json.loads(torchrun(3, "encode", "-i", world, "-o", tmp_path / "two", *OPTIONS).stdout)
    assert (report["encoded"], report["skipped"], report["removed"], report["items"]) == (1, 19, 10, 20)
    assert run(world, tmp_path / "two").encoded == 0


@pytest.mark.slow
def test_a_failing_process_says_why_and_the_others_stop(toy_world: Path, tmp_path: Path) -> None:
    world = shutil.copytree(toy_world, tmp_path / "world")
    (world / "walk_001" / "4.jpg").write_bytes(b"")  # belongs to the second process
    result = torchrun(2, "encode", "-i", world, "-o", tmp_path / "s", "--strict", *OPTIONS, check=None)
    assert result.returncode != 0
    own = [line for line in result.stderr.splitlines() if line.startswith("halfstep: ")]
    assert own
    assert all("4.jpg: an empty file; stopped because of --strict" in line for line in own)
    assert verify(tmp_path / "s").ok


@pytest.mark.slow
def test_ray_gives_the_same_store(toy_world: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    world = shutil.copytree(toy_world, tmp_path / "world")
    run(world, tmp_path / "one")
    result = run_process("encode", "-i", world, "-o", tmp_path / "ray", *OPTIONS, "--ray")
    report = json.loads(result.stdout)
    assert (report["encoded"], report["items"], report["failed"]) == (30, 30, 0)
    assert report["source_bytes"] == sum(path.stat().st_size for path in world.rglob("*.jpg"))
    assert same(content(tmp_path / "ray"), content(tmp_path / "one"))
    assert verify(tmp_path / "ray").ok
    (world / "walk_001" / "3.jpg").write_bytes(b"")
    report = json.loads(run_process("encode", "-i", world, "-o", tmp_path / "ray", *OPTIONS, "--ray", check=1).stdout)
    assert (report["encoded"], report["failed"]) == (0, 1)
    assert same(content(tmp_path / "ray"), content(tmp_path / "one"))  # the frame that broke keeps its older latent
    strict = run_process("encode", "-i", world, "-o", tmp_path / "ray", *OPTIONS, "--ray", "--strict", check=1)
    assert "3.jpg: an empty file; stopped because of --strict" in strict.stderr.splitlines()[-1]
