"""What goes wrong in half precision, made to happen in small trainings, and found as a user's own loop finds it."""

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from halfstep.precision import (
    COLLAPSE,
    LossScale,
    Movement,
    PrecisionPolicy,
    check_scale,
    check_types,
    find_failure,
    prepare,
    probe,
    settle,
)

pytestmark = pytest.mark.slow

Loss = Callable[[nn.Module], torch.Tensor]

INPUTS = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
TARGETS = torch.stack([INPUTS[:, 0] * 2 - INPUTS[:, 3], INPUTS.sum(1)], 1)


def network(policy: str) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 2))
    prepare(layers, PrecisionPolicy.parse(policy))
    return layers


def squares(layers: nn.Module) -> torch.Tensor:
    return (layers(INPUTS) - TARGETS).square().mean()


def train(layers: nn.Module, scale: LossScale, optimizer: torch.optim.Optimizer, steps: int, loss_of: Loss) -> float:
    for _ in range(steps):
        loss = loss_of(layers)
        scale.backward(loss)
        scale.step(optimizer, clip_norm=1.0)
        optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize("fused", [True, False])
def test_a_loss_scale_that_collapses_is_counted_named_and_given_up(fused: bool) -> None:
    """The loss is so steep that its gradients are beyond fp16 at any scale on the way to one."""

    def steep(layers: nn.Module) -> torch.Tensor:
        return squares(layers) * 1e9

    layers = network("16-mixed")
    scale = LossScale(PrecisionPolicy.parse("16-mixed"), "cpu")
    optimizer = torch.optim.AdamW(layers.parameters(), lr=1e-2, fused=fused)
    before = copy.deepcopy(layers.state_dict())
    train(layers, scale, optimizer, COLLAPSE, steep)
    assert (int(scale.skipped), int(scale.skipped_in_row), scale.factor) == (20, 20, 2.0**-4)
    assert all(torch.equal(value, before[name]) for name, value in layers.state_dict().items())
    assert scale.collapsed
    assert check_scale(scale) == [
        "step 20: the last 20 updates were left out, and the loss scale is 0.0625; go on in bf16 (LossScale.to_bf16)"
    ]
    policy = scale.to_bf16(layers)
    assert str(policy) == "bf16-mixed,storage=fp16"
    assert (int(scale.skipped_in_row), check_scale(scale)) == (0, [])
    first = squares(layers).item()
    train(layers, scale, optimizer, 100, steep)
    assert squares(layers).item() < 0.1 * first
    assert (scale.collapsed, check_scale(scale), scale.factor, int(scale.skipped)) == (False, [], None, 20)
    state = scale.state_dict()
    assert (state["switched_at"], state["step"], state["policy"]) == (20, 120, str(policy))


@pytest.mark.parametrize(
    ("policy", "layer", "kind"),
    [("16-mixed", 2, "float16"), ("16-mixed", 4, "float16"), ("bf16-mixed", 2, "bfloat16"), ("fp32", 0, "float32")],
)
def test_an_overflow_is_named_by_its_layer(policy: str, layer: int, kind: str) -> None:
    """Weights that the type holds, and products that it does not."""
    layers = network(policy)
    scale = LossScale(PrecisionPolicy.parse(policy), "cpu")
    optimizer = torch.optim.SGD(layers.parameters(), lr=1e-3, fused=True)
    train(layers, scale, optimizer, 3, squares)
    assert int(scale.first_bad_step) == -1
    with torch.no_grad():
        layers[layer].weight.fill_(6e4 if kind == "float16" else 3e38)
    kept = copy.deepcopy(layers.state_dict())
    train(layers, scale, optimizer, 2, squares)
    assert int(scale.first_bad_step) == 3
    assert all(torch.equal(value, kept[name]) for name, value in layers.state_dict().items())
    assert find_failure(layers, [squares]) == f"the output of {layer} ({kind})"


