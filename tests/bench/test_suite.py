"""`bench suite`, `bench compare --against` and `bench canary` from end to end, with small packages as revisions."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from halfstep.bench.cases import SUITE, WORKLOADS, Case
from halfstep.bench.gate import LOOKS
from halfstep.bench.race import Side, alone
from halfstep.bench.suite import groups_of
from halfstep.precision import PrecisionPolicy, Trial
from tests.bench.packages import MODELS, SLOWER, worktrees, write_package, write_repository
from tests.support.cli import HALFSTEP, run_cli


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A suite of the kernel, which starts in no time and computes the same in every precision."""
    slow = replace(WORKLOADS["kernel"], sizes=(30, 20))
    monkeypatch.setattr("halfstep.bench.suite.SUITE", {"kernel": slow, "nothing": slow})


def test_groups_are_what_is_asked_for() -> None:
    groups, notes = groups_of(["EqM-S/2", "encode"], [], ["fp32", "bf16-mixed", "amp"], "cpu")
    assert [group.baseline.name for group in groups] == [
        "EqM-S/2 at 128, fp32",
        "EqM-S/2 at 256, fp32",
        "encode at 64, fp32",
    ]
    assert [[case.precision for case in group.others] for group in groups] == [["bf16-mixed", "16-mixed"]] * 3
    assert all("emulated" in note for note in notes)
    (group,) = groups_of(["train"], [48], ["fp32"], "cpu")[0]
    assert group.baseline == Case("train", 48, "fp32", "cpu") and group.others == ()
    assert len(groups_of([], [64], ["fp32"], "cpu")[0]) == len(SUITE)


def test_auto_is_what_the_workload_itself_would_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = PrecisionPolicy(storage="fp16"), PrecisionPolicy.parse("bf16-true,storage=fp16")
    for faster, policy in ((0.9, slow), (2.0, fast)):
        monkeypatch.setattr(sys.modules["halfstep.precision.choose"], "choose", lambda device, task: fast)
        monkeypatch.setattr(Trial, "speedup", lambda trial, policy, faster=faster: faster)
        for workload in ("CDiT-S/2", "AutoencoderKL-small", "encode", "sample", "train", "stream"):
            (group,) = groups_of([workload], [64], [], "cpu")[0]
            assert [case.precision for case in group.others] == ([str(policy)] if policy == fast else [])


def test_what_is_not_known_is_named_with_the_nearest() -> None:
    assert "got 'EqM-S2'" in run_cli("bench", "suite", "--models", "EqM-S2", check=2).stderr
    assert "nearest is PeakNet-small" in run_cli("bench", "suite", "--models", "PeakNet", check=2).stderr
    unknown = run_cli("bench", "suite", "--models", "train", "--precisions", "bf16-mix", check=2).stderr
    assert "got 'bf16-mix'" in unknown and "nearest is bf16-mixed" in unknown
    assert "device: got 'nodevice'" in run_cli("bench", "suite", "--device", "nodevice", check=2).stderr


@pytest.mark.slow
def test_a_suite(tmp_path: Path, kernels: None) -> None:
    output = tmp_path / "suite.json"
    words = ["--models", "kernel", "--models", "nothing", "--sizes", 20, "--precisions", "bf16-mixed"]
    done = run_cli("bench", "suite", *words, "-o", output, "--tolerance", 0.5)
    result = json.loads(output.read_text())
    assert result["verdict"] == "fine" and result["canary"]["can_tell"]
    assert [row["case"] for row in result["rows"]] == ["kernel at 20, fp32", "kernel at 20, bf16-mixed"]
    plain, half = result["rows"]
    assert plain["against"] is None and half["against"]["verdict"] == "fine"
    assert half["against"]["pairs"] == len(half["against"]["log_ratios"]) == LOOKS[0]
    assert 0 < plain["p50_ms"] <= plain["p99_ms"]
    assert plain["peak_memory_mb"] >= plain["held_memory_mb"] > 50
    assert plain["energy_j"] is None and plain["energy_missing"] == "only of GPUs"
    assert plain["switches"]["threads"] == 1
    assert result["failed"].keys() == {"nothing at 20, fp32", "nothing at 20, bf16-mixed"}
    assert "nothing at 20, fp32: not measured: nothing at 20, fp32: KeyError: 'nothing'" in done.stderr
    assert "| kernel at 20, bf16-mixed |" in done.stdout
    assert "kernel at 20, fp32: 1.000 times" in run_cli("bench", "compare", output, output).stdout


