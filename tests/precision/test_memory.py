"""Memory that is planned without weights, against plain sums, the tensors of real runs, and processes."""

from __future__ import annotations

import copy
import json
import math
import resource
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from halfstep.bench.footprint import Planned, bench_memory
from halfstep.errors import InputError
from halfstep.models import CDiT, EqM, Network, PeakNet
from halfstep.opening import open_model
from halfstep.precision import PrecisionPolicy, prepare
from halfstep.precision.memory import (
    forward_footprint,
    largest,
    least,
    odd_layers,
    parse_size,
    round_channels,
    told,
    with_batch,
)
from halfstep.progress import Progress
from halfstep.train.config import TrainConfig
from halfstep.train.loop import train
from halfstep.train.memory import mean_square, plan, step_footprint
from halfstep.train.state import TrainState, Updates
from tests.support.cli import run_cli
from tests.support.streaming import SIZES
from tests.support.training import config

CPU = torch.device("cpu")
FP32 = PrecisionPolicy()
EQM = {"input_size": 8, "patch_size": 2, "hidden_size": 32, "depth": 3, "num_heads": 2, "num_classes": 3}
CDIT = {"input_size": 8, "context_size": 2, "patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 2}


def eqm() -> tuple[Network, tuple[torch.Tensor, ...]]:
    return EqM(**EQM), (torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64))


def cdit() -> tuple[Network, tuple[torch.Tensor, ...]]:
    frame, one = torch.zeros(1, 4, 8, 8), torch.zeros(1)
    return CDiT(**CDIT), (frame, one, torch.zeros(1, 3), torch.zeros(1, 2, 4, 8, 8), one)


def peaknet() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return PeakNet(**SIZES), (torch.zeros(1, 1, 64, 64),)


def tied() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Two layers with one weight."""
    layers = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    layers[1].weight = layers[0].weight  # type: ignore[union-attr]
    return layers, (torch.zeros(1, 16),)


def bytes_of(*tensors: torch.Tensor) -> int:
    """Of their storages, each once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


# --- one call ---------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=2, max_size=6), st.integers(1, 50))
def test_a_call_of_linear_layers_holds_what_a_sum_says(widths: list[int], batch: int) -> None:
    """One after the other: the input stays, and a layer's result is there with the one before."""
    with torch.device("meta"):
        network = nn.Sequential(*map(nn.Linear, widths, widths[1:]))
    found = forward_footprint(network, (torch.empty(batch, widths[0], device="meta"),), FP32, CPU)
    held = [4 * batch * width for width in widths]
    # torch gives the memory of a result back when the next is there; the input belongs to the caller.
    activations = held[0] + max([held[1], *(a + b for a, b in pairwise(held[1:]))])
    weights = sum(4 * (a * b + b) for a, b in pairwise(widths))
    assert found.weights == weights
    assert found.activations == activations
    assert found.peak == weights + activations
    assert (found.gradients, found.optimizer) == (0, 0)


@pytest.mark.parametrize("make", [eqm, cdit, peaknet, tied])
@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16-true", "16-true"])
def test_weights_are_those_of_the_prepared_module(make: Any, precision: str) -> None:
    module, inputs = make()
    before = copy.deepcopy(module.state_dict())
    policy = PrecisionPolicy.parse(precision)
    planned = forward_footprint(module, inputs, policy, CPU)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    prepare(module, policy)
    assert planned.weights == bytes_of(*module.parameters(), *module.buffers())


