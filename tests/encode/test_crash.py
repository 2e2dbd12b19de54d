"""kill -9, a full disk, Ctrl-C: what was committed stays, and the same command finishes the work."""

import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from halfstep.store import DatasetStore, verify
from tests.support.cli import run_cli, run_process, run_script
from tests.support.encoding import content, run, same

# Encodes sys.argv[1] into sys.argv[2] with tiny shards and dies at the sys.argv[3]-th call of a function.
DYING_RUN = """
import sys
from pathlib import Path
from halfstep.store.writer import DatasetWriter
from tests.support.dying import Calls
from tests.support.encoding import run
DatasetWriter.__init__.__kwdefaults__["shard_bytes"] = 9000
source, output, last = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
run(source, output.with_name("warm"))  # the calls of imports are not to be counted
with Calls(last) as calls:
    run(source, output)
print(calls.made)
"""


@pytest.mark.slow
def test_a_killed_run_is_finished_by_the_next(toy_world: Path, tmp_path: Path) -> None:
    """Wherever it dies: the store verifies, holds no wrong latent, loses nothing, and a rerun completes it."""
    calls = int(run_script(DYING_RUN, toy_world, tmp_path / "whole" / "s", -1).stdout)
    expected = content(tmp_path / "whole" / "s")
    stages = set()
    # Threads do not always make as many calls; with nine tenths of them it is not done.
    for trial, stop in enumerate(np.random.default_rng(4).integers(1, int(0.9 * calls), size=10)):
        store = tmp_path / str(trial) / "s"
        run_script(DYING_RUN, toy_world, store, stop, check=-signal.SIGKILL)
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


@pytest.mark.slow
def test_a_full_disk_is_one_clear_line_and_the_store_stays(toy_world: Path, tmp_path: Path) -> None:
    run(toy_world, tmp_path / "s")
    before = content(tmp_path / "s")
    more = shutil.copytree(toy_world, tmp_path / "more")
    for i in range(3):
        shutil.copytree(toy_world / f"walk_00{i}", more / f"again_{i}")
        (more / f"again_{i}" / "0.jpg").write_bytes((toy_world / "walk_001" / "5.jpg").read_bytes())

    limited = run_process(
        *("encode", "-i", more, "-o", tmp_path / "s", "--size", 32, "--precision", "fp32", "--storage", "fp32"),
        check=1,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    last = limited.stderr.strip().splitlines()[-1]
    assert "File too large; what was complete before is kept; free some space and run the same command again" in last
    assert same(content(tmp_path / "s"), before)
    assert verify(tmp_path / "s").ok
    assert run(more, tmp_path / "s").items == 60


# The command line, which gets Ctrl-C when it has encoded 150 of 300 pictures.
INTERRUPTED_RUN = """
import os, signal
from halfstep.cli import main, progress
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
class Interrupting(progress.Bar):
    done = 0
    def advance(self, units=1, *, written=0):
        super().advance(units, written=written)
        self.done += units
        if self.done == 150:
            os.kill(os.getpid(), signal.SIGINT)
progress.Bar = Interrupting
main()
"""


@pytest.mark.slow
def test_control_c_keeps_what_was_complete(tmp_path: Path, toy_world: Path) -> None:
    many = tmp_path / "many"
    for i in range(30):
        shutil.copytree(toy_world / f"walk_00{i % 3}", many / f"w{i:02d}")
    command = ["encode", "-i", many, "-o", tmp_path / "s", "--size", 32, "--precision", "fp32", "--quiet"]
    errors = run_script(INTERRUPTED_RUN, *command, check=130).stderr
    assert errors.strip().startswith(
        "halfstep: interrupted; what was complete is kept (encode, train, sample and stream go on"
    )
    assert "\n" not in errors.strip()
    assert verify(tmp_path / "s").ok
    kept = len(DatasetStore.open(tmp_path / "s"))
    assert 0 < kept < 300
    assert f"{kept} unchanged" in run_cli(*command).stdout
    assert len(DatasetStore.open(tmp_path / "s")) == 300


def test_a_read_only_folder_is_one_clear_line(toy_world: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    command = ["encode", "-i", toy_world, "-o", tmp_path / "locked" / "s", "--precision", "fp32"]
    result = run_process(*command, check=1, unprivileged=True)
    assert "check its owner and mount, or name another place" in result.stderr
    assert not list((tmp_path / "locked").iterdir())