def test_a_suite_of_which_nothing_could_be_measured(kernels: None) -> None:
    words = ["--models", "nothing", "--sizes", 20, "--precisions", "fp32", "--json"]
    result = json.loads(run_cli("bench", "suite", *words, check=2).stdout)
    assert result["verdict"] == "nothing measured" and result["rows"] == [] and result["canary"] is None


def test_what_there_is_nothing_to_compare_with_is_measured_too() -> None:
    side = Side(Case("kernel", 5, "fp32"))
    alone(side)
    assert len(side.blocks) == LOOKS[0]
    assert side.row()["calls"] == sum(len(block.calls_s) for block in side.blocks)


@pytest.mark.slow
def test_a_slower_working_tree_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfstep.bench.suite.SUITE", {"kernel": WORKLOADS["kernel"], "EqM-S/2": SUITE["EqM-S/2"]})
    write_repository(tmp_path)
    write_package(tmp_path / "src", init=SLOWER)
    words = ["bench", "compare", "--against", "HEAD", "--precisions", "fp32", "--json"]
    result = json.loads(run_cli(*words, cwd=tmp_path, check=1).stdout)
    (row,) = result["rows"]
    assert row["case"] == "kernel at 100, fp32"
    assert row["against"]["verdict"] == result["verdict"] == "slower"
    assert 1.1 < row["against"]["ratio"] < 3
    assert row["after"]["cost_ms"] > row["before"]["cost_ms"]
    assert result["canary"]["can_tell"]
    assert "HEAD: EqM-S/2 at 128, fp32: cannot import name 'EqM'" in result["absent"]["EqM-S/2 at 128, fp32"]
    assert result["against"]["commit"] == commit_of(tmp_path)
    assert len(worktrees(tmp_path)) == 1


def test_revisions_without_a_case_in_common(tmp_path: Path) -> None:
    write_repository(tmp_path, models="")
    write_package(tmp_path / "src")
    words = ["bench", "compare", "--against", "main", "--models", "PeakNet-small", "--precisions", "fp32"]
    done = run_cli(*words, cwd=tmp_path, check=2)
    assert "not measured: main: PeakNet-small at 128, fp32: cannot import name 'PeakNet'" in done.stderr
    assert len(worktrees(tmp_path)) == 1


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    words = ["bench", "compare", "--against"]
    assert "is not within a git checkout of halfstep" in run_cli(*words, "HEAD", cwd=tmp_path, check=2).stderr
    write_repository(tmp_path)
    for revision in ("none", "--help", "HEAD~3"):
        assert f"got '{revision}'; expected a revision" in run_cli(*words, revision, cwd=tmp_path, check=2).stderr
    subprocess.run(["git", "mv", "src", "lib"], cwd=tmp_path, check=True)
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *identity, "commit", "-q", "-m", "Moved"], cwd=tmp_path, check=True)
    write_package(tmp_path / "src")
    assert "has no src/halfstep" in run_cli(*words, "HEAD", cwd=tmp_path, check=2).stderr
    assert len(worktrees(tmp_path)) == 1


@pytest.mark.slow
def test_ctrl_c_leaves_no_worktree_and_no_process(tmp_path: Path) -> None:
    endless = MODELS.replace("return self.layer(x)", "import time; time.sleep(60)")
    write_repository(tmp_path, models=endless)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    words = ["bench", "compare", "--against", "HEAD", "--models", "PeakNet-small", "--precisions", "fp32"]
    env = {**os.environ, "TMPDIR": str(scratch)}
    process = subprocess.Popen(
        [*HALFSTEP, *words],
        cwd=tmp_path,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's is ignored
    )
    while not (begun := children(process.pid)):  # a worker was started
        assert process.poll() is None
        time.sleep(0.05)
    assert len(worktrees(tmp_path)) == 2
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    assert len(worktrees(tmp_path)) == 1
    assert list(scratch.iterdir()) == []
    assert not any(Path(f"/proc/{pid}").exists() for pid in begun)


@pytest.mark.slow
def test_the_canary_on_a_busy_machine() -> None:
    result = json.loads(run_cli("bench", "canary", "--trials", 2, "--json").stdout)
    assert result["false_alarms"] == result["called_fine"] == 0
    assert result["found"] >= 1
    assert sum(result["same"]["verdicts"].values()) == 2
    assert sum(result["ten_percent_more"]["verdicts_by_wall_seconds"].values()) == 1
    assert 1.05 < result["ten_percent_more"]["ratio"]["median"] < 1.15


def children(pid: int) -> list[int]:
    """The worker processes of a command."""
    found = subprocess.run(["pgrep", "-P", str(pid), "-f", "worker.py"], capture_output=True, text=True, check=False)
    return [int(word) for word in found.stdout.split()]


def commit_of(root: Path) -> str:
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    return found.stdout.strip()
