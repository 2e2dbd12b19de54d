"""What is found in folders, and that nothing outside of them is shown."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from halfstep.store import DatasetWriter, Manifest, TrajectoryStore
from halfstep.web.view import places
from tests.support.arrays import latents, walk
from tests.support.web import Browser


@pytest.fixture
def house(tmp_path: Path, manifest: Manifest) -> Path:
    """A folder with one of each, and a secret beside it."""
    root = tmp_path / "house"
    with DatasetWriter(root / "latents", manifest) as writer:
        writer.append("a", latents(2))
    TrajectoryStore.create(root / "samples" / "runs").add("r", walk(3, shape=(2, 4, 4)), sigmas=[1.0, 0.5, 0.0])
    for name in ("one", "two"):
        (root / "results" / name).mkdir(parents=True)
        (root / "results" / name / "config.json").write_text("{}")
        (root / "results" / name / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (root / "streamed" / "events").mkdir(parents=True)
    (root / "streamed" / "run.json").write_text('{"sessions": []}')
    (root / "photos").mkdir()
    shutil.copytree(root / "latents", tmp_path / "secret")
    return root


def test_a_folder_lists_what_it_holds(house: Path) -> None:
    found = Browser(house).json("/api/places")
    assert found["complete"] and found["nothing"] == []
    assert {(place["at"], place["kind"]) for place in found["places"]} == {
        ("0/latents", "dataset"),
        ("0/samples/runs", "runs"),
        ("0/results/one", "training"),
        ("0/results/two", "training"),
        ("0/streamed", "streamed"),
    }
    for place in found["places"]:
        about = Browser(house).json("/api/place", at=place["at"])
        assert about["kind"] == place["kind"]
        assert about["crumbs"][0] == {"at": "0", "name": "house"}
        assert about["crumbs"][-1]["at"] == place["at"]


def test_what_is_none_of_ours_says_what_it_is_not(house: Path) -> None:
    browser = Browser(house / "photos")
    assert browser.json("/api/place", at="0")["kind"] == "folder"
    assert "no dataset store (manifest.json), no recorded runs" in browser.json("/api/places")["nothing"][0]
    found = Browser(house / "results", house / "photos").json("/api/places")
    assert len(found["places"]) == 2 and [line.split(":")[0] for line in found["nothing"]] == [str(house / "photos")]
    assert "has no checksums to verify" in browser.client.post("/api/verify?at=0").text


def test_a_folder_of_very_many_hides_none_beside_it(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "_MOST_FOLDERS", 12)
    for number in range(40):
        (house / "a" / str(number)).mkdir(parents=True)
    found = Browser(house).json("/api/places")
    assert [place["at"] for place in found["places"]] == ["0/latents", "0/streamed"] and not found["complete"]
    found = Browser(house / "a").json("/api/places")
    assert not found["complete"] and found["nothing"] == []  # which was not found out


def test_a_folder_of_an_endless_number_is_not_there(house: Path) -> None:
    assert Browser(house).answer("/api/place", at="9" * 5000).status_code == 404


def test_several_folders_and_odd_names_are_reached(house: Path) -> None:
    odd = house / os.fsdecode(b"100%\xff #?&")
    shutil.copytree(house / "latents", odd)
    browser = Browser(house / "samples", house)
    places = browser.json("/api/places")["places"]
    assert {place["at"].partition("/")[0] for place in places} == {"0", "1"}
    at = next(place["at"] for place in places if "100" in place["at"])
    assert browser.json("/api/dataset/sequences", at=at, count=9)["rows"][0]["key"] == "a"


@pytest.mark.parametrize(
    "at",
    [
        "0/../secret",
        "0/..%2Fsecret",
        "0/latents/../../secret",
        "0/%2e%2e/secret",
        "0/./latents",
        "0//latents",
        "0/a%00",
    ],
)
def test_a_way_out_is_refused(house: Path, at: str) -> None:
    for path in ("/api/place", "/api/dataset", "/api/dataset/sequences", "/api/runs", "/api/training", "/report"):
        assert "within the folders that are shown" in Browser(house).refused(path, 403, at=at)


@pytest.mark.parametrize("at", ["", "1", "-1", "x", "0/absent", "\u0660", "/etc", "0/latents/manifest.json/x"])
def test_what_is_not_there_is_said(house: Path, at: str) -> None:
    assert Browser(house).answer("/api/place", at=at).status_code in (403, 404)


def test_links_that_lead_out_are_refused_and_others_followed(house: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    (house / "out").symlink_to(secret)
    (house / "within").symlink_to(house / "latents")
    (house / "loop").symlink_to(house / "loop")
    browser = Browser(house)
    assert "leads out of the folders" in browser.refused("/api/dataset", 403, at="0/out")
    assert browser.json("/api/dataset/sequences", at="0/within", count=1)["total"] == 1
    assert browser.answer("/api/place", at="0/loop").status_code == 403
    assert all("out" not in place["at"] for place in browser.json("/api/places")["places"])
    for name in ("manifest.json", "index/00000.parquet", "shards/00000.safetensors"):
        inner = house / "latents" / name
        inner.unlink()
        inner.symlink_to(secret / name)
        for path in ("/api/dataset", "/api/dataset/sequences"):
            found = Browser(house).answer(path, at="0/latents", count=1)
            assert "leads out of the folders" in found.text
            assert '"key"' not in found.text
        inner.unlink()
        shutil.copy(secret / name, inner)


def test_a_run_that_leads_out_is_not_read(house: Path, tmp_path: Path) -> None:
    other = TrajectoryStore.create(tmp_path / "others")
    other.add("hidden", walk(3, shape=(2, 4, 4)), sigmas=[1.0, 0.5, 0.0], prompt="a secret")
    (house / "samples" / "runs" / "hidden").symlink_to(tmp_path / "others" / "hidden")
    browser = Browser(house)
    for path in ("/api/runs/rows", "/api/runs/run", "/api/runs/metrics", "/api/runs/picture"):
        found = browser.answer(path, at="0/samples/runs", key="hidden", count=9)
        assert "secret" not in found.text.replace("secret/", "")
        assert "leads out" in found.text


def test_logs_and_frames_that_lead_out_are_not_read(house: Path, tmp_path: Path) -> None:
    secret = tmp_path / "log"
    secret.write_text('{"step": 7, "loss": 1.0}\n')
    for name in ("log.jsonl", "config.json"):
        (house / "results" / "one" / name).unlink()
        (house / "results" / "one" / name).symlink_to(secret)
    browser = Browser(house)
    assert "leads out" in browser.refused("/api/training/log", 403, at="0/results/one")
    assert "leads out" in browser.refused("/api/training", 403, at="0/results/one")
    (house / "streamed" / "events" / "000000.parquet").symlink_to(secret)
    assert "leads out" in browser.refused("/api/streamed", 403, at="0/streamed")
    assert "leads out" in browser.refused("/api/streamed/event", 403, at="0/streamed", part="000000")


def test_a_pipe_is_not_waited_for(house: Path) -> None:
    log = house / "results" / "one" / "log.jsonl"
    log.unlink()
    os.mkfifo(log)
    assert "is no file" in Browser(house).refused("/api/training/log", 404, at="0/results/one")


def test_only_files_of_pages_are_assets(house: Path) -> None:
    browser = Browser(house)
    assert browser.answer("/").headers["content-type"] == "text/html; charset=utf-8"
    assert browser.answer("/assets/view/main.js").headers["content-type"] == "text/javascript; charset=utf-8"
    for name in (
        "../guard.py",
        "..%2fguard.py",
        "view/../../guard.py",
        "view",
        "absent.js",
        "%2fetc%2fpasswd",
        "a%5c.js",
    ):
        assert browser.answer(f"/assets/{name}").status_code == 404


def test_pages_load_nothing_from_elsewhere() -> None:
    import halfstep.web

    for path in (Path(halfstep.web.__file__).parent / "assets").rglob("*.*"):
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text and "https:" not in text and "//cdn" not in text, path
        assert "innerHTML" not in text and "eval(" not in text, path


@pytest.mark.parametrize("number", ["-1", "x", "1e3", "9" * 30, "\u0663"])
def test_what_is_no_number_is_one_line(house: Path, number: str) -> None:
    browser = Browser(house)
    assert "expected a whole number" in browser.refused("/api/dataset/sequences", 400, at="0/latents", start=number)


def test_a_report_beside_runs_is_linked_and_kept_to_itself(house: Path, tmp_path: Path) -> None:
    folder = house / "samples" / "analysis"
    folder.mkdir()
    (folder / "analysis.json").write_text("{}")
    (folder / "report.html").write_text("<p>findings</p>")
    browser = Browser(house)
    assert browser.json("/api/runs", at="0/samples/runs")["reports"] == [
        {"at": "0/samples/analysis", "name": "analysis"}
    ]
    page = browser.answer("/report", at="0/samples/analysis")
    assert page.text == "<p>findings</p>"
    assert "sandbox allow-scripts" in page.headers["content-security-policy"]
    assert "same-origin" not in page.headers["content-security-policy"]
    assert "holds no analysis" in browser.refused("/report", 404, at="0/samples")
    (folder / "report.html").unlink()
    (tmp_path / "secret.html").write_text("secret")
    (folder / "report.html").symlink_to(tmp_path / "secret.html")
    assert "leads out" in browser.refused("/report", 403, at="0/samples/analysis")


def test_a_run_of_another_shape_is_still_a_picture(tmp_path: Path) -> None:
    store = TrajectoryStore.create(tmp_path / "runs")
    store.add("tokens", np.random.default_rng(0).standard_normal((2, 6, 8)).astype(np.float32), sigmas=[1.0, 0.0])
    assert Browser(tmp_path).picture("/api/runs/channel", at="0/runs", key="tokens", c=3).shape == (1, 8)
