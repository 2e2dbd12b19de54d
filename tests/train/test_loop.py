"""Training as its users run it: stop and go on, half against fp32."""

import argparse
import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halfstep.errors import InputError
from halfstep.models import EqM, read_checkpoint
from halfstep.progress import Progress
from halfstep.team import Team
from halfstep.train.data import Batch, open_data
from halfstep.train.loop import train
from tests.support.cli import HALFSTEP, run_cli, run_script
from tests.support.dying import Calls
from tests.support.media import write_video
from tests.support.training import (
    SMALL,
    SMALL_CDIT,
    WALKS,
    Listening,
    assert_same,
    config,
    log,
    read_state,
    run_folder,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16-true", "gradient_accumulation_steps": 2, "grad_clip_val": 0.5, "warmup_steps": 4},
        {"precision": "bf16-mixed", "clip_len": 3, "global_batch_size": 2, "activation_budget": 0.5},
        {"precision": "fp32,loss_scale=dynamic", "dispersive_weight": 0.5, "energy": "dot", "num_workers": 1},
        {"model": SMALL_CDIT, "precision": "bf16-mixed", **WALKS},
        {"energy": "l2", "activation_budget": 0.0},
        {"energy": "dot", "activation_budget": 0.0, "precision": "bf16-true"},
    ],
)
def test_stopping_and_going_on_changes_no_bit(tmp_path: Path, latents: Path, changes: dict[str, Any]) -> None:
    """Over the end of epochs; and what is logged is the same too."""
    train(config(tmp_path / "whole", latents, steps=10, **changes))
    for steps in (1, 4, 7, 10):
        train(config(tmp_path / "parts", latents, steps=steps, **changes))
    assert_same(run_folder(tmp_path / "parts"), run_folder(tmp_path / "whole"))
    whole = {record["step"]: record["grad_norm"] for record in log(tmp_path / "whole")}
    assert log(tmp_path / "parts")[-1]["grad_norm"] == whole[10]


# Trains as sys.argv[1] says and dies at the sys.argv[3]-th call of a function after step sys.argv[2].
DYING_RUN = """
import sys
from halfstep.progress import Progress
from halfstep.train.config import TrainConfig
from halfstep.train.loop import train
from tests.support.dying import Calls
class Dying(Progress):
    def start(self, total, done=0):
        self.step = done
    def advance(self, units=1, *, written=0):
        self.step += units
        if self.step == int(sys.argv[2]):
            Calls(last=int(sys.argv[3])).start()
train(TrainConfig.model_validate_json(sys.argv[1]), Dying())
"""


def test_a_killed_run_goes_on_exactly(tmp_path: Path, latents: Path) -> None:
    """Wherever it dies in two steps and the checkpoint between them."""
    calls = Calls()

    class Counting(Progress):
        step = 0

        def advance(self, units: int = 1, *, written: int = 0) -> None:
            self.step += units
            if self.step == 14:
                calls.start()
            elif self.step == 16:
                calls.stop()

    train(config(tmp_path / "whole", latents, steps=60, ckpt_every=5), Counting())
    chosen = config(tmp_path / "killed", latents, steps=60, ckpt_every=5)
    deaths = np.random.default_rng(0).integers(1, calls.made, size=3)
    for step, last in zip((14, 29, 44), deaths, strict=True):
        run_script(DYING_RUN, chosen.model_dump_json(), step, last, check=-signal.SIGKILL)
    train(chosen)
    assert_same(run_folder(tmp_path / "killed"), run_folder(tmp_path / "whole"))
    assert not list((tmp_path / "killed" / "run" / "checkpoints").glob(".*"))  # what the kills left is gone
    assert [record["step"] for record in log(tmp_path / "killed")] == list(range(2, 61, 2))


def test_it_learns_in_every_precision(tmp_path: Path, latents: Path) -> None:
    """The field toward thirty pictures is learned, in half as in fp32."""
    losses = {}
    for precision in ("fp32", "bf16-mixed", "bf16-true", "16-mixed"):
        train(config(tmp_path / precision, latents, precision=precision, steps=120, log_every=20, lr=3e-3))
        losses[precision] = [record["loss"] for record in log(tmp_path / precision)]
    assert losses["fp32"][-1] < 0.8 * losses["fp32"][0]
    for precision, values in losses.items():
        # The same data and noise: what differs is rounding, which training amplifies little over 120 steps.
        assert abs(values[-1] - losses["fp32"][-1]) < 0.03 * losses["fp32"][-1], precision