def test_a_half_type_that_is_emulated_is_not_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement of a device on which half types take twenty times as long as fp32."""
    probe("cpu")
    kept = Path(os.environ["XDG_CACHE_HOME"]) / "halfstep"
    shutil.copytree(kept, tmp_path / "halfstep", ignore=shutil.ignore_patterns("*.tmp"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for path in (tmp_path / "halfstep").iterdir():
        values = json.loads(path.read_text())
        exact = values["types"]["fp32"]
        slow = {name: value * 20 if name.endswith("_ms") else value for name, value in exact.items()}
        values["types"] |= {"bf16": slow, "fp16": slow}
        path.write_text(json.dumps(values))
    policy, notes = settle("auto", "cpu", "train")
    assert (policy.compute, policy.loss_scale, notes) == ("fp32", None, ())
    assert "bf16 0.05x, fp16 0.05x; fp32 is the fastest sound type" in policy.explain()
    asked, notes = settle("16-mixed", "cpu", "train")  # by name it is used, and said to be slow
    assert asked.compute == "fp16"
    assert "fp16 is 20.0 times as slow as fp32" in notes[0]
    layers = network(str(policy))
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
    scale = LossScale(policy, "cpu")
    first = train(layers, scale, optimizer, 1, squares)
    assert train(layers, scale, optimizer, 50, squares) < 0.5 * first
    assert scale.factor is None


def test_an_average_in_bf16_stands_still_and_one_in_fp32_moves() -> None:
    layers = network("bf16-mixed")
    scale = LossScale(PrecisionPolicy.parse("bf16-mixed"), "cpu")
    optimizer = torch.optim.AdamW(layers.parameters(), lr=1e-2, fused=True)
    weights = dict(layers.named_parameters())
    averages = {
        kind: {name: weight.detach().to(kind, copy=True) for name, weight in weights.items()}
        for kind in (torch.bfloat16, torch.float32)
    }
    begun = copy.deepcopy(averages)

    def update(steps: int) -> None:
        for _ in range(steps):
            train(layers, scale, optimizer, 1, squares)
            for average in averages.values():
                for name, value in average.items():
                    value.lerp_(weights[name].detach().to(value.dtype), 1e-4)

    update(49)
    movements = {kind: Movement(weights, average) for kind, average in averages.items()}
    update(1)
    half, full = (movements[kind].stalled(optimizer) for kind in averages)
    assert half.average is not None and half.average > 0.8
    assert full.average is not None and full.average < 0.01
    assert [line.partition(":")[0] for line in half.lines()] == ["average"]
    assert full.lines() == []
    moved = {kind: float((averages[kind]["2.weight"] != begun[kind]["2.weight"]).float().mean()) for kind in averages}
    assert moved[torch.bfloat16] < 0.3 and moved[torch.float32] > 0.99


def test_weights_in_bf16_stand_still_and_those_in_fp32_learn() -> None:
    losses, lines = {}, {}
    for policy in ("bf16-true", "bf16-mixed"):
        layers = network(policy)
        scale = LossScale(PrecisionPolicy.parse(policy), "cpu")
        optimizer = torch.optim.AdamW(layers.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
        train(layers, scale, optimizer, 49, squares)
        movement = Movement(dict(layers.named_parameters()))
        losses[policy] = train(layers, scale, optimizer, 1, squares)
        lines[policy] = movement.stalled(optimizer).lines()
    assert losses["bf16-mixed"] < losses["bf16-true"]
    assert lines["bf16-mixed"] == []
    assert [line.partition(":")[0] for line in lines["bf16-true"]] == ["weights"]


def test_a_policy_that_a_replaced_layer_lost_is_found() -> None:
    """A head for another task, put into a network that is ready: its products are no longer in half, or fail."""
    layers = network("bf16-true,islands=0")
    with torch.no_grad():
        layers(INPUTS)
    assert check_types(layers.to("cpu").float()) == []  # pinned
    layers[4] = nn.Linear(32, 3)
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
        layers(INPUTS)
    lines = check_types(layers)
    assert [line.partition(":")[0] for line in lines] == ["4.weight", "4.bias"]
    assert "is float32; bf16-true,islands=0 has bfloat16 there" in lines[0]
    prepare(layers, PrecisionPolicy.parse("bf16-true,islands=0"))
    with torch.no_grad():
        assert layers(INPUTS).shape == (64, 3)
    assert check_types(layers) == []
    layers[0] = nn.Linear(8, 32).to("cpu")  # the island: its types are right, what it computes in is not
    assert check_types(layers) == [
        "0: an island of bf16-true,islands=0, put there after prepare; prepare the whole again"
    ]
