"""halfstep generate on pipelines with random weights: what it makes, how it goes on, what it refuses."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from halfstep.config import load_yaml, validate
from halfstep.errors import BusyError, InputError
from halfstep.files import FileLock
from halfstep.generate import GenerateConfig, expand_template, generate
from halfstep.generate.pipeline import Decoder, Verdict, load_generator
from halfstep.precision import PrecisionPolicy
from halfstep.progress import Progress
from halfstep.store import open_trajectories, verify_trajectories
from tests.support.cli import run_cli
from tests.support.networks import tiny_stable_diffusion

# The form of the files that people have.
YAML = """
latent_analysis_settings: {store_latents: true, latent_storage_format: "numpy", storage_interval: 1,
  compress_latents: true, storage_dtype: "float16"}
model_settings: {model_id: MODEL, seed: 42, sampler: unipc, cfg_scale: 6.5, steps: 4, device: cpu}
video_settings: {width: 32, height: 48, fps: 8, duration: 1.0, frames: 5}
memory_settings: {enable_memory_optimization: true, clear_cache_between_videos: true, use_gradient_checkpointing: true}
prompt_settings:
videos_per_variation: 2
"""


def config(model: Path, **changes: Any) -> GenerateConfig:
    content = {
        "model_settings": {"model_id": str(model), "steps": 3, "precision": "fp32", "device": "cpu"},
        "video_settings": {"width": 32, "height": 48, "frames": 5},
    }
    for name, values in changes.items():
        content[name] = {**content.get(name, {}), **values} if isinstance(values, dict) else values
    return validate(content, GenerateConfig, "test")


def test_templates() -> None:
    assert expand_template("a cat") == ["a cat"]
    assert expand_template("a [red|blue] [car|cat]") == ["a red car", "a red cat", "a blue car", "a blue cat"]
    assert expand_template("a [|big ]cat (sitting)") == ["a cat (sitting)", "a big cat (sitting)"]
    for bad, named in [("a [red", "do not match"), ("a red]", "do not match"), ("[[a]|b]", "do not match"),
                       ("[|a]", "empty prompt"), ("a [b|b]", "twice")]:  # fmt: skip
        with pytest.raises(InputError, match=named):
            expand_template(bad)


@pytest.mark.slow
def test_the_command_makes_a_batch_and_goes_on_with_it(small_wan_pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(YAML.replace("MODEL", str(small_wan_pipeline)))
    command = ["generate", "--config", tmp_path / "c.yaml", "--template", "a [red|blue] car", "-o", tmp_path / "b"]
    result = run_cli(*command, "--store-latents", "--json")
    assert json.loads(result.stdout)["generated"] == [f"prompt_00{p}_vid00{v}" for p in (0, 1) for v in (1, 2)]
    assert "without effect here: memory_settings.use_gradient_checkpointing; attention" in result.stderr
    runs = open_trajectories(tmp_path / "b")
    assert [(runs[key].prompt, runs[key].seed) for key in runs] == [
        ("a red car", 42), ("a red car", 43), ("a blue car", 42), ("a blue car", 43)]  # fmt: skip
    facts = runs["prompt_000_vid001"].attributes
    assert PrecisionPolicy.parse(facts["policy"]).storage == "fp16"
    expected = {"scheduler": "UniPCMultistepScheduler", "steps": 4, "width": 32, "height": 48, "frames": 5,
                "states": "(1 - sigma) x0 + sigma noise", "pipeline": "WanPipeline"}  # fmt: skip
    assert {name: facts[name] for name in expected} == expected
    for key in runs:
        assert (len(runs[key]), runs[key].problems, runs[key].attributes["guidance"]) == (5, (), 6.5)
        with av.open(str(tmp_path / "b" / "runs" / key / "video.mp4")) as video:
            assert [(f.width, f.height) for f in video.decode(video=0)] == [(32, 48)] * 5
    first, other, third = (runs[f"prompt_00{p}_vid00{v}"].latents for p, v in ((0, 1), (1, 1), (0, 2)))
    assert np.abs(first[0] - other[0]).max() < 0.002  # the same seed, within what the codec may change
    assert np.abs(first[-1] - other[-1]).max() > 0.005  # in bf16 more than in fp32, whichever is faster here
    assert np.abs(first[0] - third[0]).max() > 0.1

    again = run_cli(*command, check=2)
    assert "holds a batch already; --resume goes on with it" in again.stderr
    damaged = tmp_path / "b" / "runs" / "prompt_000_vid002" / "metadata.json"
    damaged.write_text(damaged.read_text().replace('"complete"', '"running"'))  # as a kill in mid-run leaves it
    (tmp_path / "b" / "latents" / "prompt_000_vid002" / "sigmas" / "zarr.json").unlink()
    before = (tmp_path / "b" / "runs" / "prompt_000_vid001" / "video.mp4").stat().st_mtime_ns
    report = json.loads(
        run_cli(*command, "--resume", "--store-latents", "--set", "videos_per_variation=3", "--json").stdout
    )
    assert report["generated"] == ["prompt_000_vid002", "prompt_000_vid003", "prompt_001_vid003"]
    assert (tmp_path / "b" / "runs" / "prompt_000_vid001" / "video.mp4").stat().st_mtime_ns == before
    assert verify_trajectories(tmp_path / "b" / "latents").ok
    assert np.array_equal(open_trajectories(tmp_path / "b")["prompt_000_vid002"].latents[-1], third[-1])
    other = run_cli(*command, "--resume", "--set", "model_settings.steps=5", check=2)
    assert "(model_settings.steps: was 4, is 5; videos_per_variation: was 3, is 2)" in other.stderr


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16-true"])
def test_the_precision_reaches_the_networks(small_wan_pipeline: Path, tmp_path: Path, precision: str) -> None:
    policy = PrecisionPolicy.parse(precision)
    settings = config(small_wan_pipeline)
    generator = load_generator(settings.model_settings, settings.memory_settings, policy, "cpu", None)
    seen: set[torch.dtype] = set()
    block = generator.pipe.transformer.blocks[0].ffn.net[2]
    block.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    out = generator.pipe(
        prompt="a red car",
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=3,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).frames
    assert np.isfinite(out).all()
    half = torch.bfloat16 if precision != "fp32" else torch.float32
    assert seen == {half}
    stored = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert generator.pipe.transformer.blocks[0].attn1.to_q.weight.dtype == stored
    assert generator.pipe.text_encoder.encoder.block[0].layer[0].SelfAttention.q.weight.dtype == stored
    assert generator.pipe.transformer.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    assert generator.pipe.vae.dtype == torch.float32
    verdict = generator.decoder.verdict
    assert (verdict.difference is None) == (precision == "fp32")


class _Decoder:
    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.calls: list[bool] = []

    def decode(self, latents: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        """A product whose rounding is visible, and in half precision, past 100, not finite."""
        half = torch.is_autocast_enabled("cpu")
        self.calls.append(half)
        out = (latents @ torch.eye(latents.shape[-1])).float() * self.scale
        return (torch.where(latents.abs() > 100, torch.inf, out),) if half else (out,)


def test_the_decoder_is_half_where_that_is_enough() -> None:
    latents = torch.linspace(-1, 1, 64).reshape(8, 8)
    good, coarse = _Decoder(1.0), _Decoder(20.0)
    decoders = [Decoder(vae, None) for vae in (good, coarse)]
    shown = [[vae.decode(latents)[0] for _ in range(3)] for vae in (good, coarse)]
    assert good.calls == [False, True, True, True, True]  # compared once; then all in half, the first one too
    assert coarse.calls == [False, True, False, False, False]
    assert [decoder.verdict.half for decoder in decoders if decoder.verdict] == [True, False]
    assert all(torch.equal(pixels, same[0]) for same in shown for pixels in same)
    assert torch.isfinite(good.decode(latents * 1000)[0]).all()
    assert decoders[0].retried == 8  # rows, each a sample here
    kept = _Decoder(1.0)
    Decoder(kept, Verdict(half=False))  # as a batch that goes on brings it
    kept.decode(latents)
    assert kept.calls == [False]


def test_a_model_of_pictures(small_vae: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL, DDIMScheduler

    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    tiny_stable_diffusion(AutoencoderKL.from_pretrained(small_vae), scheduler).save_pretrained(tmp_path / "sd")
    settings = config(tmp_path / "sd", latent_analysis_settings={"store_latents": True, "storage_interval": 2})
    steps: list[int] = []

    class Watching(Progress):
        def start(self, total: int | None, done: int = 0) -> None:
            steps.append(-(total or 0))

        def advance(self, units: int = 1, *, written: int = 0) -> None:
            steps.append(units)

    report = generate(settings, "a cat", tmp_path / "b", progress=Watching())
    assert report.generated == ["prompt_000_vid001"]
    with Image.open(tmp_path / "b" / "runs" / "prompt_000_vid001" / "image.png") as picture:
        assert picture.size == (32, 48)
    assert steps == [-3, 1, 1, 1]
    assert open_trajectories(tmp_path / "b")["prompt_000_vid001"].steps.tolist() == [0, 2, 3]
    for sampler, scheduler in (("euler", "EulerDiscreteScheduler"), ("dpm++", "DPMSolverMultistepScheduler")):
        model = settings.model_settings.model_copy(update={"sampler": sampler})
        loaded = load_generator(model, settings.memory_settings, PrecisionPolicy(), "cpu", None)
        assert type(loaded.pipe.scheduler).__name__ == scheduler


def test_latents_that_cannot_be_kept_fail_their_run(
    small_wan_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full for a while; the run is made again when there is space."""
    settings = config(small_wan_pipeline, latent_analysis_settings={"store_latents": True})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.warns(RuntimeWarning, match="recording stopped, sampling goes on"):
        patched.setattr("halfstep.store.journal.os.fdatasync", full)
        report = generate(settings, "a cat", tmp_path / "b")
    assert "were not recorded whole" in report.failed["prompt_000_vid001"]
    again = generate(settings, "a cat", tmp_path / "b", resume=True)
    assert again.generated == ["prompt_000_vid001"]
    assert len(open_trajectories(tmp_path / "b")["prompt_000_vid001"]) == 4


