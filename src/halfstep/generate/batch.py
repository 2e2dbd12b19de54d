"""generate(): one batch of videos or pictures in a folder that is only ever added to.

OUT/batch.json               prompts, seeds, settings
OUT/runs.jsonl               a line for every run that began, ended or failed
OUT/runs/prompt_000_vid001/  video.mp4 or image.png, and metadata.json
OUT/latents/                 a TrajectoryStore with a run of the same name
"""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import halfstep
from halfstep.data.outputs import write_picture, write_video
from halfstep.errors import FileError, HalfstepError, InputError, NumericsError, StoreError
from halfstep.files import alone, claim, file_errors, write_durably
from halfstep.generate.config import GenerateConfig, VideoSettings
from halfstep.generate.pipeline import Decoder, Generator, Verdict, load_generator
from halfstep.machine import open_device
from halfstep.precision import settle
from halfstep.progress import SILENT, Progress
from halfstep.sampling import record
from halfstep.settings import require_same
from halfstep.store import TrajectoryStore


@dataclass(frozen=True)
class PlannedRun:
    """One video or picture to make."""

    key: str
    prompt: str
    seed: int


@dataclass
class GenerateReport:
    """What was done: keys of runs `generated`, `skipped` (complete from an earlier call), `failed` with the reason."""

    output: str
    policy: str
    generated: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def plan(config: GenerateConfig, template: str | None) -> list[PlannedRun]:
    """All runs: every prompt with the same seeds, prompt by prompt."""
    seed = config.model_settings.seed
    return [
        PlannedRun(f"prompt_{p:03d}_vid{v + 1:03d}", prompt, seed + v)
        for p, prompt in enumerate(config.prompts(template))
        for v in range(config.videos_per_variation)
    ]


def generate(
    config: GenerateConfig,
    template: str | None,
    output: Path,
    *,
    resume: bool = False,
    progress: Progress = SILENT,
) -> GenerateReport:
    """Make every run of `template`, or of the prompts in `config`, in folder `output`.

    With `resume`, `template` may be left out, which is then that of the batch; complete runs are left alone and the
    others made again, in the precision of the batch; it must be the same batch but for more videos a prompt. A run
    whose result is not finite, or whose latents could not be kept, fails alone. `progress` hears of each sampling step.
    Raises InputError for a folder that holds a batch already (without `resume`) or another one, and without a prompt.
    """
    claim(output, "batch", ("batch.json",))
    if template is None and resume and (output / "batch.json").exists():
        template = json.loads((output / "batch.json").read_text())["template"]
    runs = plan(config, template)
    with alone(output):
        return _generate(config, template, output, runs, resume, progress)


def _generate(
    config: GenerateConfig,
    template: str | None,
    output: Path,
    runs: list[PlannedRun],
    resume: bool,
    progress: Progress,
) -> GenerateReport:
    started = time.monotonic()
    device = str(open_device(config.model_settings.device))
    settings = {"template": template, **config.document()}
    kept = _kept(output, settings, config.videos_per_variation, resume)
    policy, notes = settle("auto" if kept else config.model_settings.precision, device, "sample", kept.get("policy"))
    for line in notes:
        progress.note(line)
    policy = replace(policy, storage=config.latent_analysis_settings.storage)
    done = {run.key for run in runs if _status(output, run) == "complete"}
    report = GenerateReport(str(output), str(policy), skipped=[run.key for run in runs if run.key in done])
    unused = config.without_effect()
    if unused:
        progress.note(
            f"without effect here: {', '.join(unused)}; attention is memory-efficient as it is, and `halfstep store "
            "convert --to npy.gz` makes other files of latents"
        )
    if len(done) < len(runs):
        decoder = kept.get("decoder")
        verdict = None if decoder is None else Verdict(**decoder)
        generator = load_generator(config.model_settings, config.memory_settings, policy, device, verdict)
        frames = _frames(generator, config.video_settings)
        if frames not in (None, wanted_frames := config.video_settings.wanted_frames):
            progress.note(f"video_settings: {wanted_frames} frames do not fit the model, {frames} are made")
        # Not before the model is there: a name that was mistyped may be put right with the same command.
        content = {
            "template": template,
            "config": config.document(),
            "policy": str(policy),
            "decoder": decoder,
            "halfstep": halfstep.__version__,
            "runs": [asdict(run) for run in runs],
        }
        write_durably(output / "batch.json", _json(content))
        progress.start(config.model_settings.steps * (len(runs) - len(done)))
        for run in runs:
            if run.key in done:
                continue
            try:
                _make(generator, config, run, frames, output, progress)
                report.generated.append(run.key)
            except (NumericsError, FileError) as error:
                report.failed[run.key] = str(error)
                _log(output, {"run": run.key, "event": "failed", "reason": str(error)})
            if config.memory_settings.clear_cache_between_videos and torch.cuda.is_available():
                torch.cuda.empty_cache()
    report.seconds = time.monotonic() - started
    return report


