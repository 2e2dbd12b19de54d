"""The benchmark of the load: the same weights in each way, never two copies of them, and what it tells."""

import pytest
import torch

from halfstep.bench.live_load import Way, bench_live_load, opened, ways

CPU = torch.device("cpu")


def test_each_way_has_the_same_weights_in_its_types() -> None:
    exact, half = opened(16, Way("fp32"), CPU).state_dict(), opened(16, Way("bf16-true"), CPU).state_dict()
    assert exact.keys() == half.keys()
    assert {value.dtype for value in half.values()} == {torch.bfloat16}
    assert all(torch.equal(value.bfloat16(), half[name]) for name, value in exact.items())
    assert all(torch.isfinite(value).all() for value in exact.values())


def test_ways_of_a_processor_and_of_a_gpu() -> None:
    assert list(ways(CPU)) == ["fp32", "autocast bf16", "true bf16"]
    assert list(ways(torch.device("cuda"))) == ["fp32", "autocast bf16", "true bf16", "autocast fp16", "true fp16"]


@pytest.mark.slow
def test_half_holds_half_from_the_beginning() -> None:
    result = bench_live_load(width=32, rounds=1, device="cpu")
    assert (result["parameters"], result["gmac_per_sample"]) == (24_494_333, 3.1)
    assert result["seconds"].keys() == result["memory_mb"].keys() == {"fp32", "autocast bf16", "true bf16"}
    memory, weights = result["memory_mb"], 4 * result["parameters"] / 1e6
    for name, share in (("fp32", 1.0), ("true bf16", 0.5)):
        assert share * weights < memory[name]["loading"] < 1.1 * share * weights
        assert memory[name]["peak"] > memory[name]["loading"]
        assert memory[name]["peak"] == pytest.approx(memory[name]["planned"], rel=0.5)
    assert memory["autocast bf16"]["peak"] > memory["fp32"]["peak"]
    assert 0 < result["error"]["true bf16"] < 0.1