def test_checkpoints_can_be_read_by_others(tmp_path: Path, latents: Path) -> None:
    train(config(tmp_path, latents, steps=1))
    folder = tmp_path / "run" / "checkpoints" / "0000001"
    modes = {path.name: path.stat().st_mode for path in folder.iterdir()}
    assert set(modes.values()) == {modes["state.json"]}


def test_half_weights_have_fp32_masters_and_averages(tmp_path: Path, latents: Path) -> None:
    """Updates of 1e-6 move nothing in bf16; kept in fp32 they do."""
    train(config(tmp_path / "start", latents, steps=20))
    chosen = {"precision": "bf16-true", "lr": 1e-6, "ckpt": str(tmp_path / "start" / "run")}
    train(config(tmp_path, latents, steps=1, **chosen))
    before = run_folder(tmp_path)
    train(config(tmp_path, latents, steps=2, **chosen))
    after = run_folder(tmp_path)
    name = "blocks.0.mlp.fc1.weight"
    for file in ("model.safetensors", "ema.safetensors"):
        assert after[file][name].dtype == torch.float32
        moved = (after[file][name] != before[file][name]).float().mean()
        assert moved > 0.9
    rounded = [weights["model.safetensors"][name].bfloat16() for weights in (before, after)]
    assert (rounded[0] == rounded[1]).float().mean() > 0.9
    assert log(tmp_path)[-1]["stalled_weights"] < 0.05


