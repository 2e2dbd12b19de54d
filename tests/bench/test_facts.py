"""What figures depend on: switches as modules find them, memory of a call, energy."""

import sys

import pytest
import torch
from torch import nn

from halfstep.bench.energy import energy_meter
from halfstep.bench.facts import machine, switches
from halfstep.bench.memory import peak_of


def test_switches_are_those_within_the_call() -> None:
    network, x = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))), torch.ones(2, 4)

    def call() -> None:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            network(x)

    found = switches(call)
    assert found["autocast"] == "bfloat16" and found["grad"] is False
    assert found["threads"] == torch.get_num_threads()

    def both() -> None:
        call()
        network(x)

    assert switches(both)["autocast"] == ["bfloat16", None]
    assert switches(lambda: network(x))["autocast"] is None


def test_switches_without_modules_are_those_around() -> None:
    with torch.no_grad():
        assert switches(lambda: None)["grad"] is False
    assert switches(lambda: None)["grad"] is True


def test_nobody_looks_any_more_after_a_call_that_raises() -> None:
    def call() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        switches(call)
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_the_memory_of_a_call_is_what_it_holds() -> None:
    def call() -> None:
        torch.ones(16_000_000)

    call()
    peak = peak_of(call, torch.device("cpu"))
    assert 60 < peak.peak_mb - peak.held_mb < 100


def test_energy_is_told_or_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert energy_meter("cpu") == "only of GPUs"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy_meter("cuda:0") == "pynvml is not installed"


def test_the_machine() -> None:
    assert {"device", "cores", "torch", "halfstep", "python", "numpy"} == machine("cpu").keys()
