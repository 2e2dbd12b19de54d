"""The checks of precision, each against the thing itself: numbers that moved, bytes that are held, types."""

import copy
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import nn

from halfstep.errors import InputError
from halfstep.precision import (
    Movement,
    PrecisionPolicy,
    Stalled,
    check_autocast,
    check_types,
    find_failure,
    prepare,
)

# --- movement ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average_type", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer_type", [torch.optim.SGD, torch.optim.AdamW])
def test_the_shares_are_those_of_all_numbers(
    weight_type: torch.dtype, average_type: torch.dtype, optimizer_type: type[torch.optim.Optimizer]
) -> None:
    weights = {name: torch.randn(8, 9).to(weight_type).requires_grad_() for name in "ab"}
    average = {name: (weight.detach() + torch.randn(8, 9) * 0.1).to(average_type) for name, weight in weights.items()}
    optimizer = optimizer_type([*weights.values()], lr=2e-3)
    before = [torch.stack([values[name].detach().double() for name in "ab"]) for values in (weights, average)]
    movement = Movement(weights, average)
    pushes = torch.randn(2, 8, 9).round()  # nothing pushes a third of them
    for weight, push in zip(weights.values(), pushes, strict=True):
        weight.grad = push.to(weight_type)
    optimizer.step()
    for name in "ab":
        average[name].lerp_(weights[name].detach().to(average_type), 0.01)
    after = [torch.stack([values[name].detach().double() for name in "ab"]) for values in (weights, average)]
    still = (after[0] == before[0]) & (pushes != 0)
    away = (after[0] - before[1]).abs() > 1e-3 * after[0].abs()
    expected = [float(still.sum() / (pushes != 0).sum()), float((away & (after[1] == before[1])).sum() / away.sum())]
    stalled = movement.stalled(optimizer)
    assert [stalled.weights, stalled.average] == pytest.approx(expected, abs=1e-4)
    assert (stalled.weights > 0.05) == (weight_type is torch.bfloat16)
    assert (stalled.average > 0.05) == (average_type is not torch.float32)


@pytest.mark.parametrize(
    ("optimizer_type", "share"),
    [
        # Below one, half a step of bf16 is 2^-9: 1e-4 moves nothing of it, nor does a gradient of 1 to 19 times that.
        (torch.optim.Adam, 1.0),
        (partial(torch.optim.SGD, momentum=0.9), 19 / 99),
    ],
)
def test_the_first_moment_tells_what_was_pushed_when_the_gradients_are_gone(
    optimizer_type: Callable[..., torch.optim.Optimizer], share: float
) -> None:
    weight = torch.ones(100, dtype=torch.bfloat16, requires_grad=True)
    optimizer = optimizer_type([weight], lr=1e-4)
    movement = Movement({"weight": weight})
    (weight * torch.arange(100.0)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    assert movement.stalled(optimizer) == Stalled(round(share, 4), None)


def test_lines_only_where_most_is_lost() -> None:
    assert Stalled(0.5, 0.5).lines() == []
    assert Stalled(0.51, None).lines() == [
        "weights: 51% of their updates are lost to rounding; keep them in fp32, as mixed policies do, or raise the "
        "learning rate"
    ]
    assert Stalled(0.0, 0.93).lines() == [
        "average: 93% of its updates are lost to rounding; keep it in fp32, or lower its decay"
    ]


# --- types ------------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """A layer, a norm that is kept, a head, a table that is no module's weight."""

    keep_in_fp32 = ("table",)

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)
        self.register_buffer("table", torch.ones(4))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.layer(x)))


def network(policy: str = "bf16-true,islands=norm") -> nn.Module:
    return prepare(Network(), PrecisionPolicy.parse(policy))


@pytest.mark.parametrize("policy", ["bf16-true,islands=norm", "bf16-mixed,islands=norm|head", "fp32", "16-true"])
def test_what_prepare_made_is_as_it_was_made(policy: str) -> None:
    for moved in (network(policy).to("cpu"), network(policy).half(), copy.deepcopy(network(policy)).double()):
        assert check_types(moved) == []
    assert check_types(nn.Sequential(nn.Linear(2, 2), network(policy))) == []  # others' parts are not looked at
    compiled = torch.compile(network(policy), backend="eager")
    assert check_types(compiled) == []


def test_a_replaced_module_is_named() -> None:
    changed = network()
    changed.layer = nn.Linear(4, 4)
    assert check_types(changed) == [
        "layer.weight: is float32; bf16-true,islands=norm has bfloat16 there: prepare again",
        "layer.bias: is float32; bf16-true,islands=norm has bfloat16 there: prepare again",
    ]
    assert check_types(prepare(changed, PrecisionPolicy.parse("bf16-true,islands=norm"))) == []


def test_a_replaced_island_is_named_also_where_its_types_are_right() -> None:
    changed = network("bf16-mixed,islands=norm")
    changed.norm = nn.LayerNorm(4)
    outer = nn.ModuleDict({"net": changed})
    assert check_types(outer) == [
        "net.norm: an island of bf16-mixed,islands=norm, put there after prepare; prepare the whole again"
    ]
    del changed.norm
    with pytest.raises(InputError, match="'norm' matches no module of Network"):
        check_types(outer)


