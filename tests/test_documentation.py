"""What the documents say is so: their commands run, or at least parse; names, links and figures are those of today."""

import ast
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import typer
import yaml
from PIL import Image

from halfstep.cli import app
from halfstep.config import validate
from halfstep.data.sources import SourceConfig
from halfstep.encode import EncodeOptions, encode
from halfstep.sampling import StoreRecorder, drive
from halfstep.sampling.toy_flow import ToyFlow
from halfstep.store import TrajectoryStore
from halfstep.train.config import TrainConfig
from halfstep.train.loop import train

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
PAGES = {
    path.relative_to(REPOSITORY).as_posix(): path for path in [REPOSITORY / "README.md", *sorted(DOCS.rglob("*.md"))]
}
EXAMPLES = {
    "roundtrip.py": ["picture.png"],
    "own_training_loop.py": ["auto"],
    "navigation_loader.py": [],
    "record_and_analyze.py": ["recorded"],
    "video_through_network.py": ["marked.mp4"],
    "audit_networks.py": ["audits"],
    "train_peaknet.py": ["weights.safetensors", "--steps", "2"],
}
# What the blocks of a page leave behind; every page with blocks that run is here.
LEFT = {
    "README.md": ["results/EqM-S-8/checkpoints/0000020/ema.safetensors", "samples/samples.npz", "analysis/report.html"],
    "docs/index.md": ["latents/index/00000.parquet"],
    "docs/guides/encode.md": ["walks/manifest.json", "both/manifest.json", "latents-pt/red/2.jpg/0.pt"],
    "docs/guides/train.md": ["results/EqM-S-8/measured.json", "results/walks/checkpoints/0000010/model.safetensors"],
    "docs/guides/sample.md": ["samples/contact_sheet.png", "imagined/000001.png", "recorded/runs/zarr.json"],
    "docs/guides/record.md": [
        "batch/runs/prompt_001_vid002/video.mp4",
        "old-batch/latents/one-car-00/vid_001/step_000.npy.gz",
        "analysis/metrics.parquet",
    ],
    "docs/guides/precision.md": [],
    "docs/guides/live.md": ["world.mp4"],
    "docs/guides/audit.md": [],
    "docs/guides/stream.md": ["run/run.json", "run/events/000000.parquet", "spots/run.json", "mine/run.json"],
    "docs/formats.md": [],
}


@dataclass(frozen=True)
class Block:
    """What a fence holds: bash, python, yaml or text; whether it runs; the name of the file that it is."""

    language: str
    text: str
    runs: bool
    title: str | None


def blocks(page: str) -> list[Block]:
    found = []
    for info, text in re.findall(r"^```([^\n]*)\n(.*?)^```$", PAGES[page].read_text(), re.DOTALL | re.MULTILINE):
        words = re.findall(r"[\w-]+", info)
        title = re.search(r'title="([^"]+)"', info)
        runs = words[0] in ("bash", "python") and "norun" not in words
        found.append(Block(words[0], text, runs, title[1] if title else None))
    return found