def test_a_published_checkpoint_starts_a_run(tmp_path: Path, latents: Path) -> None:
    """Names with prefixes, an argparse Namespace, and the optimizer by the order of parameters."""
    train(config(tmp_path / "ours", latents, steps=4))
    saved = read_checkpoint(tmp_path / "ours" / "run")
    network = saved.build(ema=False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    network(torch.randn(8, 16, 4, 4), torch.rand(8), torch.zeros(8, dtype=torch.int64)).square().mean().backward()
    optimizer.step()
    names = [name for name, _ in network.named_parameters()]
    published = {
        "model": {f"_orig_mod.{name}": value for name, value in network.state_dict().items()},
        "ema": {f"module.{name}": value for name, value in saved.best.items()},
        "opt": optimizer.state_dict(),
        "args": argparse.Namespace(model="EqM-S/2", uncond=True, ebm="none"),
    }
    torch.save(published, tmp_path / "0000100.pt")
    read = read_checkpoint(tmp_path / "0000100.pt", num_heads=2)
    for number, name in enumerate(names):
        if number in optimizer.state_dict()["state"]:
            assert torch.equal(read.moments[f"exp_avg.{name}"], optimizer.state_dict()["state"][number]["exp_avg"])
    assert read.updates == 1
    with pytest.raises(InputError, match="number of heads"):
        read_checkpoint(tmp_path / "0000100.pt")
    train(config(tmp_path / "own", latents, ckpt=str(tmp_path / "0000100.pt"), steps=1))  # where the config says it
    assert read_state(tmp_path / "own")["updates"] == 2

    # An EqM-S/2 has a published number of heads, so nothing needs saying.
    small = EqM.named("EqM-S/2", (4, 4), 1, in_channels=16)
    torch.save({"model": small.state_dict(), "ema": small.state_dict()}, tmp_path / "small.pt")
    chosen = {"model": "EqM-S/2", "ckpt": str(tmp_path / "small.pt"), "steps": 1, "lr": 1e-9}
    train(config(tmp_path / "named", latents, **chosen))
    for name, value in small.state_dict().items():
        torch.testing.assert_close(run_folder(tmp_path / "named")["model.safetensors"][name], value, atol=1e-7, rtol=0)


def test_a_video_model_starts_from_an_image_model(tmp_path: Path, latents: Path) -> None:
    train(config(tmp_path / "images", latents, steps=2))
    start = str(tmp_path / "images" / "run")
    train(config(tmp_path / "video", latents, clip_len=3, global_batch_size=2, ckpt=start, steps=1, lr=1e-9))
    images = read_checkpoint(tmp_path / "images" / "run")
    video = read_checkpoint(tmp_path / "video" / "run")
    assert video.about.config["num_frames"] == 3
    for name, value in images.weights.items():
        torch.testing.assert_close(video.weights[name], value, atol=1e-7, rtol=0)


def test_the_loss_scale_skips_and_collapses(tmp_path: Path, latents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 that always overflows: updates are left out and counted, and training goes on in bf16."""
    from halfstep.models import eqm as module

    real = module.eqm_loss
    half = []

    def overflowing(model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        losses = real(model, *args, **kwargs)
        half.append(model._halfstep_policy.compute)
        return losses * (float("inf") if half[-1] == "fp16" else 1.0)

    monkeypatch.setattr(module, "eqm_loss", overflowing)
    told = Listening()
    report = train(config(tmp_path, latents, precision="16-mixed", steps=30, log_every=15), told)
    assert report.skipped == 20
    assert report.policy.startswith("bf16-mixed")
    assert any("collapsed" in line for line in told.notes)
    assert [record["switched_at"] for record in log(tmp_path)] == [None, 20]  # which is no step of the log
    assert [record["policy"].split(",")[0] for record in log(tmp_path)] == ["16-mixed", "bf16-mixed"]
    assert log(tmp_path)[0]["loss_scale"] == 65536 / 2**15
    assert log(tmp_path)[0]["stalled_weights"] is None  # nothing was added to them
    assert read_state(tmp_path)["switched_at"] == 20
    assert read_state(tmp_path)["policy"].startswith("bf16-mixed")
    assert read_state(tmp_path)["updates"] == 10
    train(config(tmp_path, latents, precision="16-mixed", steps=32))  # it stays there
    assert read_state(tmp_path)["updates"] == 12


def test_compiled_training_learns_the_same(tmp_path: Path, latents: Path) -> None:
    for precision, tolerance in (("fp32", 1e-4), ("bf16-mixed", 0.02)):  # fused, so rounded elsewhere
        plain, compiled = tmp_path / f"plain-{precision}", tmp_path / f"compiled-{precision}"
        small = {"precision": precision, "model": {**SMALL, "depth": 1}}
        train(config(plain, latents, **small))
        train(config(compiled, latents, **small, compile=True))
        losses = [[record["loss"] for record in log(folder)] for folder in (plain, compiled)]
        np.testing.assert_allclose(losses[1], losses[0], rtol=tolerance)
        assert run_folder(compiled)["model.safetensors"].keys() == run_folder(plain)["model.safetensors"].keys()


def test_the_log_goes_to_tensorboard_too(tmp_path: Path, latents: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(config(tmp_path, latents, tensorboard=True))
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    written = [(event.step, event.value) for event in events.Scalars("loss")]
    np.testing.assert_allclose(written, [(record["step"], record["loss"]) for record in log(tmp_path)], rtol=1e-6)


def test_pixels_are_encoded_on_the_way(tmp_path: Path, toy_world: Path, latents: Path) -> None:
    """The same losses as over a store of them, where neither flips nor samples are drawn."""
    told = Listening()
    walks = {"model": SMALL_CDIT, **WALKS}
    over_pixels = config(tmp_path / "pixels", toy_world, image_size=32, **walks)
    train(over_pixels, told)
    train(config(tmp_path / "latents", latents, **walks))
    ours, theirs = log(tmp_path / "pixels"), log(tmp_path / "latents")
    np.testing.assert_allclose([r["loss"] for r in ours], [r["loss"] for r in theirs], rtol=1e-4)
    assert any(
        f"halfstep encode -i {toy_world} -o LATENTS --autoencoder dct8 --size 32x32`" in line for line in told.notes
    )


def test_batches_are_shared_out_without_loss(latents: Path, tmp_path: Path) -> None:
    """Whatever the number of processes, a step's items are the same ones, each once; an epoch repeats none."""
    cpu = torch.device("cpu")

    def batches(step: int, rank: int, size: int) -> Iterator[Batch]:
        return open_data(config(tmp_path, latents), size).batches(step, Team(rank, size), cpu)

    def first(batch: Batch) -> set[float]:
        return {float(item.sum()) for item in batch.items[0]}

    for step in (0, 2, 3):
        alone = first(next(batches(step, 0, 1)))
        shared = [first(next(batches(step, rank, 4))) for rank in range(4)]
        assert set().union(*shared) == alone
        assert sum(map(len, shared)) == len(alone) == 8
    stream = batches(0, 0, 1)
    epochs = [set().union(*(first(next(stream)) for _ in range(3))) for _ in range(2)]
    assert [len(epoch) for epoch in epochs] == [24, 24]


@pytest.mark.parametrize("energy", ["none", "l2", "dot"])
def test_every_energy_can_be_learned(tmp_path: Path, latents: Path, energy: str) -> None:
    """A zero-initialized |f|^2 has no gradient anywhere."""
    train(config(tmp_path, latents, energy=energy, steps=4, log_every=1))
    assert all(record["grad_norm"] > 1e-3 for record in log(tmp_path))


def test_the_log_counts_epochs_as_training_does(tmp_path: Path, latents: Path) -> None:
    train(config(tmp_path, latents, steps=8, log_every=1))  # 30 items in steps of 8: three steps an epoch
    assert [record["epoch"] for record in log(tmp_path)] == [0, 0, 1, 1, 1, 2, 2, 2]


def test_a_type_that_is_not_there_is_replaced_and_said(
    tmp_path: Path, latents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfstep.precision import ProbeResult

    train(config(tmp_path, latents, precision="bf16-mixed", steps=2))
    monkeypatch.setattr(ProbeResult, "speedup", lambda *_: 0.0)
    with pytest.raises(InputError, match="cannot compute in bf16; use fp32 or auto"):
        train(config(tmp_path, latents, precision="bf16-mixed", run_name="new"))
    told = Listening()
    report = train(config(tmp_path, latents, precision="bf16-mixed", steps=3), told)  # the same run, elsewhere
    assert report.policy.startswith("fp32")
    assert [line for line in told.notes if "cannot compute in bf16, as before; fp32 is used instead" in line]


def test_the_command_line_stops_on_request_and_goes_on(tmp_path: Path, latents: Path) -> None:
    command = ["train", "eqm", "--data-path", latents, "-o", tmp_path, "--run-name", "run", "--global-batch-size", 8]
    command += [f"--set=model.{name}={value}" for name, value in SMALL.items()] + ["--use-bf16", "--log-every", 1]
    endless = [*HALFSTEP, *map(str, command), "--steps", "100000"]
    with subprocess.Popen(endless, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        told = ""
        while not told.startswith("step 1:"):
            told = process.stderr.readline()
            assert told, "it ended by itself"
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
    assert process.returncode == 130
    step = int(re.search(r"stopped after step (\d+)", errors)[1])  # type: ignore[index]
    result = run_cli(*command, "--steps", step + 2, "--json", "--quiet")
    report = json.loads(result.stdout)
    assert report["step"] == step + 2
    assert report["policy"].startswith("bf16-mixed")
    assert [record["step"] for record in log(tmp_path)] == list(range(1, step + 3))


def test_the_published_commands_and_configs_work(tmp_path: Path, toy_world: Path, latents: Path) -> None:
    """Clips of videos in class folders; and the navigation YAML over latents with its keys."""
    for label in ("run", "jump"):
        (tmp_path / "ucf" / label).mkdir(parents=True)
        for number in range(2):
            write_video(tmp_path / "ucf" / label / f"{number}.mp4", 6)
    options = "--model EqM-S/8 --use-bf16 --video --clip-len 4 --image-size 64 --global-batch-size 4 --epochs 1"
    result = run_cli("train", "eqm", "--data-path", "ucf", *options.split(), cwd=tmp_path)
    assert "EqM-S/8 after 1 steps in bf16-mixed" in result.stdout
    saved = read_checkpoint(tmp_path / "results" / "EqM-S-8-clip4")
    assert saved.about.classes == ("jump", "run")
    assert saved.about.config["num_frames"] == 4
    assert saved.about.latents is not None
    assert saved.about.latents.pixels is not None

    (tmp_path / "split").mkdir()
    (tmp_path / "split" / "names.txt").write_text("walk_000\nwalk_002\n")
    (tmp_path / "nav.yaml").write_text(f"""
run_name: nwm_cdit_latents
results_dir: logs
batch_size: 4
num_workers: 0
model: CDiT-S/2
lr: 6e-5
train: True
use_wandb: True
target_fps: 4
eval_decode: false
warmup_steps: 1000
lr_scheduler:
  name: linear
  total_steps: 100000
normalize: True
grad_clip_val: 10.0
context_size: 2
len_traj_pred: 4
distance: {{min_dist_cat: -2, max_dist_cat: 4}}
image_size: 32
datasets:
  recon: {{latent_folder: {latents}, data_folder: {toy_world}, train: split, test: split, traj_names: names.txt,
    goals_per_obs: 2}}
""")
    result = run_cli("train", "--config", "nav.yaml", "--precision", "fp32", "--set", "steps=1", cwd=tmp_path)
    assert "CDiT-S/2 after 1 steps in fp32" in result.stdout
    assert "train, eval_decode, lr_scheduler, target_fps, use_wandb: not read" in result.stderr
    saved = read_checkpoint(tmp_path / "logs" / "nwm_cdit_latents")
    assert saved.about.spacing == 0.25
    assert saved.about.config["context_size"] == 2