def test_one_batch_is_made_by_one_process(small_wan_pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    lock = FileLock(tmp_path / "b" / ".lock")
    assert lock.try_exclusive()
    with pytest.raises(BusyError, match="is being written by another process"):
        generate(config(small_wan_pipeline), "a cat", tmp_path / "b")
    lock.release()


def test_a_result_that_is_not_finite_fails_alone(small_wan_pipeline: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(small_wan_pipeline, tmp_path / "model")
    weights = load_file(broken / "vae" / "diffusion_pytorch_model.safetensors")
    weights["decoder.conv_out.bias"][:] = float("nan")
    save_file(weights, broken / "vae" / "diffusion_pytorch_model.safetensors")
    report = generate(config(broken), "a [red|blue] car", tmp_path / "b")
    assert report.generated == []
    assert list(report.failed) == ["prompt_000_vid001", "prompt_001_vid001"]
    assert "the result is not finite in fp32" in report.failed["prompt_000_vid001"]
    assert json.loads((tmp_path / "b/runs/prompt_000_vid001/metadata.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("model_setings: {}", "model_setings: unknown key; did you mean 'model_settings'?"),
        ("video_settings: {widht: 3}", "video_settings.widht: unknown key; did you mean 'width'?"),
        ("latent_analysis_settings: {zzzz: 3}", "zzzz: unknown key; expected one of store_latents, latent_storage"),
        ("model_settings: {steps: 0}", "model_settings.steps: got 0"),
        ("model_settings: {seed: 99999999999999999999}", "model_settings.seed: got 99999999999999999999"),
        ("video_settings: {duration: .inf}", "video_settings.duration: got inf"),
        ("video_settings: {fps: 8}\nvideo_settings: {fps: 9}", "'video_settings' stands twice"),
        ("model_settings: {sampler: plms}", "model_settings.sampler: got 'plms'; input should be 'unipc'"),
        ("prompt_settings: {enable_weighting: true}", "prompt_settings.enable_weighting: got True"),
        ("attention_analysis_settings: {store_attention: true}", "attention_analysis_settings.store_attention: got"),
        ("- a", "top level: got"),
    ],
)
def test_faults_in_a_configuration_are_named(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError) as raised:
        load_yaml(tmp_path / "c.yaml", GenerateConfig)
    assert named in str(raised.value)


def test_prompts_come_from_the_command_or_from_the_settings() -> None:
    def settings(**prompts: Any) -> GenerateConfig:
        return validate({"prompt_settings": prompts}, GenerateConfig, "test")

    assert settings(template="a [red|blue] car").prompts(None) == ["a red car", "a blue car"]
    assert settings(prompts=["a [sic] cat", "a dog"]).prompts(None) == ["a [sic] cat", "a dog"]
    assert settings(template="a car").prompts("a cat") == ["a cat"]
    for bad, named in [
        ({}, "no prompt; give --template TEXT, or prompt_settings.template"),
        ({"template": "a", "prompts": ["b"]}, "a template and prompts; leave out one"),
        ({"prompts": ["b", "b"]}, "got 'b' twice or empty"),
        ({"prompts": [" "]}, "got '' twice or empty"),
        ({"prompts": ["a", "a "]}, "got 'a' twice or empty"),
    ]:
        with pytest.raises(InputError, match=named):
            settings(**bad).prompts(None)


def test_settings_without_effect_are_named() -> None:
    content = {
        "latent_analysis_settings": {"latent_storage_format": "torch", "storage_dtype": "float32"},
        "attention_analysis_settings": {"store_per_head": True},
    }
    chosen = validate(content, GenerateConfig, "test")
    assert chosen.without_effect() == [
        "latent_analysis_settings.latent_storage_format",
        "attention_analysis_settings.store_per_head",
    ]
    assert chosen.latent_analysis_settings.storage == "fp32"


@pytest.mark.slow
def test_prompts_of_the_settings_and_of_the_batch(small_wan_pipeline: Path, tmp_path: Path) -> None:
    """Without --template: the YAML's prompts, and on a resume those of the batch. Kept in fp32, that is noted."""
    (tmp_path / "c.yaml").write_text(
        YAML.replace("MODEL", str(small_wan_pipeline)).replace("float16", "float32").replace("steps: 4", "steps: 2")
    )
    command = ["generate", "--config", tmp_path / "c.yaml", "--precision", "fp32", "--set", "videos_per_variation=1"]
    assert "no prompt; give --template TEXT" in run_cli(*command, "-o", tmp_path / "b", check=2).stderr
    prompts = ["--set", 'prompt_settings.prompts=["a cat", "a dog"]']
    made = json.loads(run_cli(*command, *prompts, "-o", tmp_path / "b", "--json").stdout)
    assert (len(made["generated"]), made["policy"]) == (2, "fp32")
    runs = open_trajectories(tmp_path / "b")
    assert {(runs[key].prompt, runs[key].attributes["policy"]) for key in runs} == {
        ("a cat", "fp32"),
        ("a dog", "fp32"),
    }
    run_cli(*command, "--template", "a cow", "-o", tmp_path / "t")
    again = run_cli(*command, "-o", tmp_path / "t", "--resume", "--set", "videos_per_variation=2", "--json")
    assert json.loads(again.stdout)["generated"] == ["prompt_000_vid002"]


def test_settings_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model_settings: {steps: 7}\n")
    loaded = load_yaml(tmp_path / "c.yaml", GenerateConfig, ["model_settings.seed=3", "video_settings.frames=9"])
    assert (loaded.model_settings.steps, loaded.model_settings.seed, loaded.video_settings.frames) == (7, 3, 9)
    for bad in ("steps", "=3", "a..b=3"):
        with pytest.raises(InputError, match=r"expected a\.b=value"):
            load_yaml(tmp_path / "c.yaml", GenerateConfig, [bad])
    with pytest.raises(InputError, match="did you mean 'seed'"):
        load_yaml(tmp_path / "c.yaml", GenerateConfig, ["model_settings.sed=3"])


def test_models_that_cannot_be_loaded_are_named(small_wan_pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="cannot be loaded as a pipeline"):
        generate(config(tmp_path / "empty"), "a cat", tmp_path / "b")
    # What never made anything does not stand in the way.
    assert generate(config(small_wan_pipeline), "a cat", tmp_path / "b").generated == ["prompt_000_vid001"]
    with pytest.raises(InputError, match="have to be divisible by 16"):
        generate(config(small_wan_pipeline, video_settings={"width": 40}), "a cat", tmp_path / "w")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        generate(config(small_wan_pipeline), "a cat", tmp_path / "file")
    settings = config(small_wan_pipeline, model_settings={"sampler": "ddim"})
    with pytest.raises(InputError, match="got 'ddim' for a flow-matching model; expected unipc, euler"):
        generate(settings, "a cat", tmp_path / "c")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "thesis.txt").touch()
    with pytest.raises(InputError, match="and is no batch"):
        generate(config(small_wan_pipeline), "a cat", tmp_path / "d")
