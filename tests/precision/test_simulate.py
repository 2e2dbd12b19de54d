"""Simulated half arithmetic against this machine's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from halfstep.errors import InputError
from halfstep.models import FAMILIES, PeakNet
from halfstep.precision import PrecisionPolicy, Target, prepare, simulate, torch_dtype
from halfstep.precision.arithmetic import HalfTensor
from tests.support.planted import relative_error, sdxl_like_vae, t5_stack

EPS = {"16-true": 2.0**-11, "bf16-true": 2.0**-8}


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Of(nn.Module):
    """A function of x and a weight as a module."""

    def __init__(self, function: Callable[..., torch.Tensor], *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(seeded(*(shape or (8, 8)), seed=1))
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.weight)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


@torch.jit.script
def scripted(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x @ w) * 0.5 + x.relu()


def in_place(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = x @ w
    y += 1
    y[0].mul_(3)
    y[:, 1] = y[:, 2]
    z = torch.empty_like(y)
    z.copy_(y)
    return z.clamp_(-0.3, 2.7)


def masks(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    scores = x @ w
    scores = scores.masked_fill(scores < 0, torch.finfo(scores.dtype).min)
    return torch.where(scores < 0, torch.zeros((), dtype=x.dtype), scores.softmax(-1))


def attention(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    q = (x @ w).reshape(1, 2, 2, 8)
    return functional.scaled_dot_product_attention(q, q * 1.5, q + 0.25, is_causal=True)


def written_out(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    q, k, v = (*(x @ w).chunk(2, dim=0), x[:2])
    weights = (torch.einsum("id,jd->ij", q, k) / 8**0.5).softmax(dim=-1)
    return weights @ v


def factories(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    steps = torch.arange(8, dtype=x.dtype, device=x.device) * 0.3
    zeros, ones = x.new_zeros(4, 8), torch.ones(4, 8, dtype=x.dtype)
    return torch.cat([x * steps, zeros, torch.full_like(x, 0.1) + ones, torch.stack([x, x]).mean(0)])


def to_fp32_and_back(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    precise = x.float() ** 2
    return (precise.mean(-1, keepdim=True).rsqrt() * x.float()).to(x.dtype) * w[0] + precise.type_as(x)


def scattered(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    index = torch.tensor([[0, 1, 1, 2]] * 4)
    summed = torch.zeros_like(x).scatter_add_(1, index, x[:, :4])
    summed[torch.tensor([0, 2])] += x[1]
    return summed.gather(1, index) + x.topk(4).values + x.sort().values[:, :4] + x.cumsum(1)[:, 4:]


def reduced(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.stack(
        [x.std(), x.var(unbiased=False), x.norm(), x.abs().max(), x.prod(dim=1).sum(), x.logsumexp((0, 1))]
    )


def pictures(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    image = functional.pad(functional.interpolate(x.reshape(1, 1, 4, 8), scale_factor=2, mode="bilinear"), (1, 2, 0, 1))
    patches = functional.unfold(image, 3, stride=2)
    return functional.fold(patches, (9, 19), 3, stride=2) + functional.avg_pool2d(image, 2).mean()


def items(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    assert isinstance(x.max().item(), float)
    return x * 2 if bool((x.sum() > -1e9).all()) else x


def bits(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    integers = x.contiguous().view(torch.int16)
    return (integers & ~1).view(x.dtype) + x


def many(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    parts = torch._foreach_mul([x, x + 1], 0.3)
    torch._foreach_add_(parts, 0.1)
    return torch.cat(list(parts))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "elementwise": lambda: Of(lambda x, w: functional.gelu(x * w[:4] + 0.1) / (1 + x.exp()) - x.sigmoid().log()),
    "in place": lambda: Of(in_place),
    "masks": lambda: Of(masks),
    "attention": lambda: Of(attention),
    "attention written out": lambda: Of(written_out),
    "factories": lambda: Of(factories),
    "fp32 inside": lambda: Of(to_fp32_and_back),
    "scattered": lambda: Of(scattered),
    "reduced": lambda: Of(reduced),
    "pictures": lambda: Of(pictures),
    "items": lambda: Of(items),
    "bits": lambda: Of(bits),
    "lists of tensors": lambda: Of(many),
    "scalars of fp32": lambda: Of(lambda x, w: x * torch.tensor(0.1) + torch.tensor([0.1] * 8)),
    "scripted": lambda: Of(lambda x, w: scripted(x, w)),
    "compiled": lambda: Of(torch.compile(lambda x, w: (x @ w).tanh() + x, backend="eager")),
    "autograd function": lambda: Of(lambda x, w: Square.apply(x @ w)),
    "checkpoint": lambda: Of(lambda x, w: checkpoint(lambda y: (y @ w).tanh(), x, use_reentrant=False)),
    "vmap": lambda: Of(lambda x, w: torch.vmap(lambda row: (w @ row).tanh() * row.sum())(x)),
    "linear and norms": lambda: nn.Sequential(
        nn.Linear(8, 16), nn.LayerNorm(16), nn.SiLU(), nn.Linear(16, 8), nn.RMSNorm(8), nn.Softmax(-1)
    ),
    "heads": lambda: Heads(),
    "lstm": lambda: Recurrent(nn.LSTM(8, 12, 2, batch_first=True, bidirectional=True)),
    "gru": lambda: Recurrent(nn.GRU(8, 12, batch_first=True)),
    "encoder layer": lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    "bilinear": lambda: Of(lambda x, w: functional.bilinear(x, x, w, None), 3, 8, 8),
    "table": lambda: Of(lambda x, w: functional.embedding(x.argsort(), w).mean(1)),
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 1, 8)), nn.Flatten(2, 3), nn.Conv1d(1, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.GELU(),
        nn.ConvTranspose1d(8, 4, 4, stride=2), nn.BatchNorm1d(4), nn.AdaptiveAvgPool1d(6),
    ),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
}  # fmt: skip


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[None]
        made: torch.Tensor = self.attention(x, x, x, need_weights=True)[0]
        return made


class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.layer(x[None])[0]
        return made


def native(module: nn.Module, policy: str) -> Any:
    return prepare(copy.deepcopy(module), PrecisionPolicy.parse(policy), channels_last=False)


@pytest.mark.parametrize("policy", EPS)
@pytest.mark.parametrize("name", MODULES)
def test_all_kinds_of_code_compute_what_this_machine_computes(name: str, policy: str) -> None:
    """Each operation may differ by one rounding, where a kernel rounds inside or sums in another order."""
    torch.manual_seed(0)
    module, x = MODULES[name]().eval(), seeded(4, 8)
    with torch.no_grad():
        expected = native(module, policy)(x)
        with simulate(module, policy) as run:
            found = run(x)
        exact = module(x)
    assert found.dtype is expected.dtype is torch.float32
    assert found.shape == expected.shape
    assert relative_error(found, expected) <= 6 * EPS[policy]
    assert relative_error(found, exact) > 0 or name in ("items",)  # it did round
    assert not run.opaque


def networks() -> dict[str, tuple[nn.Module, tuple[torch.Tensor, ...]]]:
    torch.manual_seed(0)
    made: dict[str, tuple[nn.Module, tuple[torch.Tensor, ...]]] = {
        "VAE": (sdxl_like_vae(1.0), (seeded(1, 3, 32, 32),)),
        "T5": (t5_stack(1.0), (torch.arange(24).reshape(2, 12),)),
        "PeakNet": (
            PeakNet(
                backbone_hidden_sizes=[16, 24, 32, 48],
                backbone_depths=[1] * 4,
                bifpn_num_features=32,
                seg_out_channels=32,
            ),
            (seeded(1, 1, 64, 64),),
        ),
    }
    for family, config in (
        ("EqM", {"input_size": 8, "patch_size": 2, "hidden_size": 64, "depth": 3, "num_heads": 4, "num_classes": 5}),
        ("CDiT", {"input_size": 8, "context_size": 2, "patch_size": 2, "hidden_size": 64, "depth": 3, "num_heads": 4}),
    ):
        network = FAMILIES[family].build(**config)
        example = FAMILIES[family].example(network)  # without values
        inputs = tuple(seeded(*value.shape) if value.is_floating_point() else value * 0 for value in example)
        made[family] = (network, inputs)
    for network, _ in made.values():
        for parameter in network.parameters():
            if parameter.dim() > 1 and not parameter.any():  # published networks begin with zeros
                nn.init.normal_(parameter, std=0.05)
    return {name: (network.eval(), inputs) for name, (network, inputs) in made.items()}


def tensor_of(output: Any) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output
    return next(iter(output.values())) if isinstance(output, dict) else output[0]


@pytest.mark.parametrize("policy", EPS)
@pytest.mark.parametrize("name", ["VAE", "T5", "PeakNet", "EqM", "CDiT"])
@torch.no_grad()
def test_networks_have_the_error_that_they_have_here(name: str, policy: str) -> None:
    module, inputs = networks()[name]
    exact = tensor_of(module(*inputs))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with simulate(module, policy) as run:
        simulated = relative_error(tensor_of(run(*inputs)), exact)
    real = relative_error(tensor_of(native(module, policy)(*inputs)), exact)
    assert 0.8 <= real / simulated <= 1.25
    assert torch.equal(tensor_of(module(*inputs)), exact)  # it is as it was
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("policy", ["16-true", "bf16-true", "bf16-mixed", "16-mixed"])
def test_gradients_are_rounded_too(policy: str) -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 4)), seeded(16, 8)

    def gradients(call: Callable[[torch.Tensor], torch.Tensor]) -> None:
        (call(x).square().mean() * scale).backward()

    scale = 2.0**-4
    prepared = native(module, policy)
    gradients(prepared)
    kept = nn.Parameter(torch.zeros(1))
    module[0].weight.grad = kept.detach().expand(32, 8).clone()
    with simulate(module, policy) as run:
        gradients(run)
        found = run.gradients()
    assert module[0].weight.grad.abs().max() == 0  # the user's own are not touched
    for name, parameter in prepared.named_parameters():
        expected = parameter.grad.float()
        assert found[name].dtype is torch.float32
        assert relative_error(found[name], expected) < 2e-2, name
    if policy == "16-true":
        scale = 2.0**-16  # too small for fp16
        prepared.zero_grad()
        gradients(prepared)
        with simulate(module, policy) as run:
            gradients(run)
            lost = float((run.gradients()["0.weight"] == 0).float().mean())
        assert lost == pytest.approx(float((prepared[0].weight.grad == 0).float().mean()), abs=0.03)
        assert lost > 0.05


def test_sums_in_parts_lose_what_cancels() -> None:
    """pytorch#116870: a product whose halves cancel."""
    module = Of(lambda x, w: x @ w, 64, 8)
    with torch.no_grad():
        module.weight[32:] = -module.weight[:32] + 0.01 * module.weight[32:]
        x = seeded(4, 32).repeat(1, 2) * 30
        exact = module(x)
        errors = {}
        for accumulation in ("fp32", "split-k"):
            with simulate(module, "16-true", Target("fp16", accumulation)) as run:
                errors[accumulation] = relative_error(run(x), exact)
    assert errors["split-k"] > 1.05 * errors["fp32"]