def test_nothing_is_allocated() -> None:
    """A network of 2.7 GB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    opened = open_model("EqM-XL/2", weights=False)
    assert opened.inputs is not None
    found = forward_footprint(opened.module, with_batch(opened.inputs, 64), FP32, CPU)
    assert found.weights > 2.5e9
    assert found.peak - found.weights > 0.5e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < 0.3e9


def test_torch_is_as_it_was_after_a_plan_and_after_one_that_fails() -> None:
    convert = nn.Module._apply
    module, inputs = eqm()
    forward_footprint(module, inputs, FP32, CPU)
    with pytest.raises(InputError):
        forward_footprint(module, inputs[:1], FP32, CPU)
    assert nn.Module._apply is convert
    assert not torch.compiler.is_compiling()
    assert module(*inputs).shape == inputs[0].shape
    assert type(torch.ones(1)) is torch.Tensor


class _Operation(nn.Module):
    """One operation, and a weight so that there is one."""

    def __init__(self, operation: Any) -> None:
        super().__init__()
        self.operation, self.weight = operation, nn.Parameter(torch.zeros(1))

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.operation(*inputs)
        return result


def _convolution(kernel: int, groups: int = 1) -> Any:
    return lambda x, weight: functional.conv2d(x, weight, padding=kernel // 2, groups=groups)


@pytest.mark.parametrize(
    ("operation", "shapes", "dtype", "channels_last", "measured"),
    [
        (_convolution(3), [(4, 128, 64, 64), (128, 128, 3, 3)], torch.float32, False, 8.8),
        (_convolution(3), [(4, 128, 64, 64), (128, 128, 3, 3)], torch.bfloat16, False, 8.4),
        (_convolution(1), [(4, 1024, 32, 32), (1024, 1024, 1, 1)], torch.bfloat16, True, 2.0),
        (_convolution(1), [(4, 1024, 32, 32), (1024, 1024, 1, 1)], torch.float32, False, 0.0),
        (_convolution(7, 128), [(4, 128, 64, 64), (128, 1, 7, 7)], torch.float32, False, 8.3),
        (lambda x: functional.interpolate(x, scale_factor=2.0), [(4, 256, 32, 32)], torch.float32, False, 20.9),
        (lambda x: functional.interpolate(x, scale_factor=2.0), [(4, 256, 32, 32)], torch.float32, True, 0.0),
        (lambda x: functional.scaled_dot_product_attention(x, x, x), [(8, 8, 1024, 64)], torch.bfloat16, False, 17.8),
        (lambda x: functional.scaled_dot_product_attention(x, x, x), [(8, 8, 1024, 64)], torch.float32, False, 0.7),
        (lambda x, y: torch.bmm(x, y.expand(784, -1, -1)), [(784, 8, 384), (384, 768)], torch.bfloat16, False, 462.4),
        (lambda x: x + torch.ones(384, device=x.device), [(2, 64, 64, 384)], torch.bfloat16, False, 12.5),
    ],
)
def test_kernels_hold_what_was_measured(
    operation: Any, shapes: list[tuple[int, ...]], dtype: torch.dtype, channels_last: bool, measured: float
) -> None:
    """MB beside what they are given and return, of resident memory (torch 2.13, Xeon with AVX512, one thread)."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    inputs = tuple(torch.empty(shape, dtype=dtype, device="meta").to(memory_format=layout) for shape in shapes)
    policy = PrecisionPolicy.parse("fp32" if dtype == torch.float32 else "bf16-true,output=bf16")
    found = forward_footprint(_Operation(operation), inputs, policy, CPU)
    result = operation(*inputs)
    held = found.activations - sum(tensor.nbytes for tensor in (*inputs, result))
    assert held / 1e6 == pytest.approx(measured, rel=0.07, abs=0.8)


