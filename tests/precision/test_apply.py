import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from halfstep.errors import InputError
from halfstep.precision import PRESETS, PrecisionPolicy, change_compute, prepare, torch_dtype


class Network(nn.Module):
    """Convolutions, a norm, a buffer, a linear head: what policies treat differently."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.register_buffer("offset", torch.ones(8, 1, 1))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.norm(self.stem(x)) + self.offset
        return {"logits": self.head(features.mean((2, 3))), "labels": labels}


class Walk(TorchDispatchMode):
    """Every operation of a forward pass with the types of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, set[torch.dtype]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, result)) if isinstance(t, torch.Tensor)]
        self.seen.append((func.overloadpacket.__name__, {t.dtype for t in tensors if t.is_floating_point()}))
        return result

    def types_of(self, *operations: str) -> set[torch.dtype]:
        return set().union(*(types for name, types in self.seen if name in operations))

    def all_types(self, *, but: tuple[str, ...] = ()) -> set[torch.dtype]:
        return set().union(*(types for name, types in self.seen if name not in but))


def make(policy: str) -> Network:
    torch.manual_seed(0)
    return prepare(Network().eval(), PrecisionPolicy.parse(policy))


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8), torch.tensor([1, 2])


CASTS = ("_to_copy",)
PRODUCTS = ("convolution", "mkldnn_convolution", "addmm", "mm", "linear")


@pytest.mark.parametrize(("preset", "dtype"), [("bf16-true", torch.bfloat16), ("16-true", torch.float16)])
def test_true_runs_every_operation_in_the_half_type(preset: str, dtype: torch.dtype) -> None:
    network = make(preset)
    given = inputs()
    with Walk() as walk, torch.no_grad():
        result = network(*given)
    assert walk.all_types(but=CASTS) == {dtype}
    assert result["logits"].dtype is torch.float32
    assert {t.dtype for t in (*network.parameters(), network.offset)} == {dtype}
    assert network.count.dtype is torch.int64
    assert result["labels"].dtype is torch.int64


def test_mixed_keeps_fp32_weights_and_computes_products_in_half() -> None:
    network = make("bf16-mixed")
    given = inputs()
    with Walk() as walk, torch.no_grad():
        network(*given)
    assert walk.types_of(*PRODUCTS) == {torch.bfloat16}
    assert {t.dtype for t in network.parameters()} == {torch.float32}


def test_fp32_touches_nothing() -> None:
    network = make("fp32")
    given = inputs()
    with Walk() as walk, torch.no_grad():
        network(*given)
    assert walk.all_types() == {torch.float32}


@pytest.mark.parametrize("preset", ["bf16-true", "bf16-mixed"])
def test_islands_really_run_in_fp32(preset: str) -> None:
    network = make(f"{preset},islands=norm|head")
    given = inputs()
    with Walk() as walk, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        network(*given)
    assert walk.types_of("native_group_norm") == {torch.float32}
    assert walk.types_of("addmm") == {torch.float32}
    assert walk.types_of("convolution", "mkldnn_convolution") == {torch.bfloat16}
    assert {t.dtype for t in (*network.norm.parameters(), *network.head.parameters())} == {torch.float32}


def test_an_island_that_matches_nothing_is_named_with_its_neighbors() -> None:
    with pytest.raises(InputError, match=r"'nrom' matches no module of Network; near it are norm"):
        make("bf16-true,islands=nrom")


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "auto"])
def test_half_agrees_with_fp32_within_its_rounding(preset: str) -> None:
    with torch.no_grad():
        exact, half = make("fp32")(*inputs())["logits"], make(preset)(*inputs())["logits"]
    # Three layers, each rounding its inputs, weights and results: a dozen ulps of the type at most.
    tolerance = 12 * torch.finfo(torch_dtype(PRESETS[preset].compute)).eps
    torch.testing.assert_close(half, exact, rtol=tolerance, atol=tolerance * float(exact.abs().max()))


def _types(network: Network) -> list[torch.dtype]:
    return [network.stem.weight.dtype, network.norm.weight.dtype, network.offset.dtype]


def test_the_policy_survives_moves_copies_and_state_dicts() -> None:
    network = make("bf16-true,islands=norm")
    expected_types = [torch.bfloat16, torch.float32, torch.bfloat16]
    with torch.no_grad():
        expected = network(*inputs())["logits"]
        network.norm.weight.mul_(1 + 2**-20)  # a weight that bf16 cannot hold
        kept = network.norm.weight.clone()
        for changed in (network.to("cpu"), network.to(torch.float16), network.half(), network.double()):
            assert _types(changed) == expected_types
            assert torch.equal(changed.norm.weight, kept)
        twin = copy.deepcopy(network)
        assert _types(twin) == expected_types
        assert list(network.state_dict()) == list(Network().state_dict())
        twin.load_state_dict(Network().state_dict())
        assert _types(twin) == expected_types
        assert not torch.equal(twin(*inputs())["logits"], expected)
        assert twin(*inputs())["logits"].dtype is torch.float32