def test_the_insides_of_extensions_are_named() -> None:
    """An operation of torch's build with oneDNN, of whose steps nothing is known, as of an extension's."""
    fused = torch.ops.mkldnn._linear_pointwise
    module = Of(lambda x, w: fused(x, w, None, "relu", [], ""))
    with torch.no_grad(), simulate(module, "16-true") as run:
        found = run(seeded(4, 8))
    assert run.opaque == ("mkldnn._linear_pointwise.default",)
    assert torch.equal(found, found.half().float())
    assert relative_error(found, torch.relu(seeded(4, 8) @ module.weight.T)) < 2e-3


def test_products_of_two_types_fail_as_they_do_on_a_device() -> None:
    module = Of(lambda x, w: x.float() @ w)
    with torch.no_grad(), simulate(module, "16-true") as run, pytest.raises(RuntimeError, match="expected"):
        run(seeded(4, 8))
    with torch.no_grad(), pytest.raises(RuntimeError):
        native(module, "16-true")(seeded(4, 8))


def test_a_fill_that_the_type_cannot_hold_fails_as_it_does_on_a_device() -> None:
    module = Of(lambda x, w: (x @ w).masked_fill(x > 0, -1e9))
    for call in (native(module, "16-true"), None):
        with torch.no_grad(), pytest.raises(RuntimeError, match="without overflow"):
            if call is not None:
                call(seeded(4, 8))
            else:
                with simulate(module, "16-true") as run:
                    run(seeded(4, 8))


