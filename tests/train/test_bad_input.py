"""What cannot be trained is refused with its reason, and nothing that was there is lost."""

import json
import shutil
import subprocess
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfstep.errors import HalfstepError, InputError, NumericsError
from halfstep.models import EqM
from halfstep.store import DatasetStore, compact
from halfstep.train.loop import train
from tests.support.training import SMALL, SMALL_CDIT, WALKS, Listening, assert_same, config, log, rewrite, run_folder


def test_a_loss_that_is_not_finite_stops_and_says_where(tmp_path: Path, latents: Path) -> None:
    """An overflow in the network at step 4 of 10: the checkpoint before it stays, its layer and type are named."""
    train(config(tmp_path, latents, steps=3))
    newest = tmp_path / "run" / "checkpoints" / "0000003"
    weights = load_file(newest / "model.safetensors")
    weights["blocks.1.mlp.fc1.weight"][0] = 3e38
    rewrite(newest / "model.safetensors", weights)
    with pytest.raises(NumericsError, match=r"step 4: the output of blocks.1.mlp.fc1 \(float32\).*0000003"):
        train(config(tmp_path, latents, steps=10))
    assert [path.name for path in newest.parent.iterdir()] == ["0000003"]


def test_a_layer_that_hands_out_several_tensors_is_named(tmp_path: Path, latents: Path) -> None:
    """Attention, whose kernels may swallow what is not finite again."""
    chosen: dict[str, Any] = {"model": SMALL_CDIT, **WALKS}
    train(config(tmp_path, latents, steps=1, **chosen))
    newest = tmp_path / "run" / "checkpoints" / "0000001" / "model.safetensors"
    whole = load_file(newest)
    rewrite(newest, {**whole, "blocks.0.cttn.out_proj.weight": torch.full((32, 32), 3e38)})
    with pytest.raises(NumericsError, match=r"step 2: the output of blocks.0.cttn \(float32\)"):
        train(config(tmp_path, latents, steps=2, **chosen))
    rewrite(newest, {**whole, "blocks.0.cttn.in_proj_weight": torch.full((96, 32), float("nan"))})
    with pytest.raises(NumericsError, match=r"step 2: the weight blocks.0.cttn.in_proj_weight \(float32\)"):
        train(config(tmp_path, latents, steps=2, **chosen))


