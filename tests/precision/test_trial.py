"""`auto` takes a half type back where the work itself is not faster in it."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from halfstep.precision import PrecisionPolicy, Trial, network_trial, settle
from halfstep.precision.trial import LARGE_BYTES

CPU = torch.device("cpu")
HALF = PrecisionPolicy(params="bf16", compute="bf16", storage="fp16", reason="Measured.")


@pytest.fixture(autouse=True)
def fast_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which the probe likes bf16."""
    monkeypatch.setattr(sys.modules["halfstep.precision.choose"], "choose", lambda device, task: HALF)


def work(fp32: int, half: int) -> Trial:
    """So many products in each of the two."""

    def make(policy: PrecisionPolicy) -> Callable[[], object]:
        matrix, products = torch.ones(128, 128), half if policy.compute == "bf16" else fp32
        return lambda: [matrix @ matrix for _ in range(products)]

    return Trial(make, CPU, lane=True)


def test_half_is_kept_where_the_work_is_faster_in_it() -> None:
    assert work(30, 10).speedup(HALF) == pytest.approx(3, rel=0.5)
    policy = settle("auto", "cpu", "sample", trial=lambda: work(30, 10)).policy
    assert policy == HALF and policy.reason.startswith("Measured. This network itself: bf16 ")


@pytest.mark.parametrize("half", [10, 30])
def test_half_is_taken_back_where_it_is_not(half: int) -> None:
    policy, notes = settle("auto,islands=head", "cpu", "sample", trial=lambda: work(10, half))
    assert policy == PrecisionPolicy(storage="fp16", islands=("head",)) and notes == ()
    assert policy.reason.endswith("x, so it stays in fp32.")


def test_nothing_is_tried_where_the_choice_is_made_already() -> None:
    def never() -> Trial:
        raise AssertionError("was tried")

    assert settle("bf16-true", "cpu", "sample", trial=never).policy.params == "bf16"
    assert settle("auto", "cpu", "sample", "bf16-true", never).policy.params == "bf16"


def test_long_and_large_work_is_left_to_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        large = nn.Linear(1024, LARGE_BYTES // 4096)
    assert network_trial(large, (torch.empty(1, 1024),), 1, CPU) is None
    monkeypatch.setattr("halfstep.precision.trial._LONG_S", 0.0)
    assert work(10, 30).speedup(HALF) is None
    assert settle("auto", "cpu", "sample", trial=lambda: work(10, 30)).policy == HALF


class Watched(nn.Module):
    """Notes what it is called with and whether it is training."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        SEEN.add((tuple(x.shape), str(x.dtype), str(n.dtype), self.training, torch.is_grad_enabled()))
        return self.linear(x)


SEEN: set[tuple[object, ...]] = set()


@pytest.mark.parametrize("train", [False, True])
def test_a_network_is_tried_as_it_will_run(train: bool) -> None:
    network = Watched().eval()
    before, state = network.state_dict(), torch.random.get_rng_state()
    trial = network_trial(network, (torch.empty(1, 8), torch.zeros(1, dtype=torch.int64)), 3, CPU, train=train)
    assert trial is not None
    SEEN.clear()
    assert trial.speedup(HALF) is not None
    assert {((3, 8), f"torch.{kind}", "torch.int64", train, train) for kind in ("float32", "bfloat16")} == SEEN
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.linear.weight.dtype == torch.float32 and network.linear.weight.grad is None
    assert not network.training and torch.equal(torch.random.get_rng_state(), state)
