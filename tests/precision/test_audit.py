"""Audits of networks whose trouble is known."""

from __future__ import annotations

import copy
import json
import math
import os
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from halfstep.errors import InputError
from halfstep.precision import AuditReport, PrecisionPolicy, Target, audit, audit_gradients, prepare, rescale, simulate
from tests.support.planted import Decoder, relative_error, sdxl_like_vae, t5_stack
from tests.support.planted_nets import KINDS, PlantedNet, planted_net

TOLERANCE = 1e-2
NETS = int(os.environ.get("HALFSTEP_NETS", "70"))


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error_on(net: nn.Module, policy: PrecisionPolicy, x: torch.Tensor) -> float:
    with torch.no_grad():
        expected = net(x)
        with simulate(net, policy) as run:
            return relative_error(run(x), expected)


class Outcome:
    def __init__(self, planted: PlantedNet, report: AuditReport) -> None:
        places = [f.event.module for f in report.findings] + report.islands
        self.found = any(place.startswith(name) for place in places for name in planted.planted)
        self.cured = report.met
        self.beyond = [
            island
            for island in report.islands
            if not any(island == n or island.startswith(f"{n}.") or n.startswith(f"{island}.") for n in planted.planted)
        ]
        self.fresh = [error_on(planted.net, report.policy, planted.inputs(number)) for number in range(10, 18)]


def outcome_of(seed: int) -> Outcome:
    planted = planted_net(seed)
    assert not error_on(planted.net, PrecisionPolicy.parse("16-true"), planted.inputs(0)) <= TOLERANCE
    before = {name: value.clone() for name, value in planted.net.state_dict().items()}
    inputs = [planted.inputs(0), planted.inputs(1)]
    report = audit(planted.net, inputs, tolerance=TOLERANCE, held_out=[planted.inputs(2)])
    assert all(torch.equal(value, before[name]) for name, value in planted.net.state_dict().items())
    assert report.forwards <= 80
    return Outcome(planted, report)


@pytest.mark.parametrize("seed", range(len(KINDS)))
def test_planted_trouble_is_found_and_cured_and_little_more_is_fp32(seed: int) -> None:
    outcome = outcome_of(seed)
    assert outcome.found
    assert outcome.cured
    assert len(outcome.beyond) <= 2
    assert max(outcome.fresh) <= TOLERANCE


@pytest.mark.slow
def test_of_many_nets_all_troubles_are_found_and_nearly_all_cured() -> None:
    """HALFSTEP_NETS says how many."""
    outcomes = [outcome_of(seed) for seed in range(100, 100 + NETS)]
    assert all(outcome.found for outcome in outcomes)
    assert sum(outcome.cured for outcome in outcomes) >= 0.99 * NETS
    assert sum(len(outcome.beyond) <= 2 for outcome in outcomes) >= 0.95 * NETS
    assert max(len(outcome.beyond) for outcome in outcomes) <= 5
    fresh = [error for outcome in outcomes for error in outcome.fresh]
    assert all(math.isfinite(error) for error in fresh)
    assert sum(max(outcome.fresh) <= TOLERANCE for outcome in outcomes) >= 0.98 * NETS


@pytest.mark.parametrize("seed", range(len(KINDS)))
@torch.no_grad()
def test_a_policy_that_was_found_by_simulation_holds_in_real_fp16(seed: int) -> None:
    planted = planted_net(seed)
    report = audit(planted.net, [planted.inputs(0), planted.inputs(1)], held_out=[planted.inputs(2)])
    half = prepare(copy.deepcopy(planted.net), PrecisionPolicy.parse(str(report.policy)))
    errors = [relative_error(half(planted.inputs(n)), planted.net(planted.inputs(n))) for n in range(10, 14)]
    assert max(errors) <= TOLERANCE


LATENTS = [seeded(1, 4, 8, 8, seed=number) for number in range(3)]


def test_a_decoder_like_sdxls_needs_its_stream_in_fp32() -> None:
    decoder = Decoder(sdxl_like_vae())
    report = audit(decoder, LATENTS)
    assert report.met
    assert report.error < 3e-3
    assert "decoder.mid_block.resnets.0.conv2+" in report.policy.islands
    assert "decoder.mid_block.resnets.1.norm1" in report.islands
    assert "decoder.mid_block.resnets.0.conv1" not in report.islands
    kinds = {finding.event.module: finding.event.kind for finding in report.findings}
    assert kinds["decoder.mid_block.resnets.1.norm1"] == "reads"
    assert all(finding.harm == math.inf for finding in report.findings)
    assert any(finding.event.line.startswith("resnet.py:") for finding in report.findings)
    quick = audit(decoder, LATENTS[:2], prune=False)
    assert quick.forwards <= 20
    assert quick.met


