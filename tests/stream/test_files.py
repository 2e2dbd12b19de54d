"""Events from files of every kind, and a folder that fills up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from halfstep.errors import InputError
from halfstep.stream import ModelSpec, Outputs, Preparation, StreamEngine, StreamOptions
from halfstep.stream.sinks.cxi import CxiSettings
from halfstep.stream.sources.files import FilesSource
from tests.support.cli import HALFSTEP, REPOSITORY, run_process
from tests.support.media import write_video
from tests.support.streaming import rows_of

BRIGHT = ModelSpec("tests.support.streaming:bright")


def run(folder: Path, source: FilesSource, **options: object) -> object:
    settings = StreamOptions(**{"model": BRIGHT, "precision": "fp32", "batch_size": 4, **options})
    return StreamEngine(source, settings, Outputs(folder, CxiSettings(min_peaks=1))).run()


def frame(number: int, dtype: str = "uint16") -> np.ndarray:
    data = np.random.default_rng(number).integers(90, 110, (40, 50)).astype(dtype)
    data[3 + number, 20] = 250
    return data


@pytest.fixture
def world(tmp_path: Path) -> Path:
    folder = tmp_path / "world"
    folder.mkdir()
    with h5py.File(folder / "a.cxi", "w") as file:
        file["/entry_1/data_1/data"] = np.stack([frame(0), frame(1)])
        file["/LCLS/timestamp"] = np.array([5, 6], np.uint64)
        file["/LCLS/photon_energy_eV"] = np.array([9000.0, 9001.0])
    with h5py.File(folder / "b.h5", "w") as file:
        file["data/data"] = np.stack([np.stack([frame(2), frame(3)])])  # an event of two panels
    np.save(folder / "c.npy", frame(4, "float32"))
    Image.fromarray(frame(5)).save(folder / "d.tif")
    Image.fromarray(np.repeat(frame(6, "uint8")[..., None], 3, axis=2)).save(folder / "e.png")
    return folder


def test_files_of_every_kind_and_going_on(world: Path, tmp_path: Path) -> None:
    for expected in (6, 0):
        report = run(tmp_path / "r", FilesSource([world]))
        assert (report.balance["out"], report.held, report.balance["came"]) == (expected, True, 6)
    rows = rows_of(tmp_path / "r")
    found = {Path(row["source"]).name + row["event"]: row for row in rows}
    assert {name: row["peak_y"] for name, row in found.items()} == {
        "a.cxi0": [3],
        "a.cxi1": [4],
        "b.h50": [5, 6],
        "c.npy0": [7],
        "d.tif0": [8],
        "e.png0": [9],
    }
    assert found["b.h50"]["peak_panel"] == [0, 1]
    assert (found["a.cxi1"]["timestamp_uint64"], found["a.cxi1"]["photon_energy_eV"]) == (6, 9001.0)


def test_a_damaged_file_costs_its_own_events(world: Path, tmp_path: Path) -> None:
    (world / "d.tif").write_bytes((world / "d.tif").read_bytes()[:100])
    (world / "c.npy").write_bytes(b"no array")
    np.save(world / "mask.npy", np.ones((40, 50), bool))
    np.save(world / "nothing.npy", np.zeros((0, 50)))
    report = run(tmp_path / "r", FilesSource([world]))
    assert (report.balance["out"], report.balance["refused"], report.held) == (4, 4, False)
    letters = (tmp_path / "r" / "dead_letters.jsonl").read_text()
    assert "d.tif" in letters and "c.npy" in letters
    with pytest.raises(InputError, match="nothing to read"):
        FilesSource([tmp_path / "r" / "events"])


def test_videos_go_through_networks_of_colors(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", 5)
    source = FilesSource([tmp_path / "v.mp4"], channels=3, size=(32, 32))
    taken: list[object] = []
    options = StreamOptions(
        ModelSpec("tests.stream.test_files:colors"),
        precision="fp32",
        preparation=Preparation(channels=3, size=(32, 32), scale=255.0),
    )
    report = StreamEngine(source, options, consumers=[taken.append]).run()
    assert (report.balance["out"], report.held) == (5, True)
    assert [result.output.shape for result in taken] == [(1, 4, 32, 32)] * 5
    assert all(np.allclose(result.output[0, 0], result.event.data[0] / 255, atol=1e-5) for result in taken)


def colors():
    """Keeps the first color, of four channels."""
    import torch

    network = torch.nn.Conv2d(3, 4, 1)
    with torch.no_grad():
        network.weight.zero_()
        network.weight[0, 0] = 1.0
        network.bias.zero_()
    return network


CONFIG = """
model: {{weights_path: "tests.support.streaming:bright"}}
runtime: {{batch_size: 4, queue_bytes: 1000000}}
data: {{shape: [1, 64, 64]}}
data_source: {{source_type: random, shape: [1, 64, 64]}}
precision: {{dtype: fp32}}
output: {{output_dir: {folder}, min_num_peak: 1, buffer_size: 20}}
"""


@pytest.mark.slow
def test_a_signal_ends_a_run_with_all_that_was_under_way(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG.format(folder=tmp_path / "r"))
    process = subprocess.Popen(
        [*HALFSTEP, "stream", "--config", str(tmp_path / "c.yaml"), "--json"], cwd=REPOSITORY, stdout=subprocess.PIPE
    )
    while len(list((tmp_path / "r").glob("events/*.parquet"))) < 3:
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    stdout, _ = process.communicate(timeout=100)
    report = json.loads(stdout)
    assert (process.returncode, report["ended_by"], report["held"]) == (0, "signal", True)
    numbers = sorted(row["sequence"] for row in rows_of(tmp_path / "r"))
    assert numbers == list(range(report["balance"]["out"])) and report["balance"]["leased"] == 0


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_the_run_and_more_room_goes_on(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to mount")
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120k", "none", small], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounts are not allowed here")
    try:
        (tmp_path / "c.yaml").write_text(CONFIG.format(folder=small / "r"))
        settings = ["--set", "runtime.total_samples=300", "--set", "output.patience_s=0"]
        command = ["stream", "--config", tmp_path / "c.yaml", *settings, "--quiet"]
        full = run_process(*command, check=1, cwd=REPOSITORY)
        assert "No space left on device" in full.stderr.strip().splitlines()[-1]
        there = [row["sequence"] for row in rows_of(small / "r")]
        assert 0 < len(there) < 300
        subprocess.run(["mount", "-o", "remount,size=100m", small], check=True)
        run_process(*command, cwd=REPOSITORY)
        assert sorted(row["sequence"] for row in rows_of(small / "r"))[: len(there)] == sorted(there)
        assert len({row["sequence"] for row in rows_of(small / "r")}) == len(rows_of(small / "r")) == 300
    finally:
        subprocess.run(["umount", small], check=True)
