"""The loss scale against plain loops that know which gradients are bad."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from halfstep.errors import InputError
from halfstep.precision import COLLAPSE, LossScale, PrecisionPolicy, check_scale, prepare

Make = Callable[[list[torch.Tensor]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "fused sgd": partial(torch.optim.SGD, lr=0.1, fused=True),
    "fused sgd, momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "adamw": partial(torch.optim.AdamW, lr=0.1),
    "fused adamw": partial(torch.optim.AdamW, lr=0.1, fused=True),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.1),
}


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan() -> Iterator[None]:
    """So that whoever reads it is found."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def scale_of(policy: str) -> LossScale:
    return LossScale(PrecisionPolicy.parse(policy), "cpu")


def weight_of(*values: float) -> torch.Tensor:
    return torch.tensor(values or (1.0, -2.0, 3.0), requires_grad=True)


def loss_of(weight: torch.Tensor, step: int, *, bad: bool) -> torch.Tensor:
    """Another gradient in each step; that of a bad one is infinite."""
    slope = torch.arange(1.0, 1 + len(weight)) + step
    return (weight.square() * slope).sum() * (float("inf") if bad else 1.0)


def train(scale: LossScale, optimizer: torch.optim.Optimizer, weight: torch.Tensor, pattern: list[bool]) -> list[bool]:
    applied = []
    for bad in pattern:
        scale.backward(loss_of(weight, scale.steps, bad=bad))
        applied.append(bool(scale.step(optimizer)))
        optimizer.zero_grad()
    return applied


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("policy", ["16-mixed", "16-mixed,loss_scale=1024"])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pattern=st.lists(st.booleans(), min_size=1, max_size=8))
def test_good_gradients_move_the_weights_as_without_a_scale_and_bad_ones_nothing(
    name: str, policy: str, pattern: list[bool]
) -> None:
    """To the bit: powers of two come and go without rounding."""
    plain = weight_of()
    optimizer = OPTIMIZERS[name]([plain])
    for step, bad in enumerate(pattern):
        if not bad:
            loss_of(plain, step, bad=False).backward()
            optimizer.step()
            optimizer.zero_grad()
    weight, scale = weight_of(), scale_of(policy)
    optimizer = OPTIMIZERS[name]([weight])
    assert train(scale, optimizer, weight, pattern) == [not bad for bad in pattern]
    assert torch.equal(weight, plain)
    in_row = next((n for n, bad in enumerate(reversed(pattern)) if not bad), len(pattern))
    counted = (scale.steps, int(scale.skipped), int(scale.skipped_in_row))
    assert counted == (len(pattern), sum(pattern), in_row)
    assert int(scale.first_bad_step) == (pattern.index(True) if True in pattern else -1)
    assert scale.factor == (1024 if "1024" in policy else 2.0**16 / 2 ** sum(pattern))
    optimizer.zero_grad()
    loss_of(weight, 0, bad=False).backward()
    before = weight.detach().clone()
    optimizer.step()  # nothing of the scale is left in the optimizer
    assert not torch.equal(weight, before)


def test_a_whole_number_is_a_fixed_scale() -> None:
    scale, weight = LossScale(PrecisionPolicy(compute="fp16", loss_scale=1024), "cpu"), weight_of()
    train(scale, torch.optim.SGD([weight], lr=0.1), weight, [True, False])
    assert scale.factor == 1024


def test_the_norm_is_of_unscaled_gradients_and_clipped_after() -> None:
    scale, weight = scale_of("16-mixed"), weight_of(0.0, 0.0)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for slopes in ((1.0, 4.0), (2.0, 0.0)):  # micro-batches
        scale.backward((weight * torch.tensor(slopes)).sum())
    scale.step(optimizer, clip_norm=1.0)
    assert scale.grad_norm.item() == 5.0
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.6, -0.8]))


@pytest.mark.parametrize("policy", ["bf16-mixed", "fp32", "fp32,loss_scale=dynamic"])
def test_what_fp16_cannot_explain_stops_all_updates(policy: str) -> None:
    scale, weight = scale_of(policy), weight_of()
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    train(scale, optimizer, weight, [False, False])
    kept = weight.detach().clone()
    assert check_scale(scale) == []
    assert train(scale, optimizer, weight, [True, False, True, False]) == [False] * 4
    assert torch.equal(weight, kept)
    assert int(scale.first_bad_step) == 2
    assert [line.split(",")[0] for line in check_scale(scale)] == ["step 3: not finite"]
    scale.first_bad_step.fill_(-1)
    assert train(scale, optimizer, weight, [False]) == [True]
    assert not torch.equal(weight, kept)


def test_without_fp16_a_gradient_that_only_the_scale_made_infinite_is_just_left_out() -> None:
    scale, weight = scale_of("fp32,loss_scale=dynamic"), weight_of(1e-30)
    optimizer = torch.optim.SGD([weight], lr=1e-35)
    for _ in range(3):
        scale.backward((weight * 1e34).sum())  # times 65536 it is beyond fp32, times 16384 not
        scale.step(optimizer)
        optimizer.zero_grad()
    assert (int(scale.first_bad_step), int(scale.skipped), int(scale.skipped_in_row)) == (-1, 1, 0)