def test_a_cast_child_assigned_weights_and_a_half_table_are_named() -> None:
    cast = network("bf16-mixed")
    cast.head.half()
    assert [line.partition(":")[0] for line in check_types(cast)] == ["head.weight", "head.bias"]
    assigned = network()
    assigned.load_state_dict({**Network().state_dict(), "norm.bias": torch.zeros(4).double()}, assign=True)
    assert [line.partition(";")[0] for line in check_types(assigned)] == [
        "layer.weight: is float32",
        "layer.bias: is float32",
        "norm.bias: is float64",
        "head.weight: is float32",
        "head.bias: is float32",
    ]
    halved = prepare(Network().half(), PrecisionPolicy.parse("16-true"))  # prepare leaves what is kept as it finds it
    assert check_types(halved) == ["table: is float16; 16-true has float32 there: prepare again"]


def test_modules_that_were_prepared_on_their_own_have_their_own_policy() -> None:
    outer = nn.ModuleDict({"a": network("bf16-true"), "b": network("16-true")})
    assert check_types(outer) == []
    outer["a"].layer = prepare(nn.Linear(4, 4), PrecisionPolicy.parse("fp32"))
    assert check_types(outer) == []
    outer["b"].layer.float()
    assert [line.partition(":")[0] for line in check_types(outer)] == ["b.layer.weight", "b.layer.bias"]


def test_a_module_that_is_not_prepared_is_refused() -> None:
    with pytest.raises(InputError, match=r"Linear is not prepared; call prepare"):
        check_types(nn.Linear(2, 2))


# --- the cache of autocast --------------------------------------------------------------------------------------------


class Iteration:
    """Training or inference of two layers of 64 x 64, 16640 bytes of weights in bf16."""

    def __init__(self) -> None:
        self.network = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.1)
        self.batch = torch.randn(4, 64)

    def train(self) -> None:
        self.network(self.batch).float().square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train_in_a_region(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.network(self.batch).float().square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def infer(self) -> torch.Tensor:
        return self.network(self.batch)

    def infer_in_a_cycle(self) -> None:
        results: list[object] = [self.network(self.batch)]
        results.append(results)

    def infer_from_new_weights(self) -> torch.Tensor:
        return self.batch @ torch.randn(64, 500, requires_grad=True)


@pytest.fixture
def region() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


ADVICE = "open the autocast region anew in each iteration, in inference under torch.inference_mode"


@pytest.mark.usefixtures("region")
def test_casts_of_old_weights_are_found() -> None:
    iteration = Iteration()
    assert check_autocast(iteration.train) == [
        "autocast: 0.0166 MB of casts outlive an iteration, of weights that were updated since: products go on with "
        f"the old ones; {ADVICE}"
    ]
    before = iteration.infer()
    iteration.train()
    assert torch.equal(iteration.infer(), before)  # the trap itself: an update that changes nothing
    torch.clear_autocast_cache()
    assert not torch.equal(iteration.infer(), before)


@pytest.mark.usefixtures("region")
def test_casts_that_inference_keeps_are_found() -> None:
    kept = [f"autocast: 0.0166 MB of casts outlive an iteration; {ADVICE}"]
    iteration = Iteration()
    iteration.infer()
    assert check_autocast(iteration.infer) == kept
    assert check_autocast(iteration.infer_in_a_cycle) == kept
    with torch.no_grad():
        assert check_autocast(iteration.infer) == kept
    with torch.inference_mode():
        iteration.batch = iteration.batch.clone()
        assert check_autocast(iteration.infer) == []


@pytest.mark.usefixtures("region")
def test_a_cache_that_grows_is_found() -> None:
    assert check_autocast(Iteration().infer_from_new_weights) == [
        f"autocast: 0.128 MB of casts outlive an iteration, and each adds 0.064 MB; {ADVICE}"
    ]


def test_a_region_an_iteration_keeps_nothing() -> None:
    iteration = Iteration()
    kept: list[torch.Tensor] = []
    assert check_autocast(iteration.train_in_a_region) == []
    assert check_autocast(iteration.train) == []
    prepared = prepare(iteration.network, PrecisionPolicy.parse("bf16-mixed"))
    assert check_autocast(lambda: kept.append(prepared(iteration.batch))) == []  # its graph keeps casts, no cache does
    assert check_autocast(iteration.train) == []


# --- where it broke ---------------------------------------------------------------------------------------------------


def test_the_first_thing_that_is_not_finite_is_named() -> None:
    x = torch.randn(3, 4)

    def broken(at: int, value: float) -> nn.Module:
        chain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        with torch.no_grad():
            chain[at].weight.fill_(value)
        return chain

    def loss(chain: nn.Module) -> torch.Tensor:
        return chain(x).square()

    assert find_failure(broken(1, 1.0), [loss]) is None
    assert find_failure(broken(1, float("nan")), [loss]) == "the weight 1.weight (float32)"
    assert find_failure(broken(1, 3e38), [loss]) == "the output of 1 (float32)"
    assert find_failure(broken(2, 1e20), [loss]) == "the loss, though not the network's output,"
    steep = [lambda chain: (chain(x) * 1e-30).square() * 1e38 * 1e38]
    assert find_failure(broken(2, 1e-3), steep) == "the gradient of 2.bias (float32)"