@pytest.mark.parametrize("preset", ["bf16-true,islands=norm", "bf16-mixed,islands=norm"])
def test_the_policy_survives_torch_compile(preset: str) -> None:
    network = make(preset)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs())["logits"], network(*inputs())["logits"], rtol=1e-2, atol=1e-2)


def test_autocast_keeps_no_second_copy_of_the_weights_in_inference(monkeypatch) -> None:
    caches = []
    original = torch.autocast.__enter__

    def note(self):
        caches.append(self._cache_enabled)
        return original(self)

    monkeypatch.setattr(torch.autocast, "__enter__", note)
    network = make("bf16-mixed")
    with torch.no_grad():
        network(*inputs())
    network(*inputs())
    assert caches == [False, True]


class Conditioned(nn.Module):
    """A timestep embedder and an embedding table, whose inputs are a number and an integer a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.table, self.out = nn.Linear(1, 4), nn.Embedding(3, 4), nn.Linear(4, 2)

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> DecoderOutput:
        self.seen = t.clone()
        return DecoderOutput(sample=self.out(self.time(t[:, None]) + self.table(y)))


@pytest.mark.parametrize("islands", ["time|table", "time", "table"])
def test_islands_fit_between_half_layers_and_get_exact_timesteps(islands: str) -> None:
    network = prepare(Conditioned(), PrecisionPolicy.parse(f"bf16-true,islands={islands}"))
    if islands == "table":
        with pytest.raises(RuntimeError, match="dtype"):
            network(torch.tensor([999.0]), torch.tensor([1]))  # a half layer that eats timesteps must be an island
        return
    result = network(torch.tensor([999.0]), torch.tensor([1]))
    assert network.seen.item() == 999.0  # bf16 has 1000 there
    assert isinstance(result, DecoderOutput)
    assert result.sample.dtype is torch.float32


def test_a_prepared_module_can_be_pickled() -> None:
    network = make("bf16-true,islands=norm")
    twin = pickle.loads(pickle.dumps(network))
    assert _types(twin) == _types(network)
    with torch.no_grad():
        assert torch.equal(twin(*inputs())["logits"], network(*inputs())["logits"])


def test_preparing_again_changes_the_policy() -> None:
    network = make("bf16-true,islands=norm")
    prepare(network, PrecisionPolicy.parse("fp32"))
    given = inputs()
    with Walk() as walk, torch.no_grad():
        network(*given)
    assert walk.all_types() == {torch.float32}
    assert type(prepare(network, PrecisionPolicy())) is type(prepare(Network(), PrecisionPolicy()))


def test_threads_share_a_prepared_module() -> None:
    network = make("bf16-mixed,islands=head")
    pixels, labels = inputs()

    def call(scale: float) -> torch.Tensor:
        with torch.no_grad():
            return network(pixels * scale, labels)["logits"]

    scales = [1 + i / 8 for i in range(16)]
    expected = [call(scale) for scale in scales]
    with ThreadPoolExecutor(4) as pool:
        for got, want in zip(pool.map(call, scales), expected, strict=True):
            torch.testing.assert_close(got, want)


def test_gradients_reach_fp32_weights_under_mixed() -> None:
    network = make("bf16-mixed")
    network(*inputs())["logits"].sum().backward()
    assert {p.grad.dtype for p in network.parameters() if p.grad is not None} == {torch.float32}
    assert all(p.grad is not None for p in network.parameters())


def test_arithmetic_can_change_while_the_weights_stay() -> None:
    model = prepare(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), PrecisionPolicy.parse("16-mixed,islands=1"))
    weights = list(model.parameters())
    seen: list[torch.dtype] = []
    model[0].register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    model(torch.randn(2, 8))
    change_compute(model, PrecisionPolicy.parse("bf16-mixed,islands=1"))
    model(torch.randn(2, 8))
    assert seen == [torch.float16, torch.bfloat16]
    assert all(a is b for a, b in zip(weights, model.parameters(), strict=True))
    with pytest.raises(InputError, match="weights are fp32; bf16-true needs bf16"):
        change_compute(model, PrecisionPolicy.parse("bf16-true"))
