"""On a CUDA device: the same results as on the processor, recorded without changing them (`benchmarks/gpu.sh`)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from halfstep.data.sources import SourceConfig
from halfstep.data.toy_world import write_toy_world
from halfstep.encode import EncodeOptions, encode
from halfstep.engine import Lanes
from halfstep.engine.graphs import Graphed
from halfstep.machine import open_device
from halfstep.precision import PrecisionPolicy, prepare, probe
from halfstep.sampling import StoreRecorder, record
from halfstep.sampling.recorder import Step
from halfstep.store import DatasetStore, TrajectoryFormat, TrajectoryStore
from halfstep.stream.model import Inference, ModelSpec
from tests.sampling.test_pipelines import PIPELINES, make
from tests.support.streaming import tiny_weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
EXACT = TrajectoryFormat(storage="fp32")


def test_the_probe_names_the_device_and_its_fast_types() -> None:
    found = probe(open_device("cuda"))
    assert "NVIDIA" in found.device
    assert str(open_device("auto")).startswith("cuda")


def test_a_store_is_the_same_as_on_the_processor(tmp_path: Path) -> None:
    write_toy_world(tmp_path / "world", walks=2, frames=8)
    for device in ("cpu", "cuda"):
        options = EncodeOptions(
            tmp_path / device, size=(64, 64), batch_size=4, precision="fp32", storage="fp32", device=device
        )
        encode([SourceConfig(path=tmp_path / "world")], options)
    cpu, cuda = (DatasetStore.open(tmp_path / device) for device in ("cpu", "cuda"))
    assert cpu.keys() == cuda.keys()
    for key in cpu.keys():
        assert cuda.read(key, 0, 8) == pytest.approx(cpu.read(key, 0, 8), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true", "16-true", "fp32,compute=tf32"])
def test_networks_in_each_precision_stay_near_fp32(precision: str) -> None:
    from halfstep.models.eqm import EqM

    torch.manual_seed(0)
    network = EqM.named("EqM-S/2", 16, 10).eval().cuda()
    for parameter in network.parameters():  # the last layer begins at zero
        torch.nn.init.normal_(parameter, std=0.02)
    x, y = torch.randn(4, 4, 16, 16, device="cuda"), torch.arange(4, device="cuda")
    with torch.inference_mode():
        exact = network(x, torch.ones(4, device="cuda"), y)
        prepare(network, PrecisionPolicy.parse(precision))
        half = network(x, torch.ones(4, device="cuda"), y)
    assert half.dtype == torch.float32
    error = float((half - exact).norm() / exact.norm())
    assert 0 < error < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_latents_of_a_device_are_recorded_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    """Also when the sampler goes on at once and writes over them."""
    store = TrajectoryStore.create(tmp_path / "runs")
    x = torch.randn(16, 8, 40, 64, device="cuda", dtype=dtype)
    states = []
    with StoreRecorder(store, "a", format=EXACT) as recorder:
        for k in range(20):
            states.append(x.float().cpu())
            recorder.record(Step(k, float(20 - k), 1 - k / 20, x))
            x.mul_(0.9).add_(0.01)
    run = store["a"]
    assert run.problems == ()
    assert run.attributes["dtype"] == str(dtype).removeprefix("torch.")
    assert "NVIDIA" in run.attributes["device"]
    for k, state in enumerate(states):
        assert np.array_equal(run.latents[k], state.numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in PIPELINES if "CogVideoX" not in name])
def test_pipelines_on_a_device_give_the_same_sample(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pipe, call = make(name)
    pipe.to("cuda", dtype)

    for key, value in call.options.items():
        if isinstance(value, torch.Tensor):
            call.options[key] = value.to("cuda", dtype if value.is_floating_point() else value.dtype)
    plain = call()
    with record(pipe, tmp_path / "s", run="a", seed=7, format=EXACT) as recording:
        recorded = call(callback_on_step_end=recording)
    assert torch.equal(plain, recorded)
    assert recording.refused is None
    run = TrajectoryStore.open(tmp_path / "s")["a"]
    assert np.array_equal(run.latents[-1], plain[0].float().cpu().numpy())
    assert len(run) == 5 + (name == "Stable Diffusion")  # PNDM calls its first timestep twice


@pytest.mark.parametrize("policy", ["fp32", "bf16-true", "16-true"])
@torch.inference_mode()
def test_batches_replayed_from_a_graph_are_those_that_are_launched(policy: str, tmp_path: Path) -> None:
    """In two threads at once, each with a graph and a stream of its own."""
    spec, parsed = ModelSpec(str(tiny_weights(tmp_path / "w.pt"))), PrecisionPolicy.parse(policy)
    graphed = Inference(spec, parsed, "cuda")
    eager = Inference(ModelSpec(spec.model, compile_mode=None), parsed, "cuda")
    eager._graphed.problem = "not to be used"
    dtype = {"fp32": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}[policy]
    batches = [torch.randn(4, 1, 64, 96).to(dtype) for _ in range(12)]
    expected = [eager(batch).masks for batch in batches]
    with Lanes.open([graphed, graphed], "gpu") as lanes:
        found = [future.result().masks for future in [lanes.submit(batch) for batch in batches]]
    assert graphed.problem is None
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_what_cannot_be_recorded_is_launched() -> None:
    graphed = Graphed(lambda x: x * float(x.sum().cpu()), torch.device("cuda"))  # asks the device in between
    with graphed.stream():
        assert graphed(torch.ones(3, device="cuda")).tolist() == [3.0, 3.0, 3.0]
        assert graphed.problem is not None
