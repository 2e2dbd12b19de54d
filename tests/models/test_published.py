"""Checkpoints as other trainers and wrappers leave them: the same weights whatever is around them, and no code."""

import argparse
import collections
import datetime
import pathlib
import random
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from halfstep.errors import InputError
from halfstep.models import EqM, read_checkpoint

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def weights() -> State:
    torch.manual_seed(0)
    network = EqM(
        patch_size=2,
        hidden_size=16,
        depth=2,
        num_heads=2,
        in_channels=4,
        input_size=(4, 4),
        num_classes=3,
        uncond=True,
        energy="none",
        num_frames=1,
    )
    return {name: value.clone() for name, value in network.state_dict().items()}


@pytest.fixture(scope="module")
def average(weights: State) -> State:
    return {name: value + 1 for name, value in weights.items()}


def before(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def inside(part: str, state: State) -> State:
    """The names with `part` put behind the number of each block."""
    return {
        name if not name.startswith("blocks.") else ".".join([*name.split(".")[:2], part, *name.split(".")[2:]]): value
        for name, value in state.items()
    }


def equal(a: State | None, b: State | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


Content = Callable[[State, State], Any]
COUNT = {"n_averaged": torch.tensor(3)}
HOLDS: dict[str, tuple[Content, bool, bool]] = {  # what a file holds, and whether the weights and the average are in it
    "bare": (lambda w, a: w, True, False),
    "both": (lambda w, a: {"model": w, "ema": a}, True, True),
    "distributed": (lambda w, a: {"model": before("module.", w), "ema": a}, True, True),
    "distributed and compiled": (lambda w, a: {"model": before("module._orig_mod.", w), "ema": a}, True, True),
    "compiled blocks": (lambda w, a: {"model": inside("_orig_mod", w), "ema": inside("_orig_mod", a)}, True, True),
    "activation checkpoints": (lambda w, a: {"model": inside("_checkpoint_wrapped_module", w)}, True, False),
    "sharded": (
        lambda w, a: before("_fsdp_wrapped_module.", inside("_fsdp_wrapped_module._orig_mod", w)),
        True,
        False,
    ),
    "average alone": (lambda w, a: {"ema": a}, False, True),
    "average alone, by another name": (lambda w, a: {"ema_model": a, "step": 3}, False, True),
    "state_dict": (lambda w, a: {"state_dict": before("model.", w), "epoch": 1}, True, False),
    "model_state_dict": (lambda w, a: {"model_state_dict": w}, True, False),
    "deepspeed": (lambda w, a: {"module": w, "global_steps": 4}, True, False),
    "lightning": (
        lambda w, a: {
            "state_dict": {**before("net.", w), **before("net_ema.", a), "loss.weight": torch.ones(2)},
            "pytorch-lightning_version": "2",
        },
        True,
        True,
    ),
    "an average that keeps both": (
        lambda w, a: {"ema": {**before("online_model.", w), **before("ema_model.", a), "initted": torch.tensor(True)}},
        True,
        True,
    ),
    "an average with settings": (lambda w, a: {"model": w, "ema": {"decay": 0.999, "module": a}}, True, True),
    "averaged": (lambda w, a: {"model": {**before("module.", w), **COUNT}}, True, False),
    "averaged, bare": (lambda w, a: {**w, **COUNT}, True, False),
}


@pytest.mark.parametrize("name", HOLDS)
def test_the_weights_are_found(name: str, weights: State, average: State, tmp_path: Path) -> None:
    content, has_weights, has_average = HOLDS[name]
    torch.save(content(weights, average), tmp_path / "0.pt")
    read = read_checkpoint(tmp_path / "0.pt", num_heads=2)
    assert equal(read.weights, weights if has_weights else average)
    assert equal(read.ema, average if has_average else None)
    built = read.build()
    assert equal(dict(built.state_dict()), average if has_average else weights)
    assert read.about.config["num_classes"] == 3


ARGUMENTS = {"uncond": True, "ebm": "dot"}
BESIDE: dict[str, Any] = {
    "numpy numbers": {"loss": np.float64(0.3), "best": np.float32(0.3), "epoch": np.int64(3), "good": np.bool_(True)},
    "numpy arrays": {"history": np.arange(3.0), "rng": np.random.RandomState(0).get_state()},
    "paths": {"out": pathlib.Path("results"), "pure": pathlib.PureWindowsPath("C:/results")},
    "containers": {
        "log": collections.defaultdict(list, {"a": [1]}),
        "count": collections.Counter("ab"),
        "seen": {1, 2},
        "frozen": frozenset({1}),
        "order": collections.OrderedDict(a=1),
        "window": collections.deque([1.0], maxlen=3),
    },
    "types": {"dtype": torch.bfloat16, "device": torch.device("cuda"), "torch": torch.__version__},
    "dates": {"at": datetime.datetime(2024, 1, 2), "took": datetime.timedelta(seconds=3)},
    "random states": {"torch": torch.get_rng_state(), "python": random.Random(0).getstate()},
    "scaler": {"scaler": torch.amp.GradScaler("cpu").state_dict()},
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", BESIDE)
def test_what_trainers_keep_beside_them_is_no_hindrance(name: str, old: bool, weights: State, tmp_path: Path) -> None:
    content = {"model": weights, **BESIDE[name], "args": argparse.Namespace(**ARGUMENTS, **BESIDE[name])}
    torch.save(content, tmp_path / "0.pt", _use_new_zipfile_serialization=not old)
    read = read_checkpoint(tmp_path / "0.pt", num_heads=2)
    assert equal(read.weights, weights)
    assert read.about.config["energy"] == "dot"


def test_a_schedulers_state_and_the_optimizers(weights: State, tmp_path: Path) -> None:
    network = read_published(weights, tmp_path).build()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
    ]
    optimizer.step()
    content = {"model": weights, "opt": optimizer.state_dict(), "schedulers": [each.state_dict() for each in schedules]}
    torch.save(content, tmp_path / "1.pt")
    read = read_checkpoint(tmp_path / "1.pt", num_heads=2)
    assert read.updates == 1
    assert torch.equal(read.moments["exp_avg.pos_embed"], optimizer.state[network.pos_embed]["exp_avg"])


def read_published(state: State, folder: Path) -> Any:
    torch.save(state, folder / "0.pt")
    return read_checkpoint(folder / "0.pt", num_heads=2)


@pytest.mark.parametrize("holder", [argparse.Namespace, types.SimpleNamespace, dict])
def test_arguments_are_read_however_they_are_kept(holder: Any, weights: State, tmp_path: Path) -> None:
    torch.save({"model": weights, "args": holder(**ARGUMENTS)}, tmp_path / "0.pt")
    assert read_checkpoint(tmp_path / "0.pt", num_heads=2).about.config["energy"] == "dot"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights(dtype: torch.dtype, weights: State, tmp_path: Path) -> None:
    half = {name: value.to(dtype) for name, value in weights.items()}
    built = read_published(half, tmp_path).build()
    assert equal(dict(built.state_dict()), {name: value.float() for name, value in half.items()})


def test_safetensors_of_others(weights: State, average: State, tmp_path: Path) -> None:
    save_file({**before("model.", weights), **before("ema.", average)}, tmp_path / "0.safetensors")
    read = read_checkpoint(tmp_path / "0.safetensors", num_heads=2)
    assert equal(read.weights, weights)
    assert equal(read.ema, average)
    save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors")
    with pytest.raises(
        InputError, match=r"1.safetensors: neither an EqM nor a CDiT: no x_embedder.proj.weight among 1"
    ):
        read_checkpoint(tmp_path / "1.safetensors")


def call_of_the_system() -> None:
    raise AssertionError("a file's code was run")


class Harmful:
    def __reduce__(self) -> Any:
        return call_of_the_system, ()


@pytest.mark.parametrize("old", [False, True])
def test_what_could_run_code_is_named_and_not_run(old: bool, weights: State, tmp_path: Path) -> None:
    cases = {
        "tests.models.test_published.call_of_the_system": Harmful(),
        "torch.nn.modules.linear.Linear": torch.nn.Linear(2, 2),
    }
    for name, value in cases.items():
        torch.save({"model": weights, "extra": value}, tmp_path / "0.pt", _use_new_zipfile_serialization=not old)
        with pytest.raises(
            InputError, match=rf"0.pt: names {name}.*; what could run code is not read, so save the file"
        ):
            read_checkpoint(tmp_path / "0.pt", num_heads=2)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (lambda w: {k: v for k, v in w.items() if k != "pos_embed"}, "neither an EqM nor a CDiT: no pos_embed among"),
        (
            lambda w: {**before("a.", w), **before("b.", w)},
            r"holds 2 networks \(a.x_embedder.proj.weight, b.x_embedder",
        ),
        (lambda w: {"ema": {"shadow_params": [1.0]}}, "shadow_params is a list; expected a state dict"),
        (lambda w: {"model": w, "opt": {"state": {0: {}}}}, "opt: what it keeps of parameter 0 is not AdamW's"),
    ],
)
def test_what_cannot_be_taken_is_named(content: Any, named: str, weights: State, tmp_path: Path) -> None:
    torch.save(content(weights), tmp_path / "0.pt")
    with pytest.raises(InputError, match=named):
        read_checkpoint(tmp_path / "0.pt", num_heads=2)


def test_what_the_process_lets_torch_read_stays_as_it_was(weights: State, tmp_path: Path) -> None:
    with torch.serialization.safe_globals([argparse.Namespace]):
        known = set(torch.serialization.get_safe_globals())
        read_published(weights, tmp_path)
        assert set(torch.serialization.get_safe_globals()) == known


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), old=st.booleans())
def test_damage_is_an_error_of_its_file(place: float, byte: int, old: bool, tmp_path: Path) -> None:
    torch.save(
        {"a": torch.ones(2), **BESIDE["numpy arrays"]}, tmp_path / "0.pt", _use_new_zipfile_serialization=not old
    )
    content = bytearray((tmp_path / "0.pt").read_bytes())
    content[int(place * len(content))] = byte
    (tmp_path / "0.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"0\.pt: "):
        read_checkpoint(tmp_path / "0.pt")
