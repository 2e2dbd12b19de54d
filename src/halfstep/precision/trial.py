"""Trials: the work itself in two policies. Small networks get less of a half type than the probe's layers promise."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from halfstep.precision.apply import prepare
from halfstep.precision.audits.gradients import mean_square
from halfstep.precision.memory import with_batch
from halfstep.precision.policy import PrecisionPolicy

LARGE_BYTES = 256 << 20  # of fp32 weights: what is larger is not copied for a trial, its layers are as the probe's
_LONG_S = 2.0  # a call that takes longer has layers that are as large as the probe's
_PAIRS, _FEWEST_PAIRS = 8, 2
_PAIRED_S = 2.0  # of all pairs, where there are not too few then
_ENOUGH_S = 0.02  # of calls in a row, for the clock


@dataclass(frozen=True)
class Trial:
    """`make`: sets the work up in a policy, for one call of it on `device`. `lane`: it computes in one thread of a CPU,
    as lanes do."""

    make: Callable[[PrecisionPolicy], Callable[[], object]]
    device: torch.device
    lane: bool = False

    def speedup(self, policy: PrecisionPolicy) -> float | None:
        """How many times as fast as in fp32 the work is in `policy`: the fastest of a few blocks of calls each, in
        turn. None when a call takes so long that the probe speaks for it."""
        with torch.random.fork_rng(devices=[]), _threads(1 if self.lane else None):
            exact = self.make(PrecisionPolicy())
            if (first := _seconds(exact, 1, self.device)) > _LONG_S:
                return None
            half = self.make(policy)
            half()
            once = min(first, _seconds(exact, 1, self.device))  # the first call also sets things up
            calls = math.ceil(_ENOUGH_S / once)
            pairs = min(_PAIRS, max(_FEWEST_PAIRS, int(_PAIRED_S / (2 * calls * once))))
            best = {exact: math.inf, half: math.inf}
            for _ in range(pairs):
                for call in best:
                    best[call] = min(best[call], _seconds(call, calls, self.device))
        return best[exact] / best[half]


def network_trial(
    network: nn.Module,
    example: tuple[Any, ...],
    batch: int,
    device: torch.device,
    *,
    train: bool = False,
    lane: bool = False,
) -> Trial | None:
    """Of a forward call of a copy of `network`, which is in fp32, or with `train` of forward and backward pass, for
    noise like the inputs `example`, of `batch` samples; None of a network that is large."""
    if sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers())) > LARGE_BYTES:
        return None

    def make(policy: PrecisionPolicy) -> Callable[[], object]:
        prepared = prepare(copy.deepcopy(network).to(device).train(train), policy)
        given = tree_map_only(torch.Tensor, lambda x: _noise(x).to(device), with_batch(example, batch))

        def forward() -> object:
            with torch.no_grad():
                return prepared(*given)

        def step() -> object:
            loss = mean_square(prepared(*given))
            torch.autograd.backward(loss)
            return loss

        return step if train else forward

    return Trial(make, device, lane)


def _noise(like: torch.Tensor) -> torch.Tensor:
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype)
    return torch.randn(like.shape, dtype=like.dtype, generator=torch.Generator().manual_seed(0))


def _seconds(call: Callable[[], object], calls: int, device: torch.device) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
