"""Code that is hard to simulate, to prepare or to audit."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn

from halfstep.errors import InputError
from halfstep.precision import PrecisionPolicy, audit, prepare, simulate
from tests.support.planted import relative_error


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def three(*shape: int) -> list[torch.Tensor]:
    return [seeded(*shape, seed=number) for number in range(3)]


def native(module: nn.Module, policy: str | PrecisionPolicy) -> Any:
    policy = PrecisionPolicy.parse(policy) if isinstance(policy, str) else policy
    return prepare(copy.deepcopy(module), policy, channels_last=False)


@torch.no_grad()
def holds(module: nn.Module, *calls: torch.Tensor) -> PrecisionPolicy:
    """The policy of an audit, which real fp16 agrees with on other inputs."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        report = audit(module, list(calls))
        assert report.met
        for call in calls:
            other = call + 0.1 * seeded(*call.shape, seed=9) if call.is_floating_point() else call
            assert relative_error(native(module, report.policy)(other), module(other)) <= 1e-2
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return report.policy


class Of(nn.Module):
    def __init__(self, function: Callable[[Any, torch.Tensor], Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def large(layer: nn.Module, factor: float = 1e6) -> nn.Module:
    with torch.no_grad():
        layer.weight *= factor
    return layer


def test_fused_attention_hides_no_overflow() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    large(layer.linear1, 1e4)
    large(layer.linear2, 1e2)
    assert "linear2+" in holds(layer, *three(2, 5, 16)).islands
    behind = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    outer = Of(lambda m, x: m.n(m.t(m.i(x))), i=large(nn.Linear(16, 16)), t=behind, n=nn.LayerNorm(16)).eval()
    assert "i+" in holds(outer, *three(2, 5, 16)).islands
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("policy", ["16-true", "16-true,islands=1", "16-mixed"])
def test_inference_mode(policy: str) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)), seeded(4, 8)
    with simulate(net, policy) as run, torch.inference_mode():
        found = run(x)
    with torch.inference_mode():
        expected = native(net, policy)(x)
    assert found.dtype is torch.float32
    assert relative_error(found, expected) < 2e-3

    class Inferring(nn.Sequential):
        forward = torch.inference_mode()(nn.Sequential.forward)

    assert holds(Inferring(large(nn.Linear(8, 8)), nn.LayerNorm(8)), *three(4, 8)).islands == ("0+", "1")


def test_results_whose_shape_is_changed_in_place() -> None:
    torch.manual_seed(0)
    matrix = nn.Linear(8, 5, bias=False)
    net = Of(lambda m, x: (y := x @ m.l.weight.T) * len(y) + torch.cat([y[:2], y[2:].unsqueeze_(0)[0]]), l=matrix)
    expected = native(net, "16-true")(seeded(8))
    with torch.no_grad(), simulate(net, "16-true") as run:
        assert relative_error(run(seeded(8)), expected) < 2e-3
    gru = nn.GRU(8, 8, batch_first=True)
    prepared = native(gru, "16-true")
    prepared(seeded(2, 5, 8))[0].sum().backward()
    with simulate(gru, "16-true") as run:
        run(seeded(2, 5, 8))[0].sum().backward()
        found = run.gradients()["weight_hh_l0"]
    assert relative_error(found, prepared.weight_hh_l0.grad.float()) < 1e-2


