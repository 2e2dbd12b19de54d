"""Models by the names that a command line gives, and the inputs of a call."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from halfstep.errors import InputError
from halfstep.models import CDiT, EqM, PeakNet
from halfstep.models.weights import About
from halfstep.opening import example_inputs, open_model, read_inputs
from tests.support.streaming import SIZES

SMALL = {"input_size": (8, 8), "patch_size": 2, "hidden_size": 24, "depth": 2, "num_heads": 2, "num_classes": 3}

FACTORIES = """
import torch
from torch import nn

def plain():
    return nn.Linear(3, 4).bfloat16().train()

def with_inputs():
    return nn.Linear(3, 4), (torch.ones(5, 3),)

def named_inputs():
    return nn.Linear(3, 4), {"input": torch.ones(5, 3)}

def raises():
    raise ZeroDivisionError("nothing to divide by")

def needs_an_argument(size):
    return nn.Linear(size, size)

def a_number():
    return 3

def odd_inputs():
    return nn.Linear(3, 4), 7

def allocates():
    return nn.Linear(300, 400, device="cpu")

def reads_values():
    layer = nn.Linear(3, 4)
    layer.largest = layer.weight.max().item()
    return layer
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with factories in it."""
    (tmp_path / "opening_factories.py").write_text(FACTORIES)
    (tmp_path / "opening_broken.py").write_text("def broken(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in __import__("sys").path if path != str(tmp_path)])
    monkeypatch.delitem(__import__("sys").modules, "opening_factories", raising=False)
    return tmp_path


@pytest.fixture
def text_encoder(tmp_path: Path) -> Path:
    """A saved T5 that reads and writes."""
    from transformers import T5Config, T5Model

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    T5Model(T5Config(vocab_size=32, **sizes)).save_pretrained(tmp_path / "t5")
    return tmp_path / "t5"


def call(module: nn.Module, inputs: object) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = module(**inputs) if isinstance(inputs, dict) else module(*inputs)  # type: ignore[misc]
    return result


def test_published_size_has_the_weights_of_seed_0_and_says_so() -> None:
    before = torch.get_rng_state()
    opened = open_model("CDiT-S/2")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(0)
    expected = CDiT.named("CDiT-S/2", 28, context_size=4)
    assert opened.name == "CDiT-S/2 (random weights)"
    assert not opened.module.training
    state = opened.module.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in expected.state_dict().items())
    assert opened.inputs is not None
    assert call(opened.module, opened.inputs).shape == (1, 8, 28, 28)
    assert all(torch.isfinite(value).all() for value in opened.inputs)


def test_peaknet_by_name() -> None:
    opened = open_model("PeakNet")
    assert (opened.name, opened.inputs) == ("PeakNet (random weights)", None)
    assert isinstance(opened.module, PeakNet)


def test_checkpoint_is_opened_with_its_weights_or_their_average(tmp_path: Path) -> None:
    network, average = EqM(**SMALL), EqM(**SMALL)
    nn.init.normal_(network.final_layer.linear.weight)
    nn.init.normal_(average.final_layer.linear.weight)
    run = tmp_path / "run" / "checkpoints" / "10"
    run.mkdir(parents=True)
    metadata = About("EqM", network.config).to_metadata()
    save_file(network.state_dict(), run / "model.safetensors", metadata)
    alone = open_model(str(run / "model.safetensors"))
    save_file(average.state_dict(), run / "ema.safetensors", metadata)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": "EqM-S/2"}))
    assert alone.inputs is not None
    assert torch.equal(call(alone.module, alone.inputs), call(network.eval(), alone.inputs))
    for name in (tmp_path / "run", run):
        opened = open_model(str(name))
        assert opened.name == str(name)
        assert torch.equal(call(opened.module, alone.inputs), call(average.eval(), alone.inputs))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_of_peaknet(tmp_path: Path, suffix: str) -> None:
    network = PeakNet(**SIZES).eval()
    path = tmp_path / f"peaks{suffix}"
    torch.save(network.state_dict(), path) if suffix == ".pt" else save_file(network.state_dict(), path)
    opened = open_model(str(path))
    inputs = example_inputs(opened.module)
    assert torch.equal(call(opened.module, inputs), call(network, inputs))


def test_files_of_torch(tmp_path: Path) -> None:
    network, x = nn.Sequential(nn.Linear(3, 4), nn.GELU()).eval(), torch.ones(2, 3)
    torch.export.save(torch.export.export(network, (x,)), tmp_path / "net.pt2")
    torch.export.save(torch.export.export(network, (), {"input": x}), tmp_path / "named.pt2")
    torch.jit.script(network).save(str(tmp_path / "net.ts"))
    exported, scripted = open_model(str(tmp_path / "net.pt2")), open_model(str(tmp_path / "net.ts"))
    named = open_model(str(tmp_path / "named.pt2"))
    assert exported.inputs is not None and named.inputs is not None
    assert isinstance(named.inputs, dict) and torch.equal(named.inputs["input"], x)
    for module, inputs in ((exported.module, exported.inputs), (named.module, named.inputs), (scripted.module, (x,))):
        assert torch.equal(call(module, inputs), call(network, (x,)))
    (tmp_path / "bad.pt2").write_bytes(b"no archive")
    for name in ("bad.pt2", "missing.ts"):
        with pytest.raises(InputError, match=name):
            open_model(str(tmp_path / name))


def test_models_of_diffusers_and_transformers(small_vae: Path, text_encoder: Path) -> None:
    from diffusers import AutoencoderKL
    from transformers import T5EncoderModel

    vae = open_model(str(small_vae))
    assert isinstance(vae.module, AutoencoderKL)
    (pixels,) = example_inputs(vae.module)
    expected = AutoencoderKL.from_pretrained(small_vae, local_files_only=True, low_cpu_mem_usage=False)
    with torch.no_grad():
        assert torch.equal(vae.module(pixels).sample, expected(pixels).sample)
    text = open_model(str(text_encoder))
    assert isinstance(text.module, T5EncoderModel)
    (tokens,) = example_inputs(text.module)
    assert (tokens.dtype, tokens.shape) == (torch.int64, (1, 16))
    assert {parameter.dtype for parameter in text.module.parameters()} == {torch.float32}


def test_pipeline_names_its_models(small_wan_pipeline: Path) -> None:
    with pytest.raises(InputError, match=r"is a pipeline of text_encoder, transformer, vae; name one of them"):
        open_model(str(small_wan_pipeline))
    open_model(str(small_wan_pipeline / "transformer"), weights=False)


def test_without_weights_all_is_shapes(folder: Path, small_vae: Path, text_encoder: Path) -> None:
    torch.save(PeakNet(**SIZES).state_dict(), folder / "peaks.pt")
    network = EqM(**SMALL)
    save_file(network.state_dict(), folder / "eqm.safetensors", About("EqM", network.config).to_metadata())
    names = ["EqM-S/8", "peaks.pt", "eqm.safetensors", "opening_factories:plain", str(small_vae), str(text_encoder)]
    for name in names:
        real, shapes = open_model(name), open_model(name, weights=False)
        assert {tensor.device.type for tensor in shapes.module.state_dict().values()} == {"meta"}
        assert not shapes.module.training
        assert [(key, value.shape, value.dtype) for key, value in shapes.module.state_dict().items()] == [
            (key, value.shape, value.dtype) for key, value in real.module.state_dict().items()
        ]


def test_factories(folder: Path) -> None:
    plain = open_model("opening_factories:plain")
    assert (plain.inputs, plain.module.training, plain.module.weight.dtype) == (None, False, torch.float32)
    for name in ("with_inputs", "named_inputs"):
        opened = open_model(f"opening_factories:{name}")
        assert call(opened.module, opened.inputs).shape == (5, 4)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("opening_factories:raises", "failed (nothing to divide by)"),
        ("opening_factories:needs_an_argument", "expected a function without arguments"),
        ("opening_factories:a_number", "returned int; expected a torch module"),
        ("opening_factories:odd_inputs", "returned Linear and int; expected a torch module"),
        ("opening_factories:missing", "has no attribute 'missing'"),
        ("opening_broken:plain", "invalid syntax"),
        ("opening_nowhere:plain", "No module named 'opening_nowhere'"),
        ("EqM-Q/2", "expected EqM-{S,B,L,XL}/{2,4,8}"),
        ("a/name/of/nothing", "expected a file, a folder, package.module:function, or a model"),
        (".", "no checkpoint in it"),
    ],
)
def test_what_cannot_be_opened_is_one_line(folder: Path, name: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        open_model(name)
    assert said in str(caught.value)
    assert os.linesep not in str(caught.value)


def test_factory_that_reads_values_has_none_without_weights(folder: Path) -> None:
    assert open_model("opening_factories:reads_values").module.largest <= 1
    with pytest.raises(InputError, match="looks at no values of tensors"):
        open_model("opening_factories:reads_values", weights=False)


def test_factory_that_allocates_is_told_so(folder: Path) -> None:
    with pytest.warns(UserWarning, match="opening_factories:allocates: took 0 MB for tensors while it was built"):
        opened = open_model("opening_factories:allocates", weights=False)
    assert opened.module.weight.is_meta


def test_odd_config_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "DDPMScheduler"}))
    with pytest.raises(InputError, match="is a DDPMScheduler; expected a model of diffusers"):
        open_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such type"}))
    with pytest.raises(InputError, match="cannot be loaded"):
        open_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        open_model(str(tmp_path))


def test_guessed_inputs_fit_the_first_layer_or_are_refused() -> None:
    (features,) = example_inputs(nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 2)))
    assert features.shape == (2, 5)
    (pixels,) = example_inputs(nn.Conv2d(3, 4, 3))
    assert pixels.shape == (1, 3, 64, 64)
    with pytest.raises(InputError, match=r"cannot be called with one tensor \[2, 5\], .*give its inputs"):
        example_inputs(_TwoInputs())
    with pytest.raises(InputError, match="has no linear layer"):
        example_inputs(nn.GELU())


class _TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(x + y)
        return result


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("names", "calls"),
    [
        (["1", "0"], [(1, 0)]),
        (["x", "t"], [{"x": 0, "t": 1}]),
        (["late/0", "early/0", "late/1"], [(0, 2), (1,)]),
        (["a/x", "b/0", "b/1"], [{"x": 0}, (1, 2)]),
    ],
)
def test_inputs_of_a_file(tmp_path: Path, suffix: str, names: list[str], calls: list[object]) -> None:
    tensors = {name: torch.full((2, number + 1), number, dtype=torch.float64) for number, name in enumerate(names)}
    path = tmp_path / f"inputs{suffix}"
    if suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    elif suffix == ".pt":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
        names_in_file = sorted(names)  # safetensors keeps no order
        if names_in_file != names and "/" in names[0]:
            calls = calls[::-1]
    found = read_inputs(path)

    def numbers(value: object) -> object:
        if isinstance(value, dict):
            return {name: int(tensor.flatten()[0]) for name, tensor in value.items()}
        return tuple(int(tensor.flatten()[0]) for tensor in value)  # type: ignore[attr-defined]

    assert [numbers(one) for one in found] == calls
    assert all(t.dtype == torch.float32 for one in found for t in (one.values() if isinstance(one, dict) else one))


def test_bad_inputs_are_one_line(tmp_path: Path) -> None:
    torch.save({"0": torch.ones(1), "2": torch.ones(1)}, tmp_path / "gap.pt")
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    torch.save({}, tmp_path / "empty.pt")
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object))
    (tmp_path / "damaged.safetensors").write_bytes(b"\x01\x02")
    (tmp_path / "x.csv").write_text("1,2")
    for name, said in {
        "gap.pt": "'0' is no argument's name",
        "list.pt": "holds a list",
        "empty.pt": "holds no tensors",
        "objects.npz": "cannot be read",
        "damaged.safetensors": "cannot be read",
        "x.csv": "expected .npz, .safetensors, .pt",
        "missing.npz": "no such file",
    }.items():
        with pytest.raises(InputError) as caught:
            read_inputs(tmp_path / name)
        assert said in str(caught.value)