@torch.no_grad()
def test_values_beyond_the_type_are_infinite_and_small_ones_are_lost() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x * factor, x / factor

    with simulate(Scaled(), "16-true") as run:
        large, small = run(torch.tensor([[1.0, 65519.0, -70000.0]]), torch.tensor([[1.0, 1.0, 1.0]]))
        _, lost = run(torch.tensor([[6e-8]]), torch.tensor([[4.0]]))
    assert large.tolist() == small.tolist() == [[1.0, 65504.0, -float("inf")]]
    assert lost.item() == 0
    with simulate(Scaled(), "bf16-true") as run:
        assert run(torch.tensor([[70000.0]]), torch.tensor([[1.0]]))[0].item() == 70144.0


def test_half_tensors_say_their_type() -> None:
    made: list[torch.Tensor] = []
    module = Of(lambda x, w: made.append(x) or x @ w)
    with torch.no_grad(), simulate(module, "bf16-true") as run:
        run(seeded(4, 8))
        (x,) = made
        assert isinstance(x, HalfTensor)
        assert x.dtype is torch_dtype("bf16")
        assert "bfloat16" in repr(x)
        assert torch.equal(x.as_half().float(), x.float())


def test_what_cannot_be_simulated_is_named() -> None:
    module = nn.Linear(2, 2)
    with pytest.raises(InputError, match="measured on a device"), simulate(module, "auto"):
        pass
    with pytest.raises(InputError, match="computes in fp16, the target in bf16"), simulate(module, "16-true", "bf16"):
        pass
    with pytest.raises(InputError, match="weight: is float16; expected fp32"), simulate(module.half(), "16-true"):
        pass
    with pytest.raises(InputError, match="expected fp16 or bf16"):
        Target.parse("fp8")
    with pytest.raises(InputError, match="expected accumulation=fp32"):
        Target.parse("fp16,sum=fp32")
    assert Target.parse("fp16,accumulation=split-k") == Target("fp16", "split-k")
    assert Target.parse(str(Target("bf16", "split-k"))) == Target("bf16", "split-k")