def test_weights_that_are_not_finite_are_not_kept(tmp_path: Path, latents: Path) -> None:
    with pytest.raises(NumericsError, match=r"0000001: not written, .* are not finite"):
        train(config(tmp_path, latents, steps=1, lr=1e38, weight_decay=1e38))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_latents_that_are_not_finite_are_named(tmp_path: Path) -> None:
    for walk in range(2):
        (tmp_path / "tree" / str(walk)).mkdir(parents=True)
        for frame in range(8):
            latent = torch.randn(4, 4, 4) * (float("nan") if (walk, frame) == (1, 7) else 1)
            torch.save(latent, tmp_path / "tree" / str(walk) / f"{frame}.pt")
    chosen: dict[str, Any] = {"global_batch_size": 4, "steps": 8}
    with pytest.raises(NumericsError, match=r"an item of '1' in the data is not finite, in fp32.*no checkpoint yet"):
        train(config(tmp_path, tmp_path / "tree", **chosen))
    for precision in ("16-mixed", "fp32,loss_scale=dynamic"):  # which skip an update that overflowed
        with pytest.raises(NumericsError, match=r"an item of '1' in the data is not finite"):
            train(config(tmp_path, tmp_path / "tree", precision=precision, run_name=precision[:5], **chosen))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"global_batch_size": 64}, "got 30 items .*a batch has 64: use a batch of 30 or less"),
        ({"clip_len": 11}, "no sequence has 11 consecutive frames"),
        ({"model": "EqM-M/2"}, "got 'EqM-M/2'; expected EqM-"),
        ({"model": "CDiT-S/4", **WALKS}, "got 'CDiT-S/4'; expected CDiT-{S,B,L,XL}/2"),
        ({"context_size": 3}, "context_size is not a setting of EqM"),
        ({"precision": "fp16"}, "fp16 weights cannot be trained"),
        ({"gradient_accumulation_steps": 3}, "8 items cannot be shared out to 1 processes in 3 micro"),
        ({"data_path": "/nowhere"}, "/nowhere: no such file"),
        ({"ckpt": "/nowhere.pt"}, "no such file or folder; expected a checkpoint"),
        ({"model": SMALL_CDIT, **WALKS, "metric_waypoint_spacing": None}, "metric_waypoint_spacing: not given"),
        ({"model": SMALL_CDIT, **WALKS, "len_traj_pred": 40}, "use a shorter context or horizon"),
        ({"batch_size": 4}, "not both"),
        ({"data_path": None}, "data_path: is not given"),
        ({"modle": "EqM-S/2"}, "modle: unknown key; did you mean 'model'"),
        ({"model": {"network": "EqM"}}, "hidden_size: is not given"),
        ({"fsdp": True, "energy": "dot"}, "fsdp: sharded weights cannot take part"),
        ({"compile": True, "energy": "dot"}, "compile: cannot see through the gradient"),
        ({"fsdp": True, "precision": "bf16-true,islands=blocks.*.mlp"}, "--fsdp: sharded layers have weights of one"),
        ({"global_batch_size": 64, "gradient_accumulation_steps": 8}, "use a batch of 24 or less"),
        ({"lr": float("inf")}, "lr: got inf; input should be a finite number"),
        ({"ema_decay": 1.0}, "ema_decay: got 1.0; input should be less than 1"),
        ({"model": 5}, "test: model: got 5"),
        ({"model": {**SMALL, "hiden_size": 3}}, "test: model.hiden_size: unknown key; did you mean 'hidden_size'"),
        ({"model": {**SMALL, "network": "EQM"}}, "model: got 'EQM'; expected a network of EqM or CDiT"),
        ({"model": {**SMALL_CDIT, "hidden_size": 2}, **WALKS}, "the three parts of an action need 6 or more"),
        ({"model": SMALL_CDIT, **WALKS, "distance": {"min_dist_cat": 5, "max_dist_cat": -5}}, "is above max_dist_cat"),
        (
            {"model": SMALL_CDIT, **WALKS, "distance": {"min_dist_cat": 50, "max_dist_cat": 60}},
            "shorter context",
        ),
        (
            {"model": SMALL_CDIT, **WALKS, "data_path": None, "datasets": {"recon": {}}},
            "give those of each",
        ),
    ],
)
def test_mistakes_are_named(tmp_path: Path, latents: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        train(config(tmp_path, latents, **changes))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_labels_beyond_the_classes_are_named(tmp_path: Path, toy_world: Path) -> None:
    for label in "abc":
        shutil.copytree(toy_world / "walk_000", tmp_path / "data" / label)
        (tmp_path / "data" / label / "traj_data.pkl").unlink()
    with pytest.raises(InputError, match=r"num_classes: got 2; the data has 3 classes \(a, b, c\)"):
        train(config(tmp_path, tmp_path / "data", image_size=32, num_classes=2))


@pytest.mark.slow
def test_checkpoints_that_do_not_fit_are_named(tmp_path: Path, latents: Path) -> None:
    train(config(tmp_path, latents, steps=1))
    weights = load_file(tmp_path / "run" / "checkpoints" / "0000001" / "model.safetensors")
    del weights["blocks.1.attn.qkv.weight"], weights["blocks.0.attn.proj.bias"]
    wide = EqM.named("EqM-S/2", (4, 4), 1, in_channels=16)
    cases = {
        "missing": (wide.state_dict(), {"model": "EqM-S/2"}, r"missing are blocks.3.attn.qkv.weight"),
        "other size": (wide.state_dict(), {"model": "EqM-B/2"}, r"holds EqM-S/2; EqM-B/2 was asked for"),
        "channels": (
            EqM.named("EqM-S/2", (4, 4), 1).state_dict(),
            {"model": "EqM-S/2"},
            "is of latents with 4 channels; the data has 16",
        ),
        "grid": (
            EqM.named("EqM-S/2", (8, 8), 1, in_channels=16).state_dict(),
            {"model": "EqM-S/2"},
            r"pos_embed is \[1, 16, 384\], expected \[1, 4, 384\]",
        ),
        "classes": (
            EqM.named("EqM-S/2", (4, 4), 7, in_channels=16).state_dict(),
            {"model": "EqM-S/2"},
            r"embedding_table.weight is \[8, 384\], expected \[2, 384\]",
        ),
        "something else": ({"a.weight": torch.ones(3)}, {}, "neither an EqM nor a CDiT"),
        "not tensors": ({"model": 3, "args": 4}, {}, "model is a int; expected a state dict"),
    }
    for name, (state, changes, told) in cases.items():
        path = tmp_path / f"{name}.pt"
        if name == "missing":
            del state["blocks.3.attn.qkv.weight"]
        torch.save(state, path)
        with pytest.raises(InputError, match=told):
            train(config(tmp_path / "new", latents, ckpt=str(path), **changes))
    (tmp_path / "cut.pt").write_bytes((tmp_path / "grid.pt").read_bytes()[:5000])
    torch.save(subprocess.Popen, tmp_path / "unsafe.pt")
    (tmp_path / "text.pt").write_text("hello, this is no checkpoint")
    (tmp_path / "page.pt").write_text("<!DOCTYPE html>")
    (tmp_path / "noise.pt").write_bytes(bytes(range(256)))
    with pytest.raises(InputError, match=r"unsafe.pt: names \w+.Popen; what could run code is not read"):
        train(config(tmp_path / "new", latents, ckpt=str(tmp_path / "unsafe.pt")))
    for name in ("cut.pt", "text.pt", "page.pt", "noise.pt"):
        with pytest.raises(InputError, match=rf"{name}: cannot be read \(\w+\); expected a file of torch.save"):
            train(config(tmp_path / "new", latents, ckpt=str(tmp_path / name)))


@pytest.mark.slow
def test_parts_of_a_checkpoint_that_do_not_fit_are_named(tmp_path: Path, latents: Path) -> None:
    """The average, the optimizer, and what the trainer's arguments say."""
    whole = EqM.named("EqM-S/2", (4, 4), 1, in_channels=16)
    weights = whole.state_dict()
    short = {name: value for name, value in weights.items() if name != "blocks.3.attn.qkv.weight"}
    flat = {**weights, "final_layer.linear.bias": torch.zeros(1)}
    descent = torch.optim.SGD(whole.parameters(), lr=1e-3, momentum=0.9)
    whole(torch.randn(2, 16, 4, 4), torch.rand(2), torch.zeros(2, dtype=torch.int64)).sum().backward()
    descent.step()
    one = {"state": {0: {"step": 1, "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}}}
    cases = {
        "ema.pt": ({"ema": short}, "missing are blocks.3.attn.qkv.weight"),
        "shape.pt": ({"ema": flat}, r"final_layer.linear.bias is \[1\], expected \[128\]"),
        "sgd.pt": ({"opt": descent.state_dict()}, "is not AdamW's of"),
        "names.pt": ({"opt": {"state": {"first": {}}}}, "is not AdamW's of"),
        "one.pt": ({"opt": one}, "is not AdamW's of"),
        "time.pt": ({"args": Namespace(uncond=False)}, "was trained with uncond False, not True"),
        "energy.pt": ({"args": Namespace(ebm="mean")}, "was trained with energy dot, not none"),
    }
    for name, (content, told) in cases.items():
        torch.save({"model": weights, **content}, tmp_path / name)
        with pytest.raises(InputError, match=told):
            train(config(tmp_path / "new", latents, model="EqM-S/2", ckpt=str(tmp_path / name)))
    optimizer = torch.optim.AdamW(whole.parameters())
    optimizer.step()
    partly = optimizer.state_dict()
    del partly["state"][max(partly["state"])]
    torch.save({"model": weights, "opt": partly}, tmp_path / "partly.pt")
    with pytest.raises(InputError, match=r"the optimizer's exp_avg.final_layer.* are missing or of another shape"):
        train(config(tmp_path / "new", latents, model="EqM-S/2", ckpt=str(tmp_path / "partly.pt")))
    assert not list((tmp_path / "new").rglob("*.safetensors"))


def test_a_damaged_checkpoint_does_not_go_on(tmp_path: Path, latents: Path) -> None:
    train(config(tmp_path / "whole", latents, steps=2))

    def without(name: str) -> Callable[[Path], None]:
        return lambda folder: (folder / name).unlink()

    def changed(name: str, changes: dict[str, torch.Tensor | None]) -> Callable[[Path], None]:
        def damage(folder: Path) -> None:
            tensors = {**load_file(folder / name), **changes}
            rewrite(folder / name, {key: tensor for key, tensor in tensors.items() if tensor is not None})

        return damage

    def facts(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
        def damage(folder: Path) -> None:
            content = json.loads((folder / "state.json").read_text())
            (folder / "state.json").write_text(json.dumps(change(content)))

        return damage

    bias = "final_layer.linear.bias"
    damages: list[tuple[Callable[[Path], None], str]] = [
        (without("ema.safetensors"), "ema.safetensors is not there"),
        (without("optimizer.safetensors"), "damaged"),
        (without("state.json"), "state.json"),
        (changed("ema.safetensors", {bias: torch.zeros(1)}), "does not fit"),
        (changed("ema.safetensors", {bias: None}), "missing are final_layer.linear.bias"),
        (changed("optimizer.safetensors", {f"exp_avg_sq.{bias}": None}), "exp_avg_sq.final_layer"),
        (lambda folder: save_file({}, folder / "optimizer.safetensors"), "moments are missing"),
        (facts(lambda content: []), "is not halfstep-training"),
        (facts(lambda content: {n: v for n, v in content.items() if n != "items_per_step"}), "lacks items_per_step"),
    ]
    for number, (damage, told) in enumerate(damages):
        shutil.copytree(tmp_path / "whole", tmp_path / str(number))
        damage(tmp_path / str(number) / "run" / "checkpoints" / "0000002")
        with pytest.raises(HalfstepError, match=told):
            train(config(tmp_path / str(number), latents, steps=3))
        kept = [path.name for path in (tmp_path / str(number) / "run" / "checkpoints").iterdir()]
        assert kept == ["0000002"]


def test_a_run_does_not_go_on_with_other_data(tmp_path: Path, latents: Path, toy_world: Path) -> None:
    shutil.copytree(latents, tmp_path / "data")
    train(config(tmp_path, tmp_path / "data", steps=1))
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "data" / "0").mkdir(parents=True)
    for frame in range(9):
        torch.save(torch.randn(16, 4, 4), tmp_path / "data" / "0" / f"{frame}.pt")
    with pytest.raises(InputError, match=r"was trained on other latents: autoencoder: .*, not dct8"):
        train(config(tmp_path, tmp_path / "data", steps=2))
    with pytest.raises(InputError, match=r"was trained on other latents than the data's: autoencoder: .*, not dct8"):
        train(config(tmp_path, tmp_path / "data", steps=2, run_name="new", ckpt=str(tmp_path / "run")))

    for label in "bc":
        shutil.copytree(toy_world / "walk_000", tmp_path / "labels" / label)
        (tmp_path / "labels" / label / "traj_data.pkl").unlink()
    chosen: dict[str, Any] = {"image_size": 32, "num_classes": 5, "run_name": "labeled"}
    train(config(tmp_path, tmp_path / "labels", steps=1, **chosen))
    (tmp_path / "labels" / "b").rename(tmp_path / "labels" / "a")
    with pytest.raises(InputError, match=r"was trained with the classes b, c, the data has a, c"):
        train(config(tmp_path, tmp_path / "labels", steps=2, **chosen))


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, latents: Path) -> None:
    shutil.copytree(latents, tmp_path / "run")
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    with pytest.raises(InputError, match="and is no training run; name a new or empty folder"):
        train(config(tmp_path, latents, steps=1))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_a_run_that_cannot_begin_leaves_nothing(tmp_path: Path, latents: Path) -> None:
    with pytest.raises(InputError, match="a batch has 64"):
        train(config(tmp_path, latents, global_batch_size=64))
    assert not (tmp_path / "run").exists()


def test_another_start_of_a_run_that_is_there_is_refused(tmp_path: Path, latents: Path) -> None:
    train(config(tmp_path, latents, steps=1))
    with pytest.raises(InputError, match=r"ckpt: was None, is '/nowhere.pt'"):
        train(config(tmp_path, latents, steps=2, ckpt="/nowhere.pt"))


def test_another_run_in_the_folder_is_left_alone(tmp_path: Path, latents: Path) -> None:
    train(config(tmp_path, latents, steps=2))
    before = run_folder(tmp_path)
    with pytest.raises(InputError, match=r"other settings \(lr: was 0.001, is 0.01\); give the same, or another"):
        train(config(tmp_path, latents, lr=0.01))
    with pytest.raises(InputError, match="its steps have 8 items, not 4"):
        train(config(tmp_path, latents, global_batch_size=4))
    told = Listening()
    with pytest.raises(InputError, match="other settings"):
        train(config(tmp_path, latents, lr=0.01, precision="bf16-mixed"), told)
    assert told.notes == []  # one line is enough
    assert_same(run_folder(tmp_path), before)
    report = train(config(tmp_path, latents, precision="bf16-mixed", log_every=1, steps=3))
    assert report.policy.startswith("bf16-mixed")


def photos(folder: Path, toy_world: Path, pictures: int = 10) -> Path:
    (folder / "a").mkdir(parents=True)
    for frame in range(pictures):
        shutil.copy(toy_world / "walk_000" / f"{frame}.jpg", folder / "a")
    return folder


def test_pictures_that_cannot_be_read_are_replaced_counted_and_named(tmp_path: Path, toy_world: Path) -> None:
    chosen: dict[str, Any] = {"image_size": 32, "global_batch_size": 5, "steps": 4, "log_every": 2}
    folder = photos(tmp_path / "photos", toy_world)
    train(config(tmp_path / "whole", folder, **chosen))
    (folder / "a" / "3.jpg").write_bytes(b"no picture")
    told = Listening()
    report = train(config(tmp_path / "broken", folder, **chosen), told)
    assert [line for line in told.notes if "3.jpg: not a picture that Pillow can read; another item stands in" in line]
    assert sum("3.jpg" in line for line in told.notes) == 1  # once, though two epochs meet it
    assert [record["unreadable"] for record in log(tmp_path / "broken")] == [1, 2]
    assert report.unreadable == 2
    assert all(record["unreadable"] == 0 for record in log(tmp_path / "whole"))


def test_where_nothing_can_be_read_the_work_is_kept(tmp_path: Path, toy_world: Path) -> None:
    """The pictures go away while it trains: there is a checkpoint of the step that they went at."""
    folder = photos(tmp_path / "photos", toy_world, 4)

    class Removing(Listening):
        step = 0

        def advance(self, units: int = 1, *, written: int = 0) -> None:
            self.step += units
            if self.step == 3:
                for path in (folder / "a").iterdir():
                    path.write_bytes(b"")

    with pytest.raises(InputError, match=r"an empty file; nor can the 3 items after it be read"):
        train(config(tmp_path, folder, image_size=32, global_batch_size=4, steps=9), Removing())
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["0000003"]


def test_a_run_goes_on_where_its_data_lies_now(tmp_path: Path, latents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(latents, tmp_path / "here")
    train(config(tmp_path, tmp_path / "here", steps=2))
    monkeypatch.chdir(tmp_path)
    told = Listening()
    assert train(config(tmp_path, Path("here"), steps=3), told).step == 3  # another spelling is no other place
    assert told.notes == []
    (tmp_path / "here").rename(tmp_path / "there")
    assert train(config(tmp_path, tmp_path / "there", steps=4), told).step == 4
    assert [line for line in told.notes if f"here', is '{tmp_path / 'there'}'; it holds the same sequences" in line]
    assert train(config(tmp_path, f"file://{tmp_path}/there", steps=5)).step == 5
    train(config(tmp_path / "never", latents, steps=5))  # the moves changed nothing
    assert_same(run_folder(tmp_path), run_folder(tmp_path / "never"))
    shutil.copytree(tmp_path / "there", tmp_path / "fewer")
    compact(tmp_path / "fewer", drop=DatasetStore.open(tmp_path / "fewer").keys()[:1])
    with pytest.raises(InputError, match=r"was trained on other data .*30 items then, 20 now.*another run_name"):
        train(config(tmp_path, tmp_path / "fewer", steps=6))
    with pytest.raises(InputError, match="s3://bucket/latents"):
        train(config(tmp_path, "s3://bucket/latents", run_name="new"))
    assert not (tmp_path / "new").exists()
