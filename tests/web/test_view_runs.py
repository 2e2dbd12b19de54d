"""Recorded runs: what pages give is what the store gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from halfstep.autoencoders import load_autoencoder
from halfstep.store import TrajectoryFormat, TrajectoryStore
from tests.support.arrays import walk
from tests.support.web import Browser

SIGMAS = [1.0, 0.7, 0.4, 0.0]
EXACT = TrajectoryFormat(storage="fp32")


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """Runs of dct8's channels: of pictures, and one of a clip."""
    store = TrajectoryStore.create(tmp_path / "runs")
    for seed in range(3):
        states = walk(4, seed, (16, 2, 3))
        prompt = f"a {'red' if seed else 'blue'} car"
        store.add(f"car-{seed}", states, sigmas=SIGMAS, prompt=prompt, seed=seed, model="EqM", format=EXACT)
    store.add("clip", walk(4, 9, (16, 3, 2, 3)), sigmas=SIGMAS, label="7", format=EXACT)
    return tmp_path


def test_pages_give_what_the_store_gives(recorded: Path) -> None:
    browser, store = Browser(recorded, autoencoder="dct8"), TrajectoryStore.open(recorded / "runs")
    rows = browser.json("/api/runs/rows", at="0/runs", count=50)["rows"]
    assert [row["key"] for row in rows] == list(store)
    decoder = load_autoencoder("dct8")
    for row in rows:
        run, query = store[row["key"]], {"at": "0/runs", "key": row["key"]}
        assert (row["prompt"], row["seed"], row["complete"], row["problems"]) == (run.prompt, run.seed, True, 0)
        about = browser.json("/api/runs/run", **query)
        assert about["sigmas"] == run.sigmas.tolist() and about["steps"] == run.steps.tolist()
        assert about["shape"] == list(run.latents.shape[1:])
        metrics = browser.json("/api/runs/metrics", **query)
        states = run.latents[:].astype(np.float64).reshape(4, -1)
        assert metrics["norm"] == pytest.approx(np.sqrt((states**2).mean(axis=1)).tolist())
        assert metrics["change"][0] is None
        assert metrics["change"][1:] == pytest.approx(np.sqrt((np.diff(states, axis=0) ** 2).mean(axis=1)).tolist())
        for k in range(4):
            for t in range(3 if row["key"] == "clip" else 1):
                latent = run.latents[k][:, t] if row["key"] == "clip" else run.latents[k]
                expected = decoder.pictures(torch.from_numpy(latent[None]))[0]
                assert np.array_equal(browser.picture("/api/runs/picture", **query, k=k, t=t), expected)
        last = browser.picture("/api/runs/picture", **query, k=0, state="last")
        assert np.array_equal(last, browser.picture("/api/runs/picture", **query, k=3))


def test_straight_on_a_flow_ends_where_it_ends(tmp_path: Path) -> None:
    """Along a straight line, every step predicts the end."""
    noise, end = np.random.default_rng(0).standard_normal((2, 16, 2, 3)).astype(np.float32)
    states = [s * noise + (1 - s) * end for s in SIGMAS]
    TrajectoryStore.create(tmp_path / "runs").add("line", states, sigmas=SIGMAS, format=EXACT)
    browser = Browser(tmp_path / "runs", autoencoder="dct8")
    last = browser.picture("/api/runs/picture", at="0", key="line", state="last").astype(int)
    for k in range(4):
        predicted = browser.picture("/api/runs/picture", at="0", key="line", k=k, state="ahead").astype(int)
        assert abs(predicted - last).max() <= 1
    here = browser.picture("/api/runs/picture", at="0", key="line", k=0, state="at").astype(int)
    assert abs(here - last).max() > 20


def test_levels_that_do_not_tell_the_way_say_so(tmp_path: Path) -> None:
    store = TrajectoryStore.create(tmp_path / "runs")
    store.add("flat", walk(3, shape=(16, 2, 3)), sigmas=[1.0, 1.0, float("nan")])
    browser = Browser(tmp_path / "runs", autoencoder="dct8")
    assert browser.json("/api/runs/run", at="0", key="flat")["sigmas"] == [1.0, 1.0, None]
    for k in (0, 1):
        line = browser.refused("/api/runs/picture", 400, at="0", key="flat", k=k, state="ahead")
        assert "do not tell where it goes" in line
    assert "expected one of at, ahead, last" in browser.refused("/api/runs/picture", 400, at="0", key="flat", state="x")
    assert "it has 3 states" in browser.refused("/api/runs/picture", 400, at="0", key="flat", k=3)


def test_a_clip_of_an_autoencoder_over_time_is_shown_at_its_times(tmp_path: Path, small_wan: Path) -> None:
    state = np.random.default_rng(0).standard_normal((1, 16, 3, 2, 2)).astype(np.float32)
    TrajectoryStore.create(tmp_path / "runs").add("clip", state, sigmas=[0.0], format=EXACT)
    browser = Browser(tmp_path / "runs", autoencoder=str(small_wan))
    frames = load_autoencoder(str(small_wan)).pictures(torch.from_numpy(state))[0]
    assert len(frames) == 9  # one, and four for each latent after it
    for t in range(3):
        shown = browser.picture("/api/runs/picture", at="0", key="clip", t=t)
        assert np.array_equal(shown, frames[4 * t])