def _kept(output: Path, settings: dict[str, Any], videos: int, resume: bool) -> dict[str, Any]:
    """What batch.json says of the batch that is to be gone on with, {} where none began; InputError where it has other
    settings, or more than the `videos` a prompt that are wanted now."""
    path = output / "batch.json"
    if not (path.exists() and any((output / "runs").glob("*/metadata.json"))):
        return {}
    if not resume:
        raise InputError(f"{output}: holds a batch already; --resume goes on with it, or name a new folder")
    kept: dict[str, Any] = json.loads(path.read_text())
    may_differ = {"output_dir", "batch_name", "use_timestamp", "model_settings.device"}
    if kept["config"].get("videos_per_variation", 1) <= videos:
        may_differ.add("videos_per_variation")  # more of them are added
    before = {"template": kept["template"], **kept["config"]}
    require_same(output, "batch", before, settings, may_differ=may_differ, advice="name a new folder")
    return kept


def _keep_verdict(output: Path, verdict: Verdict) -> None:
    """Note the verdict on the decoder with the batch, once there is one."""
    path = output / "batch.json"
    content = json.loads(path.read_text())
    if content["decoder"] is None:
        write_durably(path, _json({**content, "decoder": asdict(verdict)}))


def _status(output: Path, run: PlannedRun) -> str | None:
    path = output / "runs" / run.key / "metadata.json"
    status: str | None = json.loads(path.read_text())["status"] if path.exists() else None
    return status


