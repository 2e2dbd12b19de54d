"""kill -9, a full disk, Ctrl-C: what was committed stays, and the same command finishes the work."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from halfstep.store import DatasetStore, verify
from tests.conftest import run_cli
from tests.encode.test_encode import content, run, same

REPOSITORY = Path(__file__).parents[2]

# Encodes sys.argv[1] into sys.argv[2] with tiny shards and dies at the sys.argv[3]-th function call of any thread.
DYING_RUN = """
import os, signal, sys, threading
from pathlib import Path
from halfstep.store.writer import DatasetWriter
from tests.encode.test_encode import run
DatasetWriter.__init__.__kwdefaults__["shard_bytes"] = 9000
source, output, stop = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
run(source, output.with_name("warm"))  # the calls of imports are not to be counted
calls = 0
def tick(frame, event, argument):
    global calls
    calls += 1
    if calls == stop:
        os.kill(os.getpid(), signal.SIGKILL)
threading.setprofile(tick)
sys.setprofile(tick)
run(source, output)
sys.setprofile(None)
print(calls)
"""


def _dying_run(source: Path, output: Path, stop: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", DYING_RUN, str(source), str(output), str(stop)]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)


@pytest.mark.slow
def test_a_killed_run_is_finished_by_the_next(toy_world: Path, tmp_path: Path) -> None:
    """Wherever it dies: the store verifies, holds no wrong latent, loses nothing, and a rerun completes it."""
    whole = _dying_run(toy_world, tmp_path / "whole" / "s", -1)
    assert whole.returncode == 0, whole.stderr
    expected = content(tmp_path / "whole" / "s")
    stages = set()
    for trial, stop in enumerate(np.random.default_rng(4).integers(1, int(whole.stdout), size=10)):
        store = tmp_path / str(trial) / "s"
        assert _dying_run(toy_world, store, int(stop)).returncode == -signal.SIGKILL
        there = {}
        if (store / "manifest.json").exists():
            assert verify(store).ok
            there = content(store)
        assert all(np.array_equal(expected[key], there[key]) for key in there)
        stages.add(len(there))
        report = run(toy_world, store)
        assert report.skipped >= sum(map(len, there.values()))
        assert same(content(store), expected)
        assert verify(store).ok
        assert not any((store / "staging").iterdir())
    assert len(stages) > 1


def test_a_full_disk_is_one_clear_line_and_the_store_stays(toy_world: Path, tmp_path: Path) -> None:
    run(toy_world, tmp_path / "s")
    before = content(tmp_path / "s")
    more = shutil.copytree(toy_world, tmp_path / "more")
    for i in range(3):
        shutil.copytree(toy_world / f"walk_00{i}", more / f"again_{i}")
        (more / f"again_{i}" / "0.jpg").write_bytes((toy_world / "walk_001" / "5.jpg").read_bytes())

    command = [sys.executable, "-m", "halfstep", "encode", "-i", str(more), "-o", str(tmp_path / "s"), "--size", "32"]
    command += ["--precision", "fp32", "--storage", "fp32"]
    limited = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert limited.returncode == 1
    last = limited.stderr.strip().splitlines()[-1]
    assert "File too large; what was committed is intact; free some space and run the same command again" in last
    assert same(content(tmp_path / "s"), before)
    assert verify(tmp_path / "s").ok
    assert run(more, tmp_path / "s").items == 60


@pytest.mark.slow
def test_control_c_keeps_what_was_complete(tmp_path: Path, toy_world: Path) -> None:
    many = tmp_path / "many"
    for i in range(300):
        shutil.copytree(toy_world / f"walk_00{i % 3}", many / f"w{i:03d}")
    command = [sys.executable, "-m", "halfstep", "encode", "-i", str(many), "-o", str(tmp_path / "s"), "--size", "224"]
    process = subprocess.Popen([*command, "--quiet"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    staging = tmp_path / "s" / "staging" / "00000" / "latents.spool"
    while not (staging.exists() and staging.stat().st_size > 500_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().startswith("halfstep: interrupted; what was complete is kept (encode, train and sample go on")
    assert "\n" not in errors.strip()
    assert verify(tmp_path / "s").ok
    kept = len(DatasetStore.open(tmp_path / "s"))
    assert 0 < kept < 3000
    again = run_cli("encode", "-i", many, "-o", tmp_path / "s", "--size", 224, "--quiet")
    assert f"{kept} unchanged" in again.stdout
    assert len(DatasetStore.open(tmp_path / "s")) == 3000


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes where others may not")
def test_a_read_only_folder_is_one_clear_line(toy_world: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    result = run_cli("encode", "-i", toy_world, "-o", tmp_path / "locked" / "s", check=1)
    assert "the store must be writable" in result.stderr
