"""Blocks of calls: what is counted, and the figures made of it."""

import subprocess
import sys

import pytest
import torch

from halfstep.bench.timing import Block, calibrate, run_block, summary

BURN = "import time\nwhile time.process_time() < 0.3: pass\nprint(time.process_time())"


def test_a_block_is_so_many_calls() -> None:
    calls: list[int] = []
    block = run_block(lambda: calls.append(1), 7, "cpu")
    assert len(calls) == len(block.calls_s) == 7
    assert block.cost_s == block.cpu_s
    assert sum(block.calls_s) <= block.wall_s
    assert block.energy_j is None


def test_the_time_of_children_counts() -> None:
    spent: list[float] = []

    def call() -> None:
        spent.append(float(subprocess.run([sys.executable, "-c", BURN], capture_output=True, check=True).stdout))

    assert run_block(call, 1, "cpu").cost_s >= spent[0] >= 0.3


def test_a_block_is_found_that_takes_as_long_as_it_must() -> None:
    work = list(range(2000))
    calls: list[int] = []
    count = calibrate(lambda: calls.append(sum(work)), "cpu", 0.02)
    assert count > 1
    assert len(calls) > count + 1  # the first calls, and at least one block of that size


def test_figures_of_a_call() -> None:
    blocks = [
        Block(cost_s=0.2, cpu_s=0.2, wall_s=0.4, calls_s=[0.1, 0.3], energy_j=3.0),
        Block(cost_s=0.3, cpu_s=0.4, wall_s=0.5, calls_s=[0.2, 0.3], energy_j=1.0),
        Block(cost_s=0.9, cpu_s=0.8, wall_s=2.0, calls_s=[1.0, 1.0], energy_j=2.0),
    ]
    assert summary(blocks) == {
        "calls": 6,
        "p50_ms": 300.0,
        "p99_ms": 1000.0,
        "cost_ms": 150.0,
        "cpu_ms": 200.0,
        "wall_ms": 250.0,
        "energy_j": 1.0,
    }
    assert summary([Block(0.1, 0.1, 0.1, [0.1])])["energy_j"] is None


def test_a_gpu_has_its_own_clock() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    x = torch.ones(2048, 2048, device="cuda")
    block = run_block(lambda: x @ x, 20, "cuda:0")
    assert len(block.calls_s) == 20
    assert block.cost_s == pytest.approx(sum(block.calls_s))
    assert 0 < block.cost_s <= block.wall_s