def _make(
    generator: Generator,
    config: GenerateConfig,
    run: PlannedRun,
    frames: int | None,
    output: Path,
    progress: Progress,
) -> None:
    model, video, latents = config.model_settings, config.video_settings, config.latent_analysis_settings
    folder = output / "runs" / run.key
    metadata: dict[str, Any] = {
        **asdict(run),
        "status": "running",
        "model": model.model_id,
        "sampler": type(generator.pipe.scheduler).__name__,
        "steps": model.steps,
        "guidance": model.cfg_scale,
        "policy": str(generator.policy),
        "device": str(generator.device),
    }
    with file_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / "metadata.json", _json(metadata))
    _log(output, {"run": run.key, "event": "began"})
    options: dict[str, Any] = {
        "prompt": run.prompt,
        "num_inference_steps": model.steps,
        "guidance_scale": model.cfg_scale,
        "width": video.width,
        "height": video.height,
        "generator": torch.Generator().manual_seed(run.seed),
        "output_type": "np",
    }
    if config.prompt_settings.negative_prompt is not None:
        options["negative_prompt"] = config.prompt_settings.negative_prompt
    if frames is not None:
        options["num_frames"] = frames
    recording: Any = nullcontext(None)
    if latents.store_latents:
        store = TrajectoryStore.create(output / "latents")
        if run.key in store:  # of a call that was interrupted; the same seed makes the same steps again
            store.remove(run.key)
        noted = {
            "prompt": run.prompt,
            "seed": run.seed,
            "model": model.model_id,
            "guidance": model.cfg_scale,
            "negative_prompt": config.prompt_settings.negative_prompt,
            "policy": str(generator.policy),
            "width": video.width,
            "height": video.height,
            "frames": frames,
        }
        noted = {name: value for name, value in noted.items() if value is not None}
        recording = record(
            generator.pipe, store, run=run.key, format=latents.format(), interval=latents.storage_interval, **noted
        )
    begun = time.monotonic()
    with recording as record_step:

        def after_step(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if record_step is not None:
                record_step(pipe, i, t, tensors)
                if record_step.refused:  # the latents were asked for, and will not come for the other runs either
                    raise InputError(f"{record_step.refused}; or generate without --store-latents")
            progress.advance()
            return tensors

        try:
            result = generator.pipe(**options, callback_on_step_end=after_step)
        except ValueError as error:  # the pipeline's own check of its arguments
            if isinstance(error, HalfstepError):
                raise
            raise InputError(f"{model.model_id}: {error}") from error
    metadata["sampling_seconds"] = round(time.monotonic() - begun, 3)
    values = np.asarray(result.frames if hasattr(result, "frames") else result.images)[0]
    if not np.isfinite(values).all():
        write_durably(folder / "metadata.json", _json({**metadata, "status": "failed"}))
        raise NumericsError(f"{run.key}: the result is not finite in {generator.policy}; use --precision bf16 or fp32")
    pixels = (values * 255).round().clip(0, 255).astype(np.uint8)
    metadata["file"] = _write_result(folder, pixels, video.fps)
    metadata |= {
        "shape": list(pixels.shape),
        "decoder": _decoder_facts(output, generator.decoder),
    }
    if latents.store_latents:
        kept = store[run.key]
        metadata["latents"] = {"run": run.key, "states": len(kept), "problems": list(kept.problems)}
        if not kept.attributes["complete"]:
            write_durably(folder / "metadata.json", _json({**metadata, "status": "failed"}))
            raise StoreError(f"{run.key}: its latents were not recorded whole ({'; '.join(kept.problems)})")
    write_durably(folder / "metadata.json", _json({**metadata, "status": "complete"}))
    _log(output, {"run": run.key, "event": "complete", "seconds": metadata["sampling_seconds"]})
    progress.show(f"{run.key}: {metadata['sampling_seconds']:.1f} s, seed {run.seed}, {run.prompt}")


def _decoder_facts(output: Path, decoder: Decoder | None) -> dict[str, Any] | None:
    """How this run was decoded; its verdict is kept for all others."""
    if decoder is None or decoder.verdict is None:
        return None
    _keep_verdict(output, decoder.verdict)
    return {
        "precision": "bf16-mixed" if decoder.verdict.half else "fp32",
        "bf16_rms_difference": decoder.verdict.difference,
        "retried_in_fp32": decoder.retried,
    }


def _frames(generator: Generator, video: VideoSettings) -> int | None:
    """The nearest number of frames that an autoencoder which compresses time can decode: one, and groups after it; None
    for a model of pictures."""
    if not generator.takes("num_frames"):
        return None
    factor = int(getattr(generator.pipe, "vae_scale_factor_temporal", 1))
    return max(0, round((video.wanted_frames - 1) / factor)) * factor + 1


def _write_result(folder: Path, pixels: np.ndarray[Any, np.dtype[np.uint8]], fps: int) -> str:
    """Write the picture [H, W, 3] or video [T, H, W, 3]; the name of the file."""
    if pixels.ndim == 3:
        write_picture(folder / "image.png", pixels)
        return "image.png"
    write_video(folder / "video.mp4", pixels, fps)
    return "video.mp4"


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1, ensure_ascii=False).encode()


def _log(output: Path, line: dict[str, Any]) -> None:
    with file_errors(output / "runs.jsonl"), (output / "runs.jsonl").open("a") as file:
        file.write(json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **line}, ensure_ascii=False) + "\n")