def inline(page: str) -> list[str]:
    """The code within sentences, and the lines of indented code."""
    text = re.sub(r"^```.*?^```$", "", PAGES[page].read_text(), flags=re.DOTALL | re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    return spans + [line.strip() for line in text.splitlines() if line.startswith("    ")]


# --- every block runs -------------------------------------------------------------------------------------------------


def put_photos(folder: Path, toy_world: Path) -> None:
    for number in range(5):
        place = folder / "photos" / ("red" if number < 3 else "blue")
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(toy_world / "walk_000" / f"{number}.jpg", place)


def put_clips(folder: Path, toy_world: Path) -> None:
    (folder / "clips" / "walking").mkdir(parents=True)
    with av.open(str(folder / "clips" / "walking" / "one.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 80, 60, "yuv420p"
        for number in range(20):
            picture = np.asarray(Image.open(toy_world / "walk_001" / f"{number // 2}.jpg").convert("RGB"))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())


def put_stores(folder: Path, toy_world: Path) -> None:
    encode([SourceConfig(path=folder / "photos")], EncodeOptions(folder / "latents", size=(64, 64)))
    encode([SourceConfig(path=toy_world)], EncodeOptions(folder / "walks", size=(96, 64)))


def put_networks(folder: Path, toy_world: Path) -> None:
    put_stores(folder, toy_world)
    small = {"hidden_size": 32, "depth": 2, "num_heads": 2}
    eqm = {"model": {"network": "EqM", **small}, "run_name": "EqM-S-8", "data_path": folder / "latents"}
    cdit: dict[str, Any] = {"model": {"network": "CDiT", **small}, "run_name": "walks", "data_path": folder / "walks"}
    cdit |= {"context_size": 2, "len_traj_pred": 4, "distance": {"min_dist_cat": -2, "max_dist_cat": 3}}
    cdit |= {"goals_per_obs": 1, "metric_waypoint_spacing": 0.25}
    for settings in (eqm, cdit):
        common = {"batch_size": 2, "steps": 2, "results_dir": folder / "results", "precision": "fp32"}
        train(validate({**settings, **common}, TrainConfig, "documentation"))


def put_runs(folder: Path, toy_world: Path) -> None:
    put_stores(folder, toy_world)
    store = TrajectoryStore.create(folder / "runs")
    with StoreRecorder(store, "one-car-00", prompt="one car", seed=0) as recorder:
        drive(ToyFlow(torch.ones(2, 4, 8, 8)).sample(0, steps=4), [recorder])


PUT: dict[str, Callable[[Path, Path], None]] = {
    "docs/guides/encode.md": put_clips,
    "docs/guides/sample.md": put_networks,
    "docs/formats.md": put_runs,
}


def environment(home: Path) -> dict[str, str]:
    """That of someone who just installed the package, without a hub, with the threads and the cache of the tests."""
    kept = {name: os.environ[name] for name in ("XDG_CACHE_HOME", "OMP_NUM_THREADS") if name in os.environ}
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    return {"PATH": path, "HOME": str(home), "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1", **kept}


def test_every_page_with_blocks_that_run_is_tried() -> None:
    assert {page for page in PAGES if any(block.runs for block in blocks(page))} == LEFT.keys()


@pytest.mark.slow
@pytest.mark.parametrize("page", LEFT)
def test_blocks_run_in_order(page: str, tmp_path: Path, toy_world: Path, request: pytest.FixtureRequest) -> None:
    put_photos(tmp_path, toy_world)
    PUT.get(page, lambda *_: None)(tmp_path, toy_world)
    for block in blocks(page):
        if block.title is not None:
            (tmp_path / block.title).write_text(block.text)
        if "Wan-AI/" in block.text and block.title is not None:  # a pipeline of the same kind, small, under that name
            (tmp_path / "Wan-AI").mkdir()
            (tmp_path / yaml.safe_load(block.text)["model_settings"]["model_id"]).symlink_to(
                request.getfixturevalue("small_wan_pipeline")
            )
    for block in blocks(page):
        if block.runs:
            start = ["bash", "-euc"] if block.language == "bash" else [sys.executable, "-c"]
            subprocess.run([*start, block.text], check=True, cwd=tmp_path, env=environment(tmp_path))
    for name in LEFT[page]:
        assert (tmp_path / name).exists(), name


def test_every_example_is_tried() -> None:
    assert {path.name for path in (REPOSITORY / "examples").glob("*.py")} == EXAMPLES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "examples" / name), *EXAMPLES[name]]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment(tmp_path))


# --- what does not run parses -----------------------------------------------------------------------------------------


@cache
def program() -> Any:
    return typer.main.get_command(app)


def flags(command: Any) -> set[str]:
    return {"--help"} | {flag for p in command.params for flag in (*p.opts, *p.secondary_opts) if flag.startswith("-")}


def all_flags(command: Any) -> set[str]:
    return flags(command).union(*(all_flags(inner) for inner in getattr(command, "commands", {}).values()))


def shell_commands(script: str) -> Iterator[list[str]]:
    """The arguments of each `halfstep` in a script, also of one under `torchrun -m`."""
    for line in script.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|;", line):
            words = shlex.split(part, comments=True)
            if "halfstep" in words and (words[0] == "halfstep" or "-m" in words):
                yield words[words.index("halfstep") + 1 :]