class _LooksAtValues(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        result = super().forward(input)
        return -result if bool(result.sum() > 0) else result


class _Counts(nn.Linear):
    """Returns integers."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).argmax(dim=-1)


def test_what_cannot_be_planned_is_one_line() -> None:
    x = (torch.zeros(2, 3),)
    for module, said in (
        (_LooksAtValues(3, 4), "_LooksAtValues: its forward looks at values of tensors"),
        (nn.Linear(5, 4), "Linear: cannot be called with such inputs"),
        (torch.jit.script(nn.Linear(3, 4)), "TorchScript cannot be planned"),
    ):
        with pytest.raises(InputError, match=said) as caught:
            forward_footprint(module, x, FP32, CPU)
        assert "\n" not in str(caught.value)
    assert forward_footprint(_Counts(3, 4), x, FP32, CPU).weights == 64
    with pytest.raises(InputError, match="none of its outputs has a gradient"):
        step_footprint(_Counts(3, 4), x, FP32, Updates(1e-3), CPU)
    with pytest.raises(InputError, match="fp16 weights cannot be trained"):
        step_footprint(nn.Linear(3, 4), x, PrecisionPolicy.parse("16-true"), Updates(1e-3), CPU)


def test_the_batch_is_along_the_first_axis_of_the_first_tensor() -> None:
    inputs = {"x": torch.zeros(2, 3), "t": torch.zeros(2), "table": torch.zeros(7, 3), "s": torch.zeros(()), "n": 4}
    found = with_batch(inputs, 5)
    assert {name: list(getattr(value, "shape", [])) for name, value in found.items()} == {
        "x": [5, 3],
        "t": [5],
        "table": [7, 3],
        "s": [],
        "n": [],
    }
    assert found["n"] == 4
    with pytest.raises(InputError, match="no tensor with axes"):
        with_batch((torch.zeros(()), 3), 5)


# --- a training step --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "precision"), [(eqm, "fp32"), (eqm, "16-mixed"), (eqm, "bf16-true"), (cdit, "bf16-mixed")]
)
def test_a_step_holds_what_a_real_one_keeps(make: Any, precision: str) -> None:
    network, inputs = make()
    policy = PrecisionPolicy.parse(precision)
    planned = step_footprint(network, inputs, policy, Updates(1e-3), CPU)
    state = TrainState(network, policy, Updates(1e-3), CPU)
    with state.microbatch(last=True):
        state.backward(mean_square(state.model(*inputs)))
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    state.update()
    moments = [value for kept in state.optimizer.state.values() for value in kept.values()]
    own = [*network.parameters(), *network.buffers()]
    addresses = {tensor.untyped_storage().data_ptr() for tensor in own}
    copies = [t for t in state.weights.values() if t.untyped_storage().data_ptr() not in addresses]
    optimizer = bytes_of(*moments, *copies, *state.fixed.values(), *state.ema.values())
    assert planned.weights == bytes_of(*own)
    assert planned.optimizer == pytest.approx(optimizer, abs=64)  # single numbers
    fp32 = sum(4 * gradient.numel() for gradient in gradients)
    assert fp32 <= planned.gradients <= 1.05 * fp32 + sum(g.nbytes for g in gradients if g.dtype != torch.float32) / 2
    assert planned.peak > planned.weights + planned.optimizer


def test_recomputing_and_micro_batches_take_less() -> None:
    network, inputs = eqm()
    inputs = with_batch(inputs, 64)
    half = with_batch(inputs, 32)
    policy = PrecisionPolicy()

    def peak(given: Any, recomputed: float, parts: int) -> int:
        return step_footprint(network, given, policy, Updates(1e-3, recomputed=recomputed), CPU, parts=parts).peak

    by_share = [peak(inputs, blocks / 3, 1) for blocks in range(4)]
    assert sorted(by_share, reverse=True) == by_share
    assert by_share[3] < 0.75 * by_share[0]
    assert peak(half, 0, 2) < 0.75 * by_share[0]


# --- what fits --------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(1, 800))
def test_the_largest_batch_is_the_one_that_trying_all_finds(steps: list[int], budget: int) -> None:
    tops = [sum(steps[: number + 1]) for number in range(len(steps))]

    def peak(samples: int) -> int:
        return tops[samples - 1] if samples <= len(tops) else 10**6 * samples

    fitting = [samples for samples in range(1, len(tops) + 1) if peak(samples) <= budget]
    if fitting:
        assert largest(peak, budget, "it") == max(fitting)
    else:
        with pytest.raises(InputError, match=f"it needs {tops[0]} bytes"):
            largest(peak, budget, "it")


@given(st.lists(st.integers(0, 100), min_size=1, max_size=30), st.integers(0, 100))
def test_the_least_recomputing_is_the_one_that_trying_all_finds(values: list[int], budget: int) -> None:
    falling = sorted(values, reverse=True)
    fitting = [number for number, value in enumerate(falling) if value <= budget]
    if fitting:
        assert least(falling.__getitem__, len(falling) - 1, budget, "it") == min(fitting)
    else:
        with pytest.raises(InputError, match=f"it needs {falling[-1]} bytes"):
            least(falling.__getitem__, len(falling) - 1, budget, "it")


def test_a_plan_within_a_budget_is_the_largest_there_is() -> None:
    network = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    inputs = (torch.zeros(1, 16),)

    def peak(batch: int) -> int:
        return forward_footprint(network, with_batch(inputs, batch), FP32, CPU).peak

    found = plan(network, inputs, FP32, CPU, train=False, budget=peak(37) + 1)
    assert (found.batch, found.recomputed, found.footprint.peak) == (37, 0, peak(37))
    assert plan(network, with_batch(inputs, 5), FP32, CPU, train=False).batch == 5


def test_a_plan_recomputes_as_few_blocks_as_are_enough() -> None:
    network, inputs = eqm()

    def peak(recomputed: int) -> int:
        updates = Updates(1.0, recomputed=recomputed / 3)
        return step_footprint(network, with_batch(inputs, 64), FP32, updates, CPU).peak

    for budget, expected in ((peak(0), 0), (peak(0) - 1, 1), (peak(1) - 1, 2)):
        found = plan(network, inputs, FP32, CPU, train=True, batch=64, budget=budget)
        assert (found.batch, found.recomputed, found.blocks) == (64, expected, 3)
        assert found.footprint.peak <= budget


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8 * 10**9),
        ("8 GiB", 8 * 2**30),
        ("500MB", 5 * 10**8),
        ("1.5gb", 15 * 10**8),
        ("64kib", 65536),
        ("2T", None),
        ("12345", 12345),
        ("8 apples", None),
        ("GB", None),
        ("-1GB", None),
        ("0MB", None),
        ("", None),
        ("1e3MB", None),
    ],
)
def test_sizes_as_people_write_them(text: str, size: int | None) -> None:
    if size is not None:
        assert parse_size(text) == size
        return
    with pytest.raises(InputError, match="expected a size such as 8GB"):
        parse_size(text)


@given(st.integers(1, 10**12))
def test_what_is_named_as_enough_is_enough(size: int) -> None:
    assert parse_size(told(size).removesuffix(" bytes")) >= size


# --- channels ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 10000))
def test_channels_are_rounded_to_the_next_multiple_of_16_bytes(channels: int) -> None:
    for name, multiple in (("bf16-mixed", 8), ("16-true", 8), ("fp32,compute=tf32", 4), ("fp32", 1)):
        rounded = round_channels(channels, PrecisionPolicy.parse(name))
        assert rounded == math.ceil(channels / multiple) * multiple


def test_layers_of_odd_channels_are_named() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 20, 1), nn.Linear(24, 30), nn.Linear(8, 8)
    )
    assert odd_layers(network, PrecisionPolicy.parse("bf16-true")) == {"0": (3, 8), "2": (20, 24), "3": (30, 32)}
    assert odd_layers(network, PrecisionPolicy.parse("fp32,compute=tf32")) == {"0": (3, 4), "3": (30, 32)}
    assert odd_layers(network, FP32) == {}


# --- training within a budget -----------------------------------------------------------------------------------------


class _Told(Progress):
    """Keeps the lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


def _needed(run: TrainConfig, parts: int, recomputed: float) -> str:
    """Bytes of a step of a run on the toy world's latents."""
    about = run.about((16, 4, 4), 1)
    with torch.device("meta"):
        network = about.build()
        inputs = with_batch(about.family.example(network), (run.global_batch_size or 0) // parts)
    return str(
        step_footprint(network, inputs, FP32, replace(run.updates, recomputed=recomputed), CPU, parts=parts).peak
    )


def test_training_within_a_budget_keeps_the_batch_and_the_bits(latents: Path, tmp_path: Path) -> None:
    plain, progress = config(tmp_path / "plain", latents, steps=2), _Told()
    planned = plain.model_copy(
        update={"results_dir": tmp_path / "planned", "memory": _needed(plain, parts=1, recomputed=0.5)}
    )
    assert train(planned, progress).loss == train(plain).loss
    kept = json.loads((tmp_path / "planned" / "run" / "config.json").read_text())
    assert (kept["gradient_accumulation_steps"], kept["activation_budget"]) == (1, 0.5)
    assert any("with 1 of 2 blocks computed again" in line for line in progress.lines)
    assert train(planned.model_copy(update={"steps": 3})).step == 3  # goes on
    with pytest.raises(InputError, match=r"budget: got 1000 bytes; a step of .* with 8 items in fp32 needs"):
        train(planned.model_copy(update={"run_name": "other", "memory": "1kB"}))


def test_training_within_less_has_micro_batches(latents: Path, tmp_path: Path) -> None:
    sizes = {"network": "EqM", "hidden_size": 8, "depth": 2, "num_heads": 2, "patch_size": 1}
    run = config(tmp_path, latents, model=sizes, global_batch_size=24, steps=1)
    enough = _needed(run, parts=2, recomputed=1.0)
    assert int(enough) < int(_needed(run, parts=1, recomputed=1.0))
    train(run.model_copy(update={"memory": enough}))
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (kept["gradient_accumulation_steps"], kept["global_batch_size"]) == (2, 24)


def test_what_is_not_planned_for_training_is_named(toy_world: Path, latents: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pixels that are encoded in every step are not planned"):
        train(config(tmp_path, toy_world, image_size=32, memory="8GB"))
    with pytest.raises(InputError, match="memory: got 'much'"):
        train(config(tmp_path, latents, memory="much"))


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_tells_each_precision_and_batch() -> None:
    words = [
        "memory",
        "--model",
        "EqM-S/8",
        "--batch",
        1,
        "--batch",
        4,
        "--precision",
        "fp32",
        "--precision",
        "bf16-true",
    ]
    document = json.loads(run_cli(*words, "--json").stdout)
    assert document["model"] == "EqM-S/8 (random weights)"
    assert [(row["policy"], row["batch"]) for row in document["plans"]] == [
        ("fp32", 1),
        ("fp32", 4),
        ("bf16-true", 1),
        ("bf16-true", 4),
    ]
    opened = open_model("EqM-S/8", weights=False)
    assert opened.inputs is not None
    expected = forward_footprint(opened.module, with_batch(opened.inputs, 4), FP32, CPU)
    assert document["plans"][1]["footprint"] == asdict(expected)
    lines = run_cli(*words).stdout.splitlines()
    assert lines[0].startswith("EqM-S/8 (random weights): a forward call on cpu, predicted")
    assert lines[3].split()[:3] == ["fp32", "4", f"{expected.weights / 1e6:.1f}"]


def test_the_command_fits_a_budget() -> None:
    words = ["memory", "--model", "EqM-S/8", "--precision", "fp32", "--json"]
    (found,) = json.loads(run_cli(*words, "--budget", "200MB").stdout)["plans"]
    assert found["footprint"]["peak"] <= 200e6
    (more,) = json.loads(run_cli(*words, "--batch", found["batch"] + 1).stdout)["plans"]
    assert more["footprint"]["peak"] > 200e6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "EqM-Z/2"], "expected EqM-{S,B,L,XL}/{2,4,8}"),
        (["--model", "PeakNet"], "--inputs: nothing tells what PeakNet (random weights) is called with"),
        (["--model", "EqM-S/8", "--budget", "lots"], "memory: got 'lots'; expected a size such as 8GB"),
        (["--model", "EqM-S/8", "--budget", "1MB"], "budget: got 1.00 MB; EqM in fp32 with one sample needs"),
        (["--model", "EqM-S/8", "--train", "--precision", "16-true"], "fp16 weights cannot be trained"),
        (["--model", "EqM-S/8", "--inputs", "missing.pt"], "missing.pt: no such file of inputs"),
    ],
)
def test_bad_words_are_one_line(words: list[str], said: str) -> None:
    result = run_cli("memory", *words, check=2)
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_plans_are_within_6_percent_of_what_processes_take() -> None:
    """Small kin of the ten cases of `halfstep bench memory`."""
    cases = (Planned("EqM-S/8", "bf16-true", 64), Planned("EqM-S/8", "bf16-mixed", 16, train=True))
    for row in bench_memory(cases)["cases"]:
        assert abs(row["off"]) < 0.06, row