def test_a_filter_looks_through_what_was_noted(recorded: Path) -> None:
    browser = Browser(recorded)
    for wanted, keys in (
        ("", ["car-0", "car-1", "car-2", "clip"]),
        ("RED car", ["car-1", "car-2"]),
        ("car 2", ["car-2"]),
        ("7", ["clip"]),
        ("eqm", ["car-0", "car-1", "car-2"]),
        ("nothing", []),
    ):
        found = browser.json("/api/runs/rows", at="0/runs", filter=wanted, count=50)
        assert [row["key"] for row in found["rows"]] == keys, wanted
        assert (found["matching"], found["total"]) == (len(keys), 4)
        assert [
            r["key"] for r in browser.json("/api/runs/rows", at="0/runs", filter=wanted, start=1, count=1)["rows"]
        ] == (keys[1:2])


def test_latents_beside_say_how_to_decode(recorded: Path, latents: Path) -> None:
    alone = Browser(recorded / "runs").json("/api/runs/decoding", at="0", key="car-0")
    assert alone["decoded_as"] is None and "nothing says which autoencoder" in alone["why_not"]
    both = Browser(recorded / "runs", latents).json("/api/runs/decoding", at="0", key="car-0")
    assert both["why_not"] is None and both["decoded_as"].startswith("latents of dct8, as those in store")


def test_a_run_that_is_being_recorded_grows(tmp_path: Path) -> None:
    store = TrajectoryStore.create(tmp_path / "runs")
    writer = store.record("live", prompt="a walk")
    states = walk(4, shape=(16, 2, 3))
    browser = Browser(tmp_path / "runs", autoencoder="dct8")
    for k in range(4):
        writer.append(k, float(k), SIGMAS[k], states[k])
        about = browser.json("/api/runs/run", at="0", key="live")
        assert len(about["steps"]) == k + 1
        assert "it is being recorded" in about["problems"][0]
        assert browser.picture("/api/runs/picture", at="0", key="live", k=k).shape == (16, 24, 3)
    assert browser.json("/api/runs/rows", at="0", count=9)["rows"][0]["complete"] is False
    writer.finish()
    writer.close()
    assert browser.json("/api/runs/run", at="0", key="live")["problems"] == []
    assert browser.json("/api/runs/rows", at="0", count=9)["rows"][0]["complete"] is True


def test_damage_is_one_line_and_the_rest_works(recorded: Path) -> None:
    (recorded / "runs" / "car-1" / "zarr.json").write_text("{")
    chunk = next((recorded / "runs" / "car-2" / "latents").glob("c*"))
    files = [chunk] if chunk.is_file() else [path for path in chunk.rglob("*") if path.is_file()]
    for path in files:
        path.write_bytes(path.read_bytes()[:-9] + bytes(9))
    browser = Browser(recorded, autoencoder="dct8")
    rows = {row["key"]: row for row in browser.json("/api/runs/rows", at="0/runs", filter="car", count=9)["rows"]}
    assert "cannot be read" in rows["car-1"]["problem"] and rows["car-0"]["prompt"] == "a blue car"
    assert "cannot be read" in browser.refused("/api/runs/run", 500, at="0/runs", key="car-1")
    assert "damaged" in browser.refused("/api/runs/picture", 500, at="0/runs", key="car-2", k=1)
    assert browser.json("/api/runs/metrics", at="0/runs", key="car-2")["norm"] == [None] * 4
    assert browser.picture("/api/runs/picture", at="0/runs", key="car-0", k=1).shape == (16, 24, 3)
    verified = browser.client.post("/api/verify?at=0/runs").json()
    assert not verified["ok"] and len(verified["problems"]) == 2
    (recorded / "runs" / "zarr.json").write_text("{")
    assert browser.json("/api/place", at="0/runs")["kind"] == "runs"
    assert "cannot be read" in browser.refused("/api/runs/rows", 500, at="0/runs", count=9)


def test_what_was_noted_in_another_shape_leaves_the_list(recorded: Path) -> None:
    file = recorded / "runs" / "car-1" / "zarr.json"
    content = json.loads(file.read_text())
    content["attributes"] |= {"problems": 7, "prompt": ["a"], "seed": {}}
    file.write_text(json.dumps(content))
    rows = Browser(recorded).json("/api/runs/rows", at="0/runs", filter="car", count=9)["rows"]
    assert [row["key"] for row in rows] == ["car-0", "car-1", "car-2"] and rows[1]["problems"] == 0


def test_a_batch_of_older_tools_is_shown(tmp_path: Path) -> None:
    folder = tmp_path / "batch" / "latents" / "prompt_000" / "vid_001"
    folder.mkdir(parents=True)
    for step in range(3):
        np.save(folder / f"step_{step:03d}.npy", walk(1, step, (16, 2, 3)))
        facts = {"step": step, "total_steps": 3, "sigma": 1 - step / 3, "timestep": step, "prompt": "a cat", "seed": 5}
        (folder / f"step_{step:03d}_metadata.json").write_text(json.dumps({**facts, "shape": [1, 16, 2, 3]}))
    browser = Browser(tmp_path, autoencoder="dct8")
    (place,) = browser.json("/api/places")["places"]
    assert place["kind"] == "runs"
    (row,) = browser.json("/api/runs/rows", at=place["at"], count=9)["rows"]
    assert (row["prompt"], row["seed"]) == ("a cat", 5)
    assert browser.picture("/api/runs/picture", at=place["at"], key=row["key"], k=2).shape == (16, 24, 3)
    assert "has no checksums" in browser.client.post(f"/api/verify?at={place['at']}").text


@pytest.mark.parametrize("key", ["../car-0", "absent", "", ".", "car-0/latents", "a" * 300])
def test_unknown_runs_are_one_line(recorded: Path, key: str) -> None:
    for path in ("/api/runs/run", "/api/runs/metrics", "/api/runs/picture", "/api/runs/channel"):
        assert "no run" in Browser(recorded).refused(path, 400, at="0/runs", key=key)
