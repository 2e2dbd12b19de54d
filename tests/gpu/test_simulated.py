"""What was simulated on the processor, on a device with half arithmetic of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from halfstep.bench.simulate import networks
from halfstep.precision import PrecisionPolicy, audit, prepare, simulate
from tests.precision.test_simulate import tensor_of
from tests.support.planted import relative_error, sdxl_like_vae
from tests.support.planted_nets import KINDS, planted_net

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_device(module: nn.Module, policy: str | PrecisionPolicy) -> nn.Module:
    policy = PrecisionPolicy.parse(policy) if isinstance(policy, str) else policy
    return prepare(copy.deepcopy(module).to("cuda"), policy, channels_last=False)


@contextmanager
def not_finite(module: nn.Module) -> Iterator[set[str]]:
    """The names of modules whose results are not finite within the block."""
    names = {child: name for name, child in module.named_modules()}
    found: set[str] = set()

    def look(child: nn.Module, _: object, output: object) -> None:
        if isinstance(output, torch.Tensor) and not output.isfinite().all():
            found.add(names[child])

    handles = [child.register_forward_hook(look) for child in module.modules()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def test_the_same_modules_overflow() -> None:
    vae = sdxl_like_vae()
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with not_finite(vae) as simulated, simulate(vae, "16-true") as run:
        run(pixels)
    real = on_device(vae, "16-true")
    with not_finite(real) as found:
        real(pixels.cuda())
    assert found == simulated
    assert "decoder.mid_block.resnets.0" in found


@pytest.mark.parametrize("policy", ["16-true", "bf16-true"])
@torch.no_grad()
def test_errors_are_those_of_the_device(policy: str, tmp_path: Path) -> None:
    for name, module, inputs in networks(tmp_path):
        exact = tensor_of(module.eval()(*inputs))
        with simulate(module, policy) as run:
            simulated = relative_error(tensor_of(run(*inputs)), exact)
        found = tensor_of(on_device(module, policy)(*(value.cuda() for value in inputs)))
        assert 0.8 <= relative_error(found.cpu(), exact) / simulated <= 1.25, name


@pytest.mark.parametrize("seed", range(len(KINDS)))
@torch.no_grad()
def test_policies_that_were_simulated_hold(seed: int) -> None:
    planted = planted_net(seed)
    report = audit(planted.net, [planted.inputs(0), planted.inputs(1)], held_out=[planted.inputs(2)])
    half: Callable[[torch.Tensor], torch.Tensor] = on_device(planted.net, report.policy)
    errors = [
        relative_error(half(planted.inputs(n).cuda()).cpu(), planted.net(planted.inputs(n))) for n in range(10, 14)
    ]
    assert max(errors) <= report.tolerance
