"""The process of a case: what it answers, and that whatever goes wrong in it is named."""

from pathlib import Path

import pytest

from halfstep.bench.cases import Case
from halfstep.bench.worker import AbsentError, Worker, WorkerError
from tests.bench.packages import write_package

KERNEL = Case("kernel", 3, "fp32")
PEAKNET = Case("PeakNet-small", 32, "fp32")


def test_blocks_of_a_case() -> None:
    with Worker(KERNEL) as worker:
        worker.ready()
        worker.take(5)
        blocks = [worker.block() for _ in range(2)]
        assert worker.energy_missing() == "only of GPUs"
        assert worker.calibrate(0.01) > 1
    assert [len(block.calls_s) for block in blocks] == [5, 5]
    assert all(block.cost_s > 0 for block in blocks)


def test_what_a_case_finds_switched() -> None:
    with Worker(Case("PeakNet-small", 64, "bf16-mixed")) as worker:
        worker.ready()
        found = worker.switches()
        peak = worker.peak()
    assert found["autocast"] == "bfloat16"
    assert found["threads"] == 1
    assert found["grad"] is False and found["deterministic"] is False and found["compile"] is False
    assert {"tf32_matmul", "tf32_cudnn", "cudnn_benchmark"} <= found.keys()
    assert peak.peak_mb >= peak.held_mb > 50


def test_a_case_that_raises_is_named() -> None:
    with Worker(Case("PeakNet-small", 33, "fp32")) as worker:
        worker.ready()
        with pytest.raises(WorkerError, match=r"PeakNet-small at 33, fp32: InputError: .*divisible by 32"):
            worker.take(1)


def test_a_process_that_ends_is_named(tmp_path: Path) -> None:
    write_package(tmp_path, models="import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with (
        Worker(PEAKNET, tmp_path, name="HEAD") as worker,
        pytest.raises(WorkerError, match="HEAD: its process was killed by SIGKILL"),
    ):
        worker.ready()
    write_package(tmp_path, models="import os, sys\nsys.stderr.write('no luck\\n'); sys.stderr.flush(); os._exit(7)")
    with Worker(PEAKNET, tmp_path) as worker, pytest.raises(WorkerError, match=r"ended with 7 \(no luck\)"):
        worker.ready()


def test_another_revision_is_measured_by_the_same_code(tmp_path: Path) -> None:
    write_package(tmp_path)
    with Worker(PEAKNET, tmp_path) as worker:
        worker.ready()
        worker.take(2)
        assert len(worker.block().calls_s) == 2
    with (
        Worker(Case("EqM-S/2", 32, "fp32"), tmp_path) as worker,
        pytest.raises(AbsentError, match="cannot import name 'EqM'"),
    ):
        worker.ready()


def test_a_package_from_elsewhere_is_not_measured(tmp_path: Path) -> None:
    with Worker(KERNEL, tmp_path) as worker, pytest.raises(WorkerError, match=r"its process imported .*; expected"):
        worker.ready()


def test_what_a_case_prints_is_no_answer(tmp_path: Path) -> None:
    write_package(
        tmp_path, models="print('loading ...', flush=True)\nimport os; os.write(1, b'{}\\n')\n" + "PeakNet = 1"
    )
    with Worker(PEAKNET, tmp_path) as worker, pytest.raises(WorkerError, match="TypeError: 'int' object"):
        worker.ready()