def test_shared_weights_stay_shared_and_islands_get_their_own() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm = nn.Embedding(9, 8), nn.LayerNorm(8)
            self.head = nn.Linear(8, 9, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = self.head(self.norm(self.table(ids)))
            return made

    torch.manual_seed(0)
    tied, ids = Tied(), torch.arange(9)
    prepared = native(tied, "16-true")
    prepared(ids).square().sum().backward()
    with simulate(tied, "16-true") as run:
        run(ids).square().sum().backward()
        found = run.gradients()
    assert set(found) == {"table.weight", "norm.weight", "norm.bias"}
    assert relative_error(found["table.weight"], prepared.table.weight.grad.float()) < 1e-2
    half = native(tied, "16-true,islands=head")
    assert (half.head.weight.dtype, half.table.weight.dtype) == (torch.float32, torch.float16)
    assert half(ids).isfinite().all()
    assert tied.head.weight is tied.table.weight


@pytest.mark.parametrize("policy", ["16-mixed", "fp32", "bf16-true,islands=0"])
def test_what_is_written_within_the_block_is_gone_behind_it(policy: str) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with simulate(net, policy) as run:
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        run(seeded(8, 4)).square().sum().backward()
        optimizer.step()
        net.added = nn.Linear(2, 2)
    assert not hasattr(net, "added")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_torchscript_is_refused_before_anything_is_touched() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(InputError, match="is of TorchScript"), simulate(nn.Sequential(scripted), "16-true"):
        pass
    assert scripted(seeded(2, 4)).isfinite().all()


def test_many_layers_that_fill_in_large_values_are_all_found() -> None:
    def attend(m: Any, x: torch.Tensor) -> torch.Tensor:
        scores = m.q(x) @ m.k(x).transpose(-1, -2)
        causal = torch.ones(scores.shape[-2:]).triu(1).bool()
        made: torch.Tensor = scores.masked_fill(causal, -1e9).softmax(-1) @ m.v(x)
        return made

    torch.manual_seed(0)
    layers = [Of(attend, q=nn.Linear(16, 16), k=nn.Linear(16, 16), v=nn.Linear(16, 16)) for _ in range(12)]
    net = Of(lambda m, x: sum((layer(x) for layer in m.children()), x), **{f"l{n}": a for n, a in enumerate(layers)})
    report = audit(net.eval(), three(2, 6, 16))
    assert report.met
    assert set(report.islands) == {f"l{n}" for n in range(12)}
    assert report.forwards <= 80


def test_only_what_reads_values_is_an_island() -> None:
    def blind(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x) * 1e6
        torch.zeros_like(y)
        made: torch.Tensor = m.n(y)
        return made

    assert holds(Of(blind, a=nn.Linear(8, 8), n=nn.LayerNorm(8)), *three(4, 8)).islands == ("a+", "n")


def test_an_error_that_forward_swallows_blames_nobody() -> None:
    def fails(_: Any, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("on purpose")

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x) * 1e6
        with suppress(RuntimeError):
            m.b(x)
        made: torch.Tensor = m.n(y)
        return made

    net = Of(forward, a=nn.Linear(8, 8), b=Of(fails), n=nn.LayerNorm(8))
    assert audit(net, three(4, 8)).islands == ["a", "n"]


def test_code_that_half_types_lack_is_a_finding() -> None:
    spectrum = Of(lambda m, x: torch.fft.irfft(torch.fft.rfft(x)))
    net = nn.Sequential(nn.Linear(8, 8), spectrum, nn.Linear(8, 8))
    report = audit(net, three(4, 8))
    assert report.islands == ["1"]
    assert [(f.event.kind, f.event.module) for f in report.findings] == [("fails", "1")]


def test_a_constant_of_fp32_makes_an_operand_fp32_and_not_all() -> None:
    net = nn.Sequential(Of(lambda m, x: m.l(x) @ torch.eye(8), l=nn.Linear(8, 8)), nn.Linear(8, 8))
    report = audit(net, three(4, 8))
    assert report.met
    assert report.policy.islands == ("0.l+",)
    assert report.findings[0].event.kind == "two types"


def test_inputs_that_are_written_to() -> None:
    calls = three(4, 8)
    before = [call.clone() for call in calls]
    report = audit(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8)), calls)
    assert report.met
    assert all(torch.equal(a, b) for a, b in zip(calls, before, strict=True))


def test_a_module_in_train_mode_keeps_its_statistics() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).train()
    audit(net, three(16, 8))
    assert net[1].num_batches_tracked == 0
    assert not net[1].running_mean.any()


def test_what_is_held_out_is_said() -> None:
    net = Of(lambda m, x: m.n(m.a(x) * 1e3), a=nn.Linear(16, 16), n=nn.LayerNorm(16))
    report = audit(net, [seeded(4, 16), seeded(4, 16, seed=1), 1e3 * seeded(4, 16, seed=2)])
    assert report.met
    assert report.held_out == 0  # the islands are made from it
    assert "on the inputs it was made from" in report.verdict
    shifted = Of(lambda m, x: (x + 1000) - 1000)
    easy = audit(shifted, seeded(4, 8), held_out=torch.full((4, 8), 64.0), tolerance=1e-3)
    assert not easy.met  # though the held-out input is exact


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Of(lambda m, x: (x * 0 - 1).log()), "returns NaN, or nothing finite"),
        (Of(lambda m, x: x * 0), "returns only zeros"),
        (native(nn.Linear(8, 8), "16-mixed"), "is prepared for 16-mixed"),
    ],
)
def test_what_says_nothing_is_refused(net: nn.Module, message: str) -> None:
    with pytest.raises(InputError, match=message):
        audit(net, seeded(2, 8))


def test_names_with_brackets_and_those_that_no_policy_can_have() -> None:
    net = nn.Sequential()
    net.add_module("a[0]", large(nn.Linear(8, 8)))
    net.add_module("n", nn.LayerNorm(8))
    report = audit(net, three(4, 8))
    assert report.islands == ["a[0]", "n"]
    assert native(net, PrecisionPolicy.parse(str(report.policy)))(seeded(2, 8)).isfinite().all()
    odd = nn.Sequential()
    odd.add_module("a|b", large(nn.Linear(8, 8)))
    with pytest.raises(InputError, match="cannot be named in a policy"):
        audit(odd, three(4, 8))


@torch.no_grad()
def test_islands_by_lists_and_by_second_names() -> None:
    net = nn.Module()
    net.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
    net.again = net.blocks[0]
    half = native(Of(lambda m, x: m.inner.blocks[1](m.inner.blocks[0](x)), inner=net), "16-true,islands=inner.blocks")
    assert half(seeded(2, 8)).isfinite().all()
    assert half.inner.blocks[1].weight.dtype is torch.float32
    second = native(Of(lambda m, x: m.inner.again(x), inner=net), "16-true,islands=inner.again")
    assert second.inner.blocks[0].weight.dtype is torch.float32


@torch.no_grad()
def test_outputs_of_all_kinds_are_cast() -> None:
    made = native(Of(lambda m, x: (torch.max(x, 1), defaultdict(list, a=[x]))), "16-true")(seeded(2, 8))
    assert made[0].values.dtype is torch.float32
    assert made[0].indices.dtype is torch.int64
    assert made[1]["a"][0].dtype is torch.float32
    assert made[1]["b"] == []
