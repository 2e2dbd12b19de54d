"""Values between modules that half types cannot hold, on networks of the libraries."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from halfstep.autoencoders import load_autoencoder
from halfstep.errors import InputError
from halfstep.models import EqM
from halfstep.precision import PrecisionPolicy, prepare
from tests.support.planted import Decoder, leaves_beyond, relative_error, sdxl_like_vae, t5_stack

FP16_MAX = 65504.0
IDS = torch.arange(24).reshape(2, 12)


def prepared(module: nn.Module, policy: str) -> Any:
    return prepare(copy.deepcopy(module), PrecisionPolicy.parse(policy), channels_last=False)


@torch.no_grad()
def test_a_stream_beyond_fp16_is_cured_only_by_islands_that_hand_on_fp32() -> None:
    decoder, latents = Decoder(sdxl_like_vae()), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = decoder(latents)
    found = leaves_beyond(FP16_MAX, decoder, latents)
    assert {name for name, (_, out) in found.items() if out} >= {"decoder.mid_block.resnets.0.conv2"}
    narrow = "16-true,islands=" + "|".join(found)
    wide = "16-true,islands=" + "|".join(name + "+" * out for name, (_, out) in found.items())
    assert prepared(decoder, "16-true")(latents).isnan().any()
    assert prepared(decoder, narrow)(latents).isnan().any()
    half = prepared(decoder, wide)
    assert relative_error(half(latents), expected) < 3e-3
    assert half.decoder.mid_block.resnets[0].conv1.weight.dtype is torch.float16
    again = copy.deepcopy(half)  # by __reduce_ex__, as pickle
    assert torch.equal(again(latents), half(latents))
    assert again.half().decoder.mid_block.resnets[0].conv2.weight.dtype is torch.float32


@torch.no_grad()
def test_what_transformers_keeps_in_fp32_is_kept() -> None:
    model = t5_stack()
    expected = model(input_ids=IDS).last_hidden_state
    half = prepared(model, "16-true")
    weights = {name.rpartition(".")[0].rpartition(".")[2]: p.dtype for name, p in half.named_parameters()}
    assert weights["wo"] is torch.float32
    assert weights["wi_0"] is torch.float16
    assert relative_error(half(input_ids=IDS).last_hidden_state, expected) < 3e-3
    assert {p.dtype for p in prepared(model, "bf16-true").parameters()} == {torch.bfloat16}  # as from_pretrained does

    for part in (model, model.encoder):  # what came of it without
        part._keep_in_fp32_modules = None
    assert relative_error(prepared(model, "16-true")(input_ids=IDS).last_hidden_state, expected) > 0.03


def test_strictly_kept_modules_are_kept_in_bf16_and_single_parameters_too() -> None:
    class Model(nn.Module):
        _keep_in_fp32_modules = ("soft",)
        _keep_in_fp32_modules_strict = ("gate.proj", "scale")

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))
            self.gate = nn.ModuleDict({"proj": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
            self.soft = nn.Linear(4, 4)
            self.projection = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.gate["other"](self.gate["proj"](x) * self.scale)
            made: torch.Tensor = self.projection(self.soft(hidden))
            return made

    def kept(policy: str) -> set[str]:
        half = prepared(Model(), policy)
        half(torch.randn(2, 4))
        return {name.removesuffix(".weight") for name, p in half.named_parameters() if p.dtype is torch.float32} - {
            name for name, _ in half.named_parameters() if name.endswith(".bias")
        }

    assert kept("bf16-true") == {"scale", "gate.proj"}
    assert kept("16-true") == {"scale", "gate.proj", "soft"}


def test_what_a_network_keeps_is_kept_where_it_is_part_of_another() -> None:
    network = EqM(8, 2, 32, 1, 2, num_classes=4)
    half = prepared(nn.ModuleDict({"eqm": network}), "bf16-true")
    assert half["eqm"].pos_embed.dtype is torch.float32
    assert half["eqm"].t_embedder.mlp[0].weight.dtype is torch.float32
    assert half["eqm"].blocks[0].attn.qkv.weight.dtype is torch.bfloat16


class Rooms(nn.Module):
    """Each kind of module behind one that hands on fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.recurrent = nn.LSTM(8, 8, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.weighted = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8, bias=False))
        self.matrix = Matrix()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = x + self.attention(x, x, x)[0]
        x = x + self.recurrent(x)[0]
        return x + self.norm(x) + self.weighted(x) + self.matrix(x)  # type: ignore[no-any-return]


class Matrix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.matrix


@torch.no_grad()
def test_modules_behind_an_island_that_hands_on_fp32_cast_what_they_get() -> None:
    torch.manual_seed(0)
    rooms, x = Rooms().eval(), torch.randn(2, 5, 8)
    half = prepared(rooms, "bf16-true,islands=first+")
    assert relative_error(half(x), rooms(x)) < 2e-2


def test_a_plus_prints_and_parses_and_needs_a_name() -> None:
    policy = PrecisionPolicy.parse("16-true,islands=a.*+|b")
    assert policy.islands == ("a.*+", "b")
    assert PrecisionPolicy.parse(str(policy)) == policy
    with pytest.raises(InputError, match="is not empty"):
        PrecisionPolicy.parse("16-true,islands=+")
    with pytest.raises(InputError, match=r"'nrom\+' matches no module"):
        prepared(nn.Sequential(nn.Linear(2, 2)), "16-true,islands=nrom+")


@torch.no_grad()
def test_islands_of_an_autoencoder_have_the_names_of_its_own_network(tmp_path: Path) -> None:
    vae = sdxl_like_vae()
    vae.save_pretrained(tmp_path / "vae")
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = vae.decode(latents).sample
    found = leaves_beyond(FP16_MAX, Decoder(vae), latents)
    policy = "16-true,islands=" + "|".join(name + "+" * out for name, (_, out) in found.items())
    loaded = load_autoencoder(str(tmp_path / "vae")).prepared("cpu", PrecisionPolicy.parse(policy))
    assert relative_error(loaded.decode(latents), expected) < 3e-3