def require_known(words: list[str], *, whole: bool) -> None:
    """Fail unless verbs and flags exist, and, for a `whole` command, all of it parses."""
    command, rest = program(), list(words)
    while hasattr(command, "commands"):
        takes_value = {flag: not p.is_flag for p in command.params for flag in (*p.opts, *p.secondary_opts)}
        given = list(rest)
        while rest and rest[0].startswith("-"):
            flag = rest.pop(0)
            assert flag in flags(command), flag
            rest = rest[1:] if takes_value.get(flag) else rest
        if not rest or rest[0] in ("VERB", "..."):
            assert not whole or command.invoke_without_command, "a verb is missing"
            if whole:
                command.make_context(command.name, given)
            return
        assert rest[0] in command.commands, f"no verb {rest[0]}"
        command = command.commands[rest.pop(0)]
    for word in rest:
        assert not re.match(r"--?[a-zA-Z]", word) or word.partition("=")[0] in flags(command), word
    if whole:
        command.make_context(command.name, rest)


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_verbs_and_flags_that_exist(page: str) -> None:
    for block in blocks(page):
        if block.language == "bash":
            for words in shell_commands(block.text):
                require_known(words, whole=True)
    foreign = {"--nproc_per_node"}
    for span in inline(page):
        if span.startswith("halfstep "):
            require_known(shlex.split(span, comments=True)[1:], whole=False)
        elif span.startswith("--"):
            assert span.split()[0] in all_flags(program()) | foreign, span


@pytest.mark.parametrize(
    "words",
    ["encod -o x", "encode --outputs x", "encode -i a", "store check x", "sample --ckpt a -o b -n none", "probe a b"],
)
def test_a_command_that_does_not_exist_is_found(words: str) -> None:
    with pytest.raises((AssertionError, typer.exceptions.TyperException)):
        require_known(words.split(), whole=True)


@pytest.mark.parametrize("page", PAGES)
def test_names_in_code_exist(page: str) -> None:
    for block in blocks(page):
        if block.language == "python":
            for node in ast.walk(ast.parse(block.text)):
                if isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(node.module or "")
                    assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
        if block.language == "yaml":
            yaml.safe_load(block.text)
    for span in inline(page):
        if re.fullmatch(r"halfstep(\.\w+)+", span) and span != "halfstep.predictive":  # a codec's name
            require_name(span)


def require_name(dotted: str) -> None:
    parts = dotted.split(".")
    thing: Any = importlib.import_module(parts[0])
    for number, part in enumerate(parts[1:], start=2):
        try:
            thing = importlib.import_module(".".join(parts[:number]))
        except ImportError:
            thing = getattr(thing, part)


def test_every_room_is_in_the_architecture() -> None:
    rooms = re.findall(r"^\|[^|]*\| `(\w+)` \|", (DOCS / "architecture.md").read_text(), re.MULTILINE)
    there = {path.stem for path in (REPOSITORY / "src" / "halfstep").iterdir() if not path.name.startswith(("_", "."))}
    assert there - {"py"} <= set(rooms)
    assert len(rooms) == len(set(rooms))


# --- links, the site and the figures ----------------------------------------------------------------------------------


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = PAGES["README.md"].read_text()
    assert len(text.splitlines()) <= 120
    for target, anchor in re.findall(r"\]\(([^)#]+)(?:#([^)]+))?\)", text):
        assert (REPOSITORY / target).exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", (REPOSITORY / target).read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w]+", "-", heading.lower()).strip("-") for heading in headings}, anchor


def test_the_site_builds_with_all_its_links_and_fetches_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(PAGES) - 1  # the README is none, the page of an address that is not there is one
    for page in pages:
        fetched = re.findall(r'<(?:script|img|link|iframe)\b[^>]*(?:src|href)="((?:https?:)?//[^"]+)', page.read_text())
        assert not fetched, page
    assert "<code>halfstep store convert</code>" in (tmp_path / "site" / "api" / "commands" / "index.html").read_text()


