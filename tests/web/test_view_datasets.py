"""Stores of latents: what pages give is what the store gives."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.autoencoders import load_autoencoder
from halfstep.spec import LatentSpec
from halfstep.store import DatasetStore, DatasetWriter, Manifest
from halfstep.web.view.pictures import Kept, distribution, exposure, grey
from tests.support.arrays import latents as numbers
from tests.support.web import Browser


def test_pages_give_what_the_store_gives(latents: Path) -> None:
    store, browser = DatasetStore.open(latents), Browser(latents)
    facts = browser.json("/api/dataset", at="0")
    assert (facts["sequences"], facts["items"]) == (len(store.keys()), len(store))
    assert (facts["bytes"], facts["fp32_bytes"]) == (store.latent_bytes(), store.fp32_bytes())
    assert LatentSpec.from_dict(facts["manifest"]["spec"]) == store.spec
    assert facts["problems"] == [] and facts["failures"] == []
    rows = browser.json("/api/dataset/sequences", at="0", count=100)["rows"]
    assert rows == [{"key": key, "length": store.length(key), "label": store.label(key)} for key in store.keys()]
    key = store.keys()[1]
    about = browser.json("/api/dataset/sequence", at="0", key=key)
    assert about["arrays"] == sorted(store.arrays(key))
    assert browser.json("/api/dataset/decoding", at="0") == {"why_not": None}
    for k in (0, 4):
        stored = store.read(key, k, k + 1, raw=True)[0]
        found = browser.json("/api/dataset/frame", at="0", key=key, k=k)
        assert found["beside"]["frame"] == store.read_array(key, "frame", k, k + 1)[0]
        assert found["beside"]["position"] == store.read_array(key, "position", k, k + 1)[0].tolist()
        assert [c["min"] for c in found["channels"]] == pytest.approx(stored.min(axis=(1, 2)).tolist())
        assert sum(found["counts"]) == stored.size
        expected = load_autoencoder("dct8").pictures(torch.from_numpy(store.read(key, k, k + 1)))[0]
        assert np.array_equal(browser.picture("/api/dataset/picture", at="0", key=key, k=k), expected)
        assert np.array_equal(browser.picture("/api/dataset/channel", at="0", key=key, k=k, c=3), grey(stored[3]))


@given(st.lists(st.tuples(st.sampled_from("abAB/ é"), st.sampled_from(["x", "Y y", ""])), max_size=30), st.data())
@settings(max_examples=25, deadline=None)
def test_pages_of_a_filter_are_the_matching_sequences(
    tmp_path_factory: pytest.TempPathFactory, given_rows: list[tuple[str, str]], data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("store")
    labels = {f"{name}{n}": label or None for n, (name, label) in enumerate(given_rows)}
    with DatasetWriter(root / "s", Manifest(LatentSpec("test", 2, 8), "fp16")) as writer:
        for key, label in labels.items():
            writer.append(key, numbers(1), label=label)
    wanted = data.draw(st.sampled_from(["", "a", "B", "y y", "é", "x a", "zz"]))
    size = data.draw(st.integers(1, 9))
    found: list[str] = []
    browser = Browser(root / "s")
    while True:
        page = browser.json("/api/dataset/sequences", at="0", filter=wanted, start=len(found), count=size)
        if not page["rows"]:
            break
        found += [row["key"] for row in page["rows"]]
    expected = [
        key
        for key in sorted(labels)
        if all(word in f"{key} {labels[key] or ''}".casefold() for word in wanted.casefold().split())
    ]
    assert found == expected
    assert (page["matching"], page["total"]) == (len(expected), len(labels))


def test_a_store_that_grows_is_seen(tmp_path: Path, manifest: Manifest) -> None:
    root = tmp_path / "s"
    with DatasetWriter(root, manifest) as writer:
        writer.append("a", numbers(1))
    browser = Browser(root)
    assert browser.json("/api/dataset", at="0")["sequences"] == 1
    with DatasetWriter(root, manifest) as writer:
        writer.append("b", numbers(2))
        assert browser.json("/api/dataset", at="0")["unfinished"] == 1
        assert browser.json("/api/dataset/sequences", at="0", count=9)["total"] == 1
    assert browser.json("/api/dataset/sequences", at="0", count=9)["total"] == 2
    assert browser.json("/api/dataset/sequence", at="0", key="b")["length"] == 2


def test_what_cannot_be_decoded_says_why_and_shows_channels(tmp_path: Path, manifest: Manifest) -> None:
    elsewhere = replace(manifest, spec=replace(manifest.spec, autoencoder=str(tmp_path), weights_sha256="0" * 64))
    for name, made, why in (
        ("unsaid", manifest, "--autoencoder"),
        ("gone", elsewhere, f"{tmp_path}: no autoencoder here"),
    ):
        with DatasetWriter(tmp_path / name, made) as writer:
            writer.append("a", numbers(1))
        browser = Browser(tmp_path / name)
        assert why in browser.json("/api/dataset/decoding", at="0")["why_not"]
        assert why in browser.refused("/api/dataset/picture", 400, at="0", key="a")
        assert browser.picture("/api/dataset/channel", at="0", key="a", c=1).shape == (3, 4)


def test_latents_that_do_not_say_theirs_are_decoded_by_the_one_that_is_named(latents: Path, tmp_path: Path) -> None:
    store = DatasetStore.open(latents)
    unsaid = Manifest(LatentSpec("unknown", 16, 8, scale=store.spec.scale), "fp32")
    key = store.keys()[0]
    with DatasetWriter(tmp_path / "s", unsaid) as writer:
        writer.append(key, store.read(key, raw=True))
    named = Browser(tmp_path / "s", autoencoder="dct8").picture("/api/dataset/picture", at="0", key=key, k=2)
    assert np.array_equal(named, Browser(latents).picture("/api/dataset/picture", at="0", key=key, k=2))


def damage(path: Path, at: int = -40) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)


def test_damage_is_one_line_and_the_rest_works(latents: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("index/00000.parquet", "manifest.json")):
        root = tmp_path / str(number)
        shutil.copytree(latents, root / "bad")
        shutil.copytree(latents, root / "good")
        (root / "bad" / name).write_bytes((root / "bad" / name).read_bytes()[:100])
        browser = Browser(root)
        assert {place["kind"] for place in browser.json("/api/places")["places"]} == {"dataset"}
        facts = browser.json("/api/dataset", at="0/bad")
        assert len(facts["problems"]) == 1 and "halfstep store repair" in facts["problems"][0]
        assert "repair" in browser.refused("/api/dataset/sequences", 500, at="0/bad", count=9)
        assert browser.json("/api/dataset/sequences", at="0/good", count=9)["total"] == 3


def test_a_missing_shard_costs_its_own_sequences(tmp_path: Path, manifest: Manifest) -> None:
    for key in "ab":
        with DatasetWriter(tmp_path / "s", manifest) as writer:
            writer.append(key, numbers(1))
    browser = Browser(tmp_path / "s")
    (tmp_path / "s" / "shards" / "00000.safetensors").write_bytes(b"short")
    assert browser.json("/api/dataset/sequences", at="0", count=9)["total"] == 2
    assert "store verify" in browser.refused("/api/dataset/sequence", 500, at="0", key="a")
    assert browser.json("/api/dataset/sequence", at="0", key="b")["length"] == 1


def test_failures_are_told(latents: Path, tmp_path: Path) -> None:
    shutil.copytree(latents, tmp_path / "s")
    lines = [{"key": f"k{n}", "source": "x.jpg", "reason": "<b>cut short", "frame": n} for n in range(300)]
    (tmp_path / "s" / "failures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = Browser(tmp_path / "s").json("/api/dataset", at="0")
    assert facts["failed"] == 300 and facts["failures"] == lines[:200]
    (tmp_path / "s" / "failures.jsonl").write_text("{")
    facts = Browser(tmp_path / "s").json("/api/dataset", at="0")
    assert facts["problems"][0].startswith("failures.jsonl: cannot be read") and facts["sequences"] == 3


def test_failures_that_are_no_file_or_no_objects_are_not_waited_for(latents: Path, tmp_path: Path) -> None:
    shutil.copytree(latents, tmp_path / "s")
    failures = tmp_path / "s" / "failures.jsonl"
    failures.write_text('5\nnull\n{"key": "a"}\n')
    facts = Browser(tmp_path).json("/api/dataset", at="0/s")
    assert facts["failures"] == [{"key": "a"}] and facts["failed"] == 3
    failures.unlink()
    os.mkfifo(failures)  # which nobody ever writes to
    facts = Browser(tmp_path).json("/api/dataset", at="0/s")
    assert "is no file" in facts["problems"][0] and facts["sequences"] == 3


def test_verify_reads_every_byte(latents: Path, tmp_path: Path) -> None:
    shutil.copytree(latents, tmp_path / "s")
    browser = Browser(tmp_path / "s")
    assert browser.client.post("/api/verify?at=0").json() == {
        "ok": True,
        "line": "30 items in 1 shards",
        "problems": [],
    }
    assert browser.answer("/api/verify", at="0").status_code == 405
    damage(tmp_path / "s" / "shards" / "00000.safetensors", at=5000)
    found = browser.client.post("/api/verify?at=0").json()
    assert not found["ok"] and len(found["problems"]) >= 1 and str(tmp_path) not in found["problems"][0]


def test_unknown_sequences_and_frames_are_one_line(latents: Path) -> None:
    browser = Browser(latents)
    assert "no sequence 'nobody'" in browser.refused("/api/dataset/sequence", 400, at="0", key="nobody")
    key = DatasetStore.open(latents).keys()[0]
    assert "the sequence has frames [0, 10)" in browser.refused("/api/dataset/picture", 400, at="0", key=key, k=10)


@pytest.mark.parametrize(("storage", "largest", "subnormal"), [("fp16", 65504.0, 1), ("bf16", 3.39e38, 0)])
def test_values_against_the_limits_of_their_type(storage: str, largest: float, subnormal: int) -> None:
    latent = np.array([[[0.0, 2.0**-16], [1.5, np.nan]], [[-8.0, 4.0], [2.0, 1.0]]], np.float32)
    found = distribution(latent, storage)
    assert (found["not_finite"], found["zeros"]) == (1, 1)
    assert found["limits"]["largest"] == pytest.approx(largest, rel=1e-2)
    assert found["limits"]["headroom"] == pytest.approx(largest / 8, rel=1e-2)
    assert found["limits"]["subnormal"] == subnormal
    octaves = {found["octaves"]["first"] + n: count for n, count in enumerate(found["octaves"]["counts"]) if count}
    assert octaves == {-16: 1, 0: 2, 1: 1, 2: 1, 3: 1}


def test_pictures_of_odd_values() -> None:
    assert np.array_equal(grey(np.array([[1.0, 3.0], [2.0, np.nan]])), [[0, 255], [128, 0]])
    assert np.array_equal(grey(np.full((2, 2), 7.0)), np.zeros((2, 2)))
    frame = np.zeros((2000, 1500), np.uint16)
    frame[1234, 777] = 50_000
    shown = exposure(frame, 500)
    assert shown.shape == (500, 375)
    assert exposure(np.full((4, 4), np.nan, np.float32), 8).shape == (4, 4)


def test_what_is_kept_is_bounded() -> None:
    kept: Kept[bytes] = Kept(10, len)
    made = []

    def make(key: int) -> bytes:
        made.append(key)
        return bytes(4)

    for key in (1, 2, 1, 3, 1, 2):
        kept.get(key, lambda key=key: make(key))  # type: ignore[misc]
    assert made == [1, 2, 3, 2]