def test_rescaling_its_stream_needs_no_island_and_changes_no_bit_of_fp32() -> None:
    decoder = Decoder(sdxl_like_vae())
    report = audit(decoder, LATENTS, cure="rescale")
    assert (report.met, report.islands) == (True, [])
    assert report.error < 3e-3
    with torch.no_grad():
        expected = decoder(LATENTS[0])
        rescale(decoder, report.rescaling)
        assert torch.equal(decoder(LATENTS[0]), expected)
        half = prepare(copy.deepcopy(decoder), report.policy, channels_last=False)
        assert relative_error(half(LATENTS[0]), expected) < 3e-3
        rescale(decoder, report.rescaling.inverse())
        assert torch.equal(decoder(LATENTS[0]), expected)
    assert (
        report.rescaling.eps["decoder.conv_norm_out"]
        == 2 * report.rescaling.weights["decoder.up_blocks.1.resnets.1.conv2"]
    )
    with pytest.raises(InputError, match=r"'nothing' has no weight"):
        rescale(decoder, type(report.rescaling)({"nothing": 1}))


def test_what_sees_its_scale_is_not_rescaled() -> None:
    class Sees(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
            with torch.no_grad():
                self.first.weight *= 1e6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            stream = self.first(x)
            made: torch.Tensor = self.norm(stream) + functional.softsign(stream)
            return made

    report = audit(Sees(), [seeded(3, 4), seeded(3, 4, seed=1)], cure="rescale")
    assert not report.rescaling
    assert report.met
    assert "see their scale" in report.verdict
    assert report.islands == ["first", "norm"]


def test_a_t5_needs_what_its_library_keeps() -> None:
    model = t5_stack(3e5)
    for part in (model, model.encoder):
        part._keep_in_fp32_modules = None
    inputs = [{"input_ids": torch.arange(24).reshape(2, 12) + shift} for shift in range(3)]
    report = audit(model, inputs)
    assert report.met
    assert report.islands == [f"encoder.block.{n}.layer.1.DenseReluDense.wo" for n in (1, 2)]


class Mild(nn.Module):
    """Nothing is wrong with it, but that it rounds."""

    def __init__(self, depth: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + functional.silu(layer(x))
        return x


def test_nothing_is_fp32_where_nothing_is_wrong() -> None:
    torch.manual_seed(0)
    mild, inputs = Mild(), [seeded(4, 32), seeded(4, 32, seed=1)]
    report = audit(mild, inputs)
    assert report.policy == PrecisionPolicy.parse("16-true")
    assert not report.findings
    assert "no island" in report.verdict
    assert report.error == pytest.approx(max(error_on(mild, report.policy, x) for x in inputs), rel=1e-6)


def test_contributions_add_up_to_the_error() -> None:
    torch.manual_seed(0)
    mild = Mild()
    report = audit(mild, seeded(64, 32))
    predicted = math.sqrt(sum(r.reaches**2 for r in report.ranges if r.reaches is not None))
    with torch.no_grad():  # weights are not among the operations
        for parameter in mild.parameters():
            parameter.copy_(parameter.half().float())
    measured = error_on(mild, PrecisionPolicy.parse("16-true"), seeded(64, 32).half().float())
    assert predicted == pytest.approx(measured, rel=0.25)


def test_spread_rounding_is_said_and_not_listed() -> None:
    torch.manual_seed(0)
    report = audit(Mild(12), [seeded(16, 32), seeded(16, 32, seed=1)], tolerance=3e-4)
    assert not report.met
    assert "rounding is spread" in report.verdict
    assert report.islands == []
    assert report.error > 3e-4


def test_a_tolerance_that_no_policy_meets_gets_the_best_there_is() -> None:
    report = audit(Mild(2), seeded(4, 32), tolerance=1e-9)
    assert not report.met
    assert "is not met" in report.verdict
    assert 1e-9 < report.error < 1e-2


def test_types_are_tried_in_turn() -> None:
    torch.manual_seed(0)
    net = Mild(8)
    report = audit(net, [seeded(4, 32), seeded(4, 32, seed=1)], types=("bf16", "fp16"), tolerance=2e-3)
    assert report.target.type == "fp16"
    assert report.met
    assert audit(net, seeded(4, 32), target=Target("bf16"), tolerance=3e-2).policy.params == "bf16"


def test_values_near_the_limit_are_risks() -> None:
    class Near(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4, bias=False)
            nn.init.eye_(self.fc.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = self.fc(x * 20000.0) / 20000.0
            return made

    report = audit(Near(), torch.linspace(-1, 1, 8).reshape(2, 4))
    assert report.islands == []
    assert {risk.operation for risk in report.risks} >= {"mul"}
    assert report.risks[0].largest == 20000.0


def test_a_fill_that_overflows_is_cured() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.v = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores = self.q(x) @ x.transpose(1, 2)
            causal = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            made: torch.Tensor = scores.masked_fill(causal, -1e9).softmax(-1) @ self.v(x)
            return made

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attends()
            self.out = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = self.out(self.inner(x))
            return made

    report = audit(Outer(), [seeded(2, 5, 8), seeded(2, 5, 8, seed=1)])
    assert report.met
    assert report.islands == ["inner"]
    assert any(f.event.operation == "masked_fill" and "test_audit.py:" in f.event.line for f in report.findings)


def test_code_that_reads_memory_is_named() -> None:
    class Reads(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(x.detach().numpy() * 2)

    net = nn.Sequential(nn.Linear(4, 4), Reads(), nn.Linear(4, 4))
    report = audit(net, seeded(3, 4))
    assert report.opaque == ("module 1",)
    assert report.met


def test_the_report_is_json() -> None:
    planted = planted_net(0)
    content = json.loads(json.dumps(audit(planted.net, [planted.inputs(0), planted.inputs(1)]).to_dict()))
    assert {"policy", "islands", "error", "tolerance", "events", "forwards", "verdict"} <= content.keys()
    assert PrecisionPolicy.parse(content["policy"]).islands
    assert content["events"][0]["harm"] == "inf"


def integers() -> nn.Module:
    class Counts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.argmax(-1)

    return Counts()


@pytest.mark.parametrize(
    ("net", "inputs", "message"),
    [
        (nn.Linear(4, 4).half(), seeded(2, 4), "weight: is float16; expected fp32 weights"),
        (nn.Linear(4, 4), seeded(2, 4).half(), "input 0: is float16; expected fp32 inputs"),
        (nn.Linear(4, 4), seeded(2, 4) / 0, "input 0: is not finite"),
        (nn.Linear(4, 4), seeded(2, 5), "cannot be called with the inputs in fp32"),
        (nn.Linear(4, 4), {"x": seeded(2, 4)}, "cannot be called with the inputs in fp32"),
        (nn.Linear(4, 4), [], "got no inputs"),
        (nn.Linear(4, 4), seeded(2, 4).to("meta"), "input 0: is on meta, the module on cpu"),
        (nn.Sequential(nn.Linear(4, 4), nn.Dropout()).train(), seeded(2, 4), "gives another result each time"),
        (integers(), seeded(2, 4), "returns no floating-point tensor"),
    ],
)
def test_what_cannot_be_audited_is_named(net: nn.Module, inputs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        audit(net, inputs)


def test_weights_that_are_not_finite_are_named() -> None:
    net = nn.Linear(4, 4)
    net.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match="weight: has NaN"):
        audit(net, seeded(2, 4))
    for wrong in ({"tolerance": 0.0}, {"cure": "magic"}, {"target": "fp8"}, {"types": ("int8",)}):
        with pytest.raises(InputError, match="got"):
            audit(nn.Linear(4, 4), seeded(2, 4), **wrong)


def test_gradients_and_the_scale_to_start_from() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 4)), seeded(64, 8)
    net[0].weight.grad = torch.ones(64, 8)

    def small(output: torch.Tensor) -> torch.Tensor:
        return output.square().mean() * 1e-6

    report = audit_gradients(net, x, small)
    assert torch.equal(net[0].weight.grad, torch.ones(64, 8))
    values = torch.cat([value.flatten() for value in torch.autograd.grad(small(net(x)), list(net.parameters()))])
    assert report.largest >= values.abs().max()
    shares = list(report.lost.values())
    assert shares == sorted(shares, reverse=True)
    assert report.lost[1.0] > 0.9
    assert report.lost[min(k for k in report.lost if k >= report.scale)] < 0.01
    assert 2**12 <= report.largest * report.scale < 2**13  # three bits below the limit of 2^16
    assert audit_gradients(net, x, small, type="bf16").scale == 1
    with pytest.raises(InputError, match="expected a finite scalar"):
        audit_gradients(net, x, lambda output: output)
    with pytest.raises(InputError, match="no parameter requires a gradient"):
        audit_gradients(nn.ReLU(), x)