AMD, INTEL, H200 = "amd-epyc-2-cores", "intel-xeon-2-cores", "nvidia-h200"
FIGURES: list[tuple[str, str, list[tuple[str, str]]]] = [
    (INTEL, "stream", [
        ("seconds/plain fp32, 256/median", "{:.3f} s"), ("seconds/fused half, 512/median", "{:.3f} s"),
        ("seconds/autocast, 512/median", "{:.3f} s"), ("speedup_over_plain_fp32_256/fused fp32", "{:.2f}x"),
        ("speedup_over_plain_fp32_512/fused fp32", "{:.2f}x"), ("speedup_over_plain_fp32_512/fused half", "{:.2f}x"),
        ("fused_half_over_autocast_256", "{:.2f}x"), ("fused_half_over_autocast_512", "{:.2f}x"),
        ("weight_mb/fused half", "{:.1f} MB"), ("peak_memory_mb/autocast", "{:.0f} MB"),
        ("peak_memory_mb/fused half", "{:.0f} MB"), ("peaks/fused half/against_truth/recall", "{:.1%}"),
        ("peaks/fused half/against_plain_fp32/precision", "{:.2%}"), ("engine/share_of_its_lanes_rate", "{:.1%}"),
        ("labeling/ours_ms", "{:.2f} ms"), ("labeling/speedup", "{:.0f}x"),
    ]),
    (INTEL, "simulate", [
        ("networks/EqM-S~2/policies/16-true/simulated", "{:.2e}"),
        ("networks/T5 encoder/policies/16-true/real", "{:.2e}"),
        ("networks/AutoencoderKL/policies/bf16-true/simulated", "{:.2e}"),
        ("networks/PeakNet/simulated_over_fp32", "{:.2f}x"), ("networks/CDiT-S~2/simulated_over_fp32", "{:.2f}x"),
    ]),
    (INTEL, "memory", [
        ("cases/0/planned", "{:.1f} MB"), ("cases/7/measured", "{:.1f} MB"), ("cases/6/off", "{:+.1%}"),
    ]),
    (INTEL, "live-load", [
        ("seconds/fp32/median", "{:.2f} s"), ("seconds/autocast bf16/median", "{:.2f} s"),
        ("seconds/true bf16/median", "{:.2f} s"), ("speedup/autocast bf16", "{:.2f}x"),
        ("speedup/true bf16", "{:.2f}x"),
        ("memory_mb/fp32/peak", "{:.0f} MB"), ("memory_mb/autocast bf16/peak", "{:.0f} MB"),
        ("memory_mb/true bf16/peak", "{:.0f} MB"), ("memory_mb/true bf16/loading", "{:.0f} MB"),
        ("memory_mb/fp32/planned", "{:.1f} MB"), ("memory_mb/true bf16/planned", "{:.1f} MB"),
        ("error/true bf16", "{:.1%}"), ("error/autocast bf16", "{:.1%}"), ("gmac_per_sample", "{:.1f} GMAC"),
    ]),
    (INTEL, "suite", [
        ("rows/0/p50_ms", "{:.1f} ms"), ("rows/3/p50_ms", "bf16-true, {:.1f} ms"),
        ("rows/3/against/ratio", "| {:.2f} |"),
        ("rows/11/against/ratio", "| {:.2f} |"), ("rows/15/p50_ms", "| sample at 64 | {:.1f} ms | fp32 |"),
        ("rows/8/p50_ms", "{:.1f} ms"),
    ]),
    (INTEL, "live", [
        ("frames_per_second/model alone, fp32", "| {:.1f} |"), ("frames_per_second/engine, bf16", "| {:.1f} |"),
        ("frames_per_second/engine, fp32", "the engine, fp32 | {:.1f} |"), ("engine_adds", "adds {:.1%}"),
        ("soak", "Over {} frames"), ("growth_after_the_first_tenth", "{:.1%} after"),
    ]),
    (INTEL, "drift", [
        ("seconds_in_all", "{:.0f} seconds"), ("precisions/bf16/one_step/added", "| bf16 | {:.2%} |"),
        ("precisions/bf16/one_step/high", "{:.2%} |"), ("precisions/fp16/one_step/added", "| fp16 | {:.2%} |"),
        ("controls/fp8_like/added", "{:.1%} |"), ("admission/gain_over_copy_db", "{:.2f} dB"),
        ("admission/answer_to_context", "{:.2f} of a moved context"), ("controls/gain/gain", "gain of {}"),
    ]),
    (INTEL, "conditions", [
        ("ways/as published/loss", "{:.3f} |"), ("ways/velocity, both/action", "| velocity, both | {:.1%} |"),
        ("ways/velocity, both/context", "| {:.0%} |"), ("ways/noise, both/action", "| noise, both | {:.1%} |"),
        ("ways/velocity, sinusoidal positions/action", "| velocity, sinusoidal positions | {:.1%} |"),
        ("ways/velocity, scaled actions/action", "| velocity, scaled actions | {:.1%} |"),
    ]),
    (INTEL, "canary", [
        ("same/verdicts/fine", "{}"), ("found", "{}"), ("same/verdicts_by_wall_seconds/undecided", "{}"),
    ]),
    (INTEL, "soak", [("events_per_second", "{:.0f} events"), ("growth_after_the_first_tenth", "{:.1%}")]),
    (AMD, "encode", [
        ("seconds/plain loop, fp32/median", "{:.1f} s"), ("seconds/halfstep, auto/median", "{:.1f} s"),
        ("seconds/halfstep, fp32/median", "{:.1f} s"), ("seconds/encoder alone, auto/median", "{:.1f} s"),
        ("speedup_over_plain_loop", "{:.1f}x"), ("speedup_in_fp32", "{:.1f}x"), ("pipeline_over_encoder", "{:.1%}"),
        ("relative_error_against_fp32", "{:.1%}"), ("peak_memory_mb/4096 items", "{:.0f} MB"),
    ]),
    (AMD, "read", [
        ("microseconds_per_window/halfstep", "{:.1f} us"), ("microseconds_per_window/pt tree", "{:.0f} us"),
        ("microseconds_per_window/zarr, sharded", "{:.0f} us"), ("microseconds_per_window/litdata", "{:.0f} us"),
        ("speedup_over/pt tree", "{:.0f}x"), ("speedup_over/litdata", "{:.0f}x"),
        ("speedup_over/zarr, sharded", "{:.0f}x"),
    ]),
    (AMD, "train", [
        ("seconds/plain, fp32, encoder in the loop/median", "{:.1f} s"),
        ("seconds/plain, fp32, latents/median", "{:.2f} s"),
        ("seconds/halfstep, auto, latents/median", "{:.2f} s"), ("seconds/halfstep, fp32, latents/median", "{:.2f} s"),
        ("seconds/halfstep, bf16-mixed, latents/median", "{:.2f} s"), ("speedup_in_fp32", "{:.2f}x"),
        ("seconds/halfstep, bf16-true, latents/median", "{:.2f} s"), ("speedup_over_encoder_in_the_loop", "{:.1f}x"),
        ("speedup_with_latents_on_both_sides", "{:.2f}x"), ("mfu/halfstep, auto, latents", "{:.0%}"),
        ("mfu/halfstep, fp32, latents", "{:.0%}"), ("limit_seconds/halfstep, fp32, latents", "{:.2f} s"),
        ("limit_seconds/halfstep, auto, latents", "{:.2f} s"), ("peak_memory_mb/halfstep, auto, latents", "{:.0f} MB"),
        ("peak_memory_mb/halfstep, bf16-true, latents", "{:.0f} MB"),
        ("peak_memory_mb/plain, fp32, latents", "{:.0f} MB"),
        ("peak_memory_mb/plain, fp32, encoder in the loop", "{:.0f} MB"),
    ]),
    (AMD, "sample", [
        ("seconds/plain loop, fp32/median", "{:.1f} s"), ("seconds/halfstep, auto/median", "{:.1f} s"),
        ("seconds/halfstep, fp32/median", "{:.1f} s"), ("speedup", "{:.1f}x"), ("speedup_in_fp32", "{:.2f}x"),
        ("difference/halfstep, auto", "{:.1%}"),
    ]),
    (AMD, "precision", [
        ("final_loss/fp32/mean", "{:.2f}"), ("final_loss/bf16-mixed/mean", "{:.2f}"), ("spread_of_seeds", "{:.1%}"),
        ("final_loss/bf16-true/mean", "{:.2f}"), ("largest_difference_of_means/bf16-mixed", "{:.2%}"),
        ("largest_difference_of_means/bf16-true", "{:.2%}"),
    ]),
    (INTEL, "encode", [
        ("seconds/plain loop, fp32/median", "{:.1f} s"), ("seconds/halfstep, fp32/median", "{:.1f} s"),
        ("seconds/halfstep, auto/median", "{:.1f} s"), ("seconds/encoder alone, auto/median", "{:.1f} s"),
        ("speedup_over_plain_loop", "{:.1f}x"), ("pipeline_over_encoder", "{:.1%}"),
    ]),
    (H200, "encode", [
        ("seconds/plain loop, fp32/median", "{:.1f} s"), ("seconds/halfstep, fp32/median", "{:.1f} s"),
        ("seconds/halfstep, auto/median", "{:.1f} s"), ("seconds/encoder alone, auto/median", "{:.1f} s"),
        ("speedup_over_plain_loop", "{:.1f}x"), ("pipeline_over_encoder", "{:.0%}"),
    ]),
    (H200, "sample", [
        ("seconds/plain loop, fp32/median", "{:.2f} s"), ("seconds/halfstep, fp32/median", "{:.2f} s"),
        ("seconds/halfstep, auto/median", "{:.2f} s"), ("speedup", "{:.1f}x"),
    ]),
    (INTEL, "trajectory", [
        *((f"trajectories/sampled/ways/{way}/{fact}", form)
          for way in ("npy.gz, fp16", "torch.save, fp16", "zarr zstd (its default), fp16", "pcodec, fp16",
                      "halfstep, groups of 16", "halfstep, strict", "halfstep, whole run",
                      "zarr blosc shuffle zstd-1, fp16")
          for fact, form in (("share_of_fp32", "| {:.3f} |"), ("worst_channel_error", "| {:.2f} |"),
                             ("encode_mb_per_s", "| {:.0f} |"), ("decode_mb_per_s", "| {:.0f} |"),
                             ("random_step_ms", "| {:.1f} ms |"))),
        ("trajectories/ode_trajectory_20/ways/halfstep, groups of 16/share_of_fp32", "{:.3f}"),
        ("trajectories/ode_trajectory_20/ways/halfstep, strict/share_of_fp32", "{:.3f}"),
        ("trajectories/ode_trajectory_20/ways/halfstep, whole run/share_of_fp32", "{:.3f}"),
        ("trajectories/sde_trajectory_12/ways/halfstep, groups of 16/share_of_fp32", "{:.3f}"),
        ("recorder/overhead", "{:.1%}"), ("recorder/overhead_with_finish", "{:.1%}"), ("recorder/step_ms", "{:.0f} ms"),
        ("recorder/overhead_beside_others", "{:.1%}"),
        ("trajectories/sampled/ways/halfstep, seed known/share_of_fp32", "{:.3f}"),
        ("trajectories/sampled/ways/halfstep, seed known/random_step_ms", "{:.1f} ms"),
        ("trajectories/ode_trajectory_20/ways/halfstep, born fp16/share_of_fp32", "{:.3f}"),
        ("trajectories/ode_trajectory_20/ways/halfstep, born bf16/share_of_fp32", "{:.3f}"),
    ]),
    (INTEL, "statistics", [
        (f"designs/{design}/{place}", "{:.1%}")
        for design in ("paired, 10 + 10", "unpaired, 10 + 10", "unequal, 6 + 18", "six groups of 8, paired",
                       "six groups of 8, unpaired")
        for place in ("none/sets_with_a_finding", "none/below_alpha/dispersion", "none/found/separation",
                      "prompts twice as wide/below_alpha/dispersion", "prompts twice as wide/sets_with_a_finding",
                      "results 10% farther/below_alpha/final_variance")
    ]),
    (INTEL, "storage", [
        (f"formats/{kept}/{fact}", form)
        for kept in ("fp16", "predictive at fp16's error")
        for fact, form in (("share_of_fp32", "{:.3f}"), ("largest_relative_difference/mean_turning_angle", "{:.0%}"),
                           ("largest_relative_difference/mean_acceleration", "{:.0%}"),
                           ("largest_relative_difference/log_volume", "{:.1%}"),
                           ("largest_relative_difference/hull_volume", "{:.0%}"))
    ]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("machine", "name", "figures"), FIGURES, ids=[f"{name}-{machine}" for machine, name, _ in FIGURES]
)
def test_figures_are_those_of_the_benchmarks(machine: str, name: str, figures: list[tuple[str, str]]) -> None:
    result = json.loads((REPOSITORY / "benchmarks" / machine / f"{name}.json").read_text())
    page = PAGES["docs/measured.md"].read_text().replace("**", "")
    (section,) = [part for part in re.split(r"^## ", page, flags=re.MULTILINE) if f"[{name}.json]" in part]
    if name != "storage":  # whose command begins with that of the example
        assert result["command"] in section
    for place, form in figures:
        value: Any = result
        for part in place.split("/"):
            value = value[int(part) if isinstance(value, list) else part.replace("~", "/")]
        assert form.format(value) in section, f"{place}: {form.format(value)}"