class Waits(TorchDispatchMode):
    """Counts how often the host asks for a number of the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "first", "later"),
    [("fused adamw", 0, 0), ("fused sgd", 0, 0), ("fused sgd, momentum", 1, 0), ("sgd", 1, 1)],
)
def test_the_device_is_not_waited_for(name: str, first: int, later: int) -> None:
    scale, weight = scale_of("16-mixed"), weight_of()
    optimizer = OPTIMIZERS[name]([weight])
    for waits in (first, later, later):
        with Waits() as found:
            scale.backward(loss_of(weight, scale.steps, bad=False))
            scale.step(optimizer, clip_norm=1.0)
        assert found.count == waits
        optimizer.zero_grad()


def test_a_loop_goes_on_from_its_state_as_if_it_had_not_stopped() -> None:
    def begin() -> tuple[LossScale, torch.Tensor, torch.optim.Optimizer]:
        weight = weight_of()
        return scale_of("16-mixed"), weight, torch.optim.SGD([weight], lr=0.1)

    whole, weight, optimizer = begin()
    train(whole, optimizer, weight, [True, False, True, True, False])
    first, before, optimizer = begin()
    train(first, optimizer, before, [True, False, True])
    state = json.loads(json.dumps(first.state_dict()))
    second, after, optimizer = begin()
    after.data.copy_(before)
    second.load_state_dict(state)
    train(second, optimizer, after, [True, False])
    assert torch.equal(after, weight)
    assert second.state_dict() == whole.state_dict()


# What a checkpoint of training in 16-mixed held before LossScale was there.
OLDER = {
    "step": 40,
    "policy": "16-mixed",
    "scaler": {
        "scale": 2048.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2000,
        "_growth_tracker": 17,
    },
    "skipped": 5,
    "skipped_in_row": 2,
    "switched_at": None,
}


def test_older_states_load() -> None:
    scale = scale_of("16-mixed")
    scale.load_state_dict(OLDER)
    assert scale.state_dict() == OLDER
    other = scale_of("bf16-mixed")  # a run that goes on in another type keeps its counts
    other.load_state_dict(OLDER)
    assert other.state_dict() == {**OLDER, "policy": "bf16-mixed", "scaler": {}}
    scale.load_state_dict({**OLDER, "scaler": {}})
    with pytest.raises(InputError, match=r"loss scale: the state lacks skipped, switched_at; expected"):
        scale.load_state_dict({name: OLDER[name] for name in ("step", "scaler", "skipped_in_row")})


def test_what_cannot_be_scaled_is_refused() -> None:
    with pytest.raises(InputError, match=r"loss scale: got auto, .* settle"):
        scale_of("auto")
    weight = torch.ones(3, dtype=torch.float16, requires_grad=True)
    scale = scale_of("16-true,loss_scale=dynamic")
    scale.backward(weight.sum())
    with pytest.raises(InputError, match=r"fp16 weights, .* use 16-mixed"):
        scale.step(torch.optim.SGD([weight], lr=0.1))


def test_only_fp16_that_overflows_is_given_up() -> None:
    network = nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"loss scale: Linear is not prepared"):
        scale_of("16-mixed").to_bf16(network)
    for policy in ("fp32,loss_scale=dynamic", "bf16-mixed"):
        scale = scale_of(policy)
        prepare(network, scale.policy)
        with pytest.raises(InputError, match=rf"{policy} has no fp16 under a loss scale"):
            scale.to_bf16(network)
        assert (str(scale.policy), scale.switched_at) == (policy, None)


def test_a_scale_that_cannot_work_is_named() -> None:
    def lines(policy: str, pattern: list[bool]) -> list[str]:
        scale, weight = scale_of(policy), weight_of()
        train(scale, torch.optim.SGD([weight], lr=1e-3), weight, pattern)
        assert scale.collapsed == (pattern[-COLLAPSE:] == [True] * COLLAPSE)
        return check_scale(scale)

    assert lines("16-mixed", [True] * 5 + [False]) == []
    often = lines("16-mixed", [True, False] * 17)
    assert often == [
        "step 34: the loss scale fell to 0.5; below one the gradients overflow without it: go on in bf16, or lower the "
        "loss itself"
    ]
    collapsed = lines("16-mixed", [True] * COLLAPSE)
    assert collapsed == [
        "step 20: the last 20 updates were left out, and the loss scale is 0.0625; go on in bf16 (LossScale.to_bf16)"
    ]
    fixed = lines("16-mixed,loss_scale=4096", [True, False, True])
    assert fixed == [
        "step 3: 2 updates were left out at the fixed loss scale 4096, which never falls; use loss_scale=dynamic or a "
        "lower one"
    ]
    assert lines("16-mixed,loss_scale=4096", [True] * 21)[0].startswith("step 21: the last 21 updates were left out")
