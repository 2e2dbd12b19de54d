"""The command line end to end: documents on stdout, one line for an error, exit codes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from halfstep.cli.encode import saving
from halfstep.store import DatasetStore, TrajectoryStore
from tests.support.cli import run_cli, run_script

SMALL = ["--size", "32", "--batch-size", "4", "--quiet"]


def test_help_loads_no_heavy_library() -> None:
    script = "import sys; sys.argv = ['halfstep', '--help']\nfrom halfstep.cli import main\n"
    script += "try:\n    main()\nexcept SystemExit:\n    pass\n"
    script += "print([m for m in ('torch', 'numpy', 'pyarrow', 'diffusers', 'av', 'matplotlib') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("[]")
    assert "encode" in result.stdout


@pytest.fixture(scope="module")
def store(toy_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("cli") / "store"
    result = run_cli("encode", "-i", toy_world, "-o", output, *SMALL, "--json")
    report = json.loads(result.stdout)
    assert {k: report[k] for k in ("sequences", "items", "encoded", "skipped", "removed", "failed")} == {
        "sequences": 3,
        "items": 30,
        "encoded": 30,
        "skipped": 0,
        "removed": 0,
        "failed": 0,
    }
    assert report["bytes"] == 30 * 16 * 4 * 4 * 2
    assert report["items_per_second"] > 0
    return output


def test_verify(store: Path, tmp_path: Path) -> None:
    document = json.loads(run_cli("store", "verify", store, "--json").stdout)
    assert document == {"ok": True, "shards": 1, "items": 30, "problems": []}
    damaged = shutil.copytree(store, tmp_path / "damaged")
    shard = next((damaged / "shards").iterdir())
    data = bytearray(shard.read_bytes())
    data[3000] ^= 1
    shard.write_bytes(data)
    document = json.loads(run_cli("store", "verify", damaged, "--json", check=1).stdout)
    assert not document["ok"]
    assert document["problems"] == [
        "shards/00000.safetensors: does not match its checksum; run `halfstep store repair`"
    ]
    assert "NOT ok" in run_cli("store", "verify", damaged, check=1).stdout
    repaired = json.loads(run_cli("store", "repair", damaged, "--json", check=1).stdout)
    assert len(repaired["lost"]) == 1
    run_cli("store", "verify", damaged)


def test_inspect(store: Path) -> None:
    document = json.loads(run_cli("store", "inspect", store, "--json").stdout)
    assert document["latent_shape"] == [16, 4, 4]
    assert document["spec"]["autoencoder"] == "dct8"
    assert document["arrays"] == ["frame", "latents", "position", "yaw"]
    assert "30 items in 3 sequences" in run_cli("store", "inspect", store).stdout


def test_export(store: Path, tmp_path: Path) -> None:
    opened = DatasetStore.open(store)
    run_cli("store", "export", store, "--format", "pt-tree", "-o", tmp_path / "pt")
    latent = torch.load(tmp_path / "pt" / "walk_001" / "4.pt", weights_only=True)["latent"]
    assert np.array_equal(latent.numpy(), opened.read("walk_001", 4, 5)[0])
    # A view would drag all ten frames into each file.
    assert (tmp_path / "pt" / "walk_001" / "4.pt").stat().st_size < 2 * latent.numel() * 4 + 2000
    run_cli("store", "export", store, "--format", "npy", "-o", tmp_path / "npy")
    assert np.array_equal(np.load(tmp_path / "npy" / "walk_002.npy"), opened.read("walk_002"))
    run_cli("store", "export", store, "--format", "webdataset", "-o", tmp_path / "wds")
    listing = subprocess.run(["tar", "tf", tmp_path / "wds" / "shard-000000.tar"], capture_output=True, text=True)
    assert listing.stdout.split() == [f"00000000{i}.{e}" for i in range(3) for e in ("latents.npy", "json")]
    error = run_cli("store", "export", store, "--format", "npy", "-o", tmp_path / "npy", check=2).stderr
    assert "; name a new folder for the export" in error


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["encode", "-i", "{tmp}/none", "-o", "{tmp}/s"], 2, "none: no such file or folder"),
        (["encode", "-i", "{tmp}/empty", "-o", "{tmp}/s"], 2, "no pictures, videos, walks or latents in it"),
        (["encode", "-o", "{tmp}/s"], 2, "no source; give at least one with -i"),
        (["encode", "-i", "{toy}", "-o", "{tmp}/s", "--size", "big"], 2, "--size: got 'big'; expected N or WxH"),
        (["encode", "-i", "{toy}", "-o", "{tmp}/s", "--batch-size", "0"], 2, "--batch-size: got '0'"),
        (["encode", "-i", "{toy}", "-o", "{tmp}/s", "--precision", "fp8"], 2, "precision: got 'fp8'; expected one of"),
        (["encode", "-i", "{toy}", "-o", "{tmp}/file"], 2, "file: is a file"),
        (["encode", "-i", "{toy}", "-o", "{tmp}/full"], 2, "and is no latent store"),
        (["encode", "-i", "{tmp}/bad.yaml", "-o", "{tmp}/s"], 2, "bad.yaml: 0.stride: got 'often'"),
        (["encode", "-i", "{tmp}/none.yaml", "-o", "{tmp}/s"], 2, "none.yaml: no such file"),
        (["encode", "-i", "{tmp}/empty.yaml", "-o", "{tmp}/s"], 2, "sources: the list is empty"),
        (["encode", "-i", "{tmp}/bad.yaml", "-o", "{tmp}/s", "--stride", "2"], 2, "set stride there"),
        (["encode", "-i", "{toy}", "-o", "{tmp}/s", "--fps", "nan"], 2, "fps: got nan"),
        (["encode", "-i", "{toy}"], 2, "-o"),
        (["encode", "-i", "{toy}", "-o", "{tmp}/s", "--limit", "0"], 2, "--limit"),
        (["encode", "-i", "{toy}", "-o", "{tmp}/s", "--autoencoder", "{tmp}/taef"], 2, "not the weights of taef2"),
        (["toy-world", "-o", "{tmp}/file"], 2, "is a file; name a folder for the toy world"),
        (["store", "verify", "{tmp}/none"], 1, "no store here"),
        (["store", "repair", "{tmp}/full"], 1, "no store here"),
        (["store", "inspect", "nothing://{tmp}"], 2, "nothing://"),
        (["store", "inspect", "{tmp}/none"], 1, "no store here"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, toy_world: Path, arguments: list[str], code: int, named: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    (tmp_path / "bad.yaml").write_text(f"- path: {toy_world}\n  stride: often\n")
    (tmp_path / "empty.yaml").write_text("[]")
    (tmp_path / "taef").mkdir()
    (tmp_path / "taef" / "taef2_encoder.pth").touch()
    filled = [argument.format(tmp=tmp_path, toy=toy_world) for argument in arguments]
    result = run_cli(*filled, check=code)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("halfstep: ")
    assert named in result.stderr
    assert not (tmp_path / "s").exists()
    assert sorted(path.name for path in (tmp_path / "full").iterdir() if not path.name.startswith(".")) == [
        "thesis.tex"
    ]


def test_version() -> None:
    assert run_cli("--version").stdout.startswith("halfstep 0.")


def test_a_group_without_a_verb_shows_its_help() -> None:
    assert "verify" in run_cli("store", check=2).stdout


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = run_cli("--debug", "store", "verify", tmp_path, check=1)
    assert "Traceback" in result.stderr
    assert "StoreError" in result.stderr


@pytest.mark.parametrize(
    ("latents", "fp32", "sources", "told"),
    [
        (12_300_000, 24_600_000, 151_900_000, "12.3 MB of latents: 8.1% of the sources (151.9 MB), 50% of fp32"),
        (12_300, 24_600, 20_000, "12.3 kB of latents: 62% of the sources (20.0 kB), 50% of fp32 latents"),
        (12_300_000, 12_300_000, 5_300_000, "12.3 MB of latents: 2.3 times the sources (5.3 MB), 100% of fp32 latents"),
        (12_300_000, 24_600_000, None, "12.3 MB of latents: 50% of fp32 latents; not all of their sources are there"),
    ],
)
def test_what_latents_take_is_told_as_it_is(latents: int, fp32: int, sources: int | None, told: str) -> None:
    assert saving(latents, fp32, sources).startswith(told)


def test_encode_ends_with_what_the_latents_take(toy_world: Path, tmp_path: Path) -> None:
    result = run_cli("encode", "-i", toy_world, "-o", tmp_path / "s", *SMALL)
    assert "15.4 kB of latents: " in result.stdout
    assert " the sources (" in result.stdout
    assert "of latents" not in run_cli("encode", "-i", toy_world, "-o", tmp_path / "s", "--dry-run").stdout


def test_a_yaml_list_and_several_folders(toy_world: Path, tmp_path: Path) -> None:
    second = shutil.copytree(toy_world, tmp_path / "second")
    (tmp_path / "all.yaml").write_text(f"- path: {toy_world}\n  name: one\n- path: {second}\n  kind: walks\n")
    report = json.loads(run_cli("encode", "-i", tmp_path / "all.yaml", "-o", tmp_path / "s", *SMALL, "--json").stdout)
    assert (report["sequences"], report["items"]) == (6, 60)
    assert DatasetStore.open(tmp_path / "s").keys()[::3] == ["one/walk_000", "second/walk_000"]
    report = json.loads(run_cli("encode", "-i", toy_world, second, "-o", tmp_path / "t", *SMALL, "--json").stdout)
    assert report["sequences"] == 6


def test_failures_are_told_and_change_the_exit_code(toy_world: Path, tmp_path: Path) -> None:
    world = shutil.copytree(toy_world, tmp_path / "world")
    (world / "walk_001" / "4.jpg").write_bytes(b"")
    (world / "walk_000" / "2.jpg").unlink()
    result = run_cli("encode", "-i", world, "-o", tmp_path / "s", *SMALL, check=1)
    assert "2 failed" in result.stdout
    assert "4.jpg: an empty file" in result.stdout
    assert "walk_000: picture 2 is missing" in result.stdout
    strict = run_cli("encode", "-i", world, "-o", tmp_path / "t", *SMALL, "--strict", check=1)
    assert "stopped because of --strict" in strict.stderr


def test_probe_says_what_auto_chooses() -> None:
    document = json.loads(run_cli("probe", "--json").stdout)
    assert document["auto"].keys() == {"encode", "sample", "train"}
    assert "Measured on" in run_cli("probe").stdout


def test_toy_world_command(tmp_path: Path) -> None:
    run_cli("toy-world", "-o", tmp_path / "w", "--walks", 1, "--frames", 3)
    assert sorted(p.name for p in (tmp_path / "w" / "walk_000").iterdir()) == [
        "0.jpg",
        "1.jpg",
        "2.jpg",
        "traj_data.pkl",
    ]


@pytest.mark.slow
def test_demo_writes_a_report_that_stands_alone(tmp_path: Path) -> None:
    old = tmp_path / "demo" / "walks" / "walk_099"
    old.mkdir(parents=True)
    (tmp_path / "demo" / ".halfstep-demo").touch()  # a demo replaces a demo, and nothing else
    result = run_cli("demo", "-o", tmp_path / "demo", "--train-seconds", 1)
    assert not old.exists()
    report = tmp_path / "demo" / "report.html"
    assert result.stdout.strip().endswith(str(report.resolve()))
    page = report.read_text()
    assert "://" not in page
    assert page.count("data:image/png;base64,") == 31
    assert {"fp16", "bf16", "fp32"} <= {cell for cell in ("fp16", "bf16", "fp32") if f"<td>{cell}</td>" in page}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert "and is no demo" in run_cli("demo", "-o", tmp_path / "mine", check=2).stderr


@pytest.mark.slow
def test_benchmarks_run(tmp_path: Path) -> None:
    read = json.loads(run_cli("bench", "read", "--walks", 8, "--windows", 20, "--rounds", 1, "--json").stdout)
    assert {"halfstep", "pt tree", "zarr, sharded"} <= read["seconds"].keys()
    arguments = ["--images", 32, "--size", 32, "--rounds", 1, "--autoencoder", "dct8", "--no-memory"]
    encode = json.loads(run_cli("bench", "encode", *arguments, "--json").stdout)
    assert encode["images"] == 32
    assert encode["relative_error_against_fp32"] < 0.01
    assert {"device", "cores", "torch"} <= encode["machine"].keys()


@pytest.mark.slow
def test_the_training_benchmarks_run(tmp_path: Path) -> None:
    small = ["--model", "EqM-S/8", "--size", 64, "--rounds", 1, "--json"]
    train = json.loads(run_cli("bench", "train", *small, "--batch", 2, "--steps", 1, "--no-memory").stdout)
    assert len(train["seconds"]) == 6
    assert train["speedup_over_encoder_in_the_loop"] > 0
    sample = json.loads(run_cli("bench", "sample", *small, "--batch", 1, "--updates", 3).stdout)
    assert sample["difference"]["halfstep, fp32"] < 1e-4  # the same arithmetic, but for the condition computed once
    assert sample["difference"]["halfstep, auto"] < 0.05
    plot = tmp_path / "curves.png"
    precision = json.loads(run_cli("bench", "precision", "--seeds", 2, "--steps", 20, "--plot", plot, "--json").stdout)
    assert precision["largest_difference_of_means"].keys() == {"bf16-mixed", "bf16-true"}
    assert max(precision["largest_difference_of_means"].values()) < 0.02
    assert plot.stat().st_size > 10_000


@pytest.mark.slow
def test_the_trajectory_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfstep.bench.trajectory.SHAPE", (4, 4, 20, 32))  # gzip takes minutes for a video's
    latents = np.cumsum(np.random.default_rng(0).standard_normal((9, 4, 16, 16)), axis=0).astype(np.float32)
    np.savez(tmp_path / "mine.npz", latents=latents)
    command = ["bench", "trajectory", "--file", tmp_path / "mine.npz", "--rounds", 1]
    result = json.loads(run_cli(*command, "--json").stdout)
    assert result["trajectories"].keys() == {"sampled", "small", "mine"}
    small = result["trajectories"]["small"]["ways"]
    assert small["halfstep, seed known"]["share_of_fp32"] < 0.9 * small["halfstep, groups of 16"]["share_of_fp32"]
    assert small["halfstep, born bf16"]["share_of_fp32"] < small["halfstep, born fp16"]["share_of_fp32"] < 0.1
    sampled = result["trajectories"]["sampled"]["ways"]
    assert sampled["halfstep, groups of 16"]["share_of_fp32"] < 0.095
    for way, most in (("halfstep, groups of 16", 1.5), ("halfstep, strict", 1.0)):
        assert sampled[way]["worst_channel_error"] <= most * 1.001
    for ways in (sampled, result["trajectories"]["mine"]["ways"]):
        assert ways["halfstep, groups of 16"]["rms_error"] <= ways["npy.gz, fp16"]["rms_error"]
        assert ways["npy.gz, fp32"]["rms_error"] == ways["zarr raw, fp32"]["rms_error"] == 0
    assert result["recorder"]["same_samples"]
    (tmp_path / "bad.npz").write_bytes(b"x")
    assert "bad.npz: cannot be read" in run_cli("bench", "trajectory", "--file", tmp_path / "bad.npz", check=2).stderr


_OUTPUTS: dict[str, list[str]] = {
    "encode": ["encode", "-i", "{toy}", *SMALL, "-o"],
    "train": ["train", "eqm", "--data-path", "{store}", "--quiet", "-o", "{tmp}", "--run-name"],
    "sample": ["sample", "--ckpt", "{tmp}/none", "-o"],
    "generate": ["generate", "--template", "a", "--model", "{tmp}/none", "-o"],
    "analyze": ["analyze", "--batch-dir", "{runs}", "-o"],
    "export": ["store", "export", "{store}", "-o"],
    "convert": ["store", "convert", "{runs}", "-o"],
    "toy-world": ["toy-world", "-o"],
    "demo": ["demo", "-o"],
    "bench": ["bench", "precision", "--plot"],
}


@pytest.mark.parametrize("place", ["theirs", "file", "link", "file/within"])
@pytest.mark.parametrize("verb", sorted(_OUTPUTS))
def test_a_place_that_is_taken_is_refused_before_the_work(
    tmp_path: Path, toy_world: Path, store: Path, verb: str, place: str
) -> None:
    (tmp_path / "theirs" / "runs").mkdir(parents=True)  # a folder that samples and batches have too
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    runs = TrajectoryStore.create(tmp_path / "recorded")
    runs.add("a", np.zeros((3, 1, 2, 2), np.float32), sigmas=[1, 0.5, 0])
    if verb == "bench" and place in ("file", "link"):
        pytest.skip("a file is what it writes")
    if verb == "sample":
        (tmp_path / "none").touch()

    def listing() -> dict[Path, int]:
        return {path: path.lstat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]}

    before = listing()
    words = [word.format(tmp=tmp_path, toy=toy_world, store=store, runs=runs.root) for word in _OUTPUTS[verb]]
    result = run_cli(*words, tmp_path / place, check=2)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1 and str(tmp_path / place.partition("/")[0]) in result.stderr
    assert listing() == before


def test_a_folder_put_in_place_as_a_whole_has_nothing_hidden_in_its_way(tmp_path: Path, store: Path) -> None:
    (tmp_path / "mine" / ".git").mkdir(parents=True)
    for words in (["toy-world"], ["store", "export", store]):
        assert ".git; name a new folder" in run_cli(*words, "-o", tmp_path / "mine", check=2).stderr


@pytest.mark.parametrize("form", ["pt-tree", "npy", "webdataset"])
def test_an_export_that_finds_no_room_leaves_nothing(tmp_path: Path, store: Path, form: str) -> None:
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900)); sys.argv[0] = 'halfstep'\n"
    script = limit + "from halfstep.cli import main; main()"
    result = run_script(script, "store", "export", store, "-o", tmp_path / "out", "--format", form, check=1)
    assert result.stderr.startswith("halfstep: ") and result.stderr.count("\n") == 1
    assert "File too large; what was complete before is kept; free some space" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_folder_may_have_any_name(tmp_path: Path, toy_world: Path) -> None:
    """A name that is not UTF-8, as on an old disk, with a line break in it."""
    odd = tmp_path / "a b$HOME\nc\udce9"
    run_cli("encode", "-i", toy_world, "-o", odd / "latents", *SMALL)
    assert json.loads(run_cli("store", "verify", odd / "latents", "--json").stdout)["ok"]
    assert "0 items, 30 unchanged" in run_cli("encode", "-i", toy_world, "-o", odd / "latents", *SMALL).stdout
    config = tmp_path / "small.yaml"
    config.write_text(
        "model: {network: EqM, hidden_size: 32, depth: 1, num_heads: 2}\nprecision: fp32\nglobal_batch_size: 8\n"
        "run_name: run\nsteps: 1\ndevice: cpu\n"
    )
    training = ["train", "--config", config, "--data-path", odd / "latents", "--quiet", "-o"]
    assert "is not UTF-8, and safetensors reads no such name" in run_cli(*training, odd / "runs", check=2).stderr
    assert not (odd / "runs").exists()
    run_cli(*training, tmp_path)
    assert "after 2 steps" in run_cli(*training, tmp_path, "--steps", "2").stdout
    run_cli("sample", "--ckpt", tmp_path / "run", "-o", odd / "out", "-n", "2", "--steps", "3", "--record", "--quiet")
    run_cli("analyze", "--batch-dir", odd / "out" / "runs", "-o", odd / "analysis", "--quiet")
    assert (odd / "analysis" / "report.html").exists()


@pytest.mark.parametrize("url", ["file:///data/runs", "s3://bucket/runs"])
def test_a_url_is_named_as_it_was_typed(url: str) -> None:
    assert f"got {url}; expected a local path" in run_cli("store", "repair", url, check=2).stderr
