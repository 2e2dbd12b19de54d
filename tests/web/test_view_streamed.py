"""Streamed runs: what pages give is what the tables and images give."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from halfstep.stream import Event, Identity, Outputs, Result
from halfstep.stream.parts import Parts
from halfstep.stream.sinks.cxi import CxiSettings
from halfstep.stream.sinks.events import EventRow
from halfstep.web.view.pictures import exposure
from tests.support.streaming import images_of, rows_of
from tests.support.web import Browser

SHAPE = (2, 12, 16)


def row_of(number: int) -> EventRow:
    rng = np.random.default_rng(number)
    data = rng.integers(0, 1000, SHAPE).astype(np.uint16)
    peaks = np.stack([rng.integers(0, 2, number % 4), *rng.uniform(0, 11, (2, number % 4))], axis=1).astype(np.float32)
    event = Event(Identity("r", "source", f"e{number}", number), data, {"photon_energy_eV": 9500.0})
    return EventRow(Result(event, peaks, rng.uniform(1, 9, number % 4).astype(np.float32)), False, number, 0.0, "net")


def stream_to(folder: Path) -> None:
    """A run of fifty events in five parts."""
    parts = Parts(Outputs(folder, CxiSettings(min_peaks=2)))
    for first in range(0, 50, 10):
        parts.commit([row_of(number) for number in range(first, first + 10)])
    report = {"guarantee": "numbered", "held": True, "peaks": 75, "sessions": [{"started": "now"}], "gaps": []}
    (folder / "run.json").write_text(json.dumps(report))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    stream_to(tmp_path / "streamed")
    return tmp_path / "streamed"


def test_pages_give_what_the_tables_give(run: Path) -> None:
    browser, rows = Browser(run), rows_of(run)
    with_image = [row for row in rows if row["file"] is not None]
    facts = browser.json("/api/streamed", at="0")
    assert (facts["events"], facts["images"], facts["parts"]) == (50, len(with_image), 5)
    assert facts["report"] == {"guarantee": "numbered", "held": True, "peaks": 75}
    for images, expected in (("no", rows), ("yes", with_image)):
        for start, count in ((0, 500), (7, 5), (18, 23), (len(expected) - 1, 50), (len(expected), 10)):
            found = browser.json("/api/streamed/events", at="0", start=start, count=count, images=images)
            assert [r["event"] for r in found["rows"]] == [r["event"] for r in expected[start : start + count]]
            assert found["matching"] == len(expected)


def test_a_frame_is_drawn_with_its_peaks(run: Path) -> None:
    browser, rows = Browser(run), rows_of(run)
    for row, image in images_of(run, [row for row in rows if row["file"] is not None][:6]):
        number = row["sequence"]
        query = {"at": "0", "part": f"{number // 10:06d}", "place": number % 10}
        event = browser.json("/api/streamed/event", **query)
        assert event["event"] == row["event"] and event["size"] == [16, 24]
        expected = zip(row["peak_panel"], row["peak_y"], row["peak_x"], row["peak_intensity"], strict=True)
        assert event["peaks"] == [[x, y + 12 * panel, intensity] for panel, y, x, intensity in expected]
        assert np.array_equal(browser.picture("/api/streamed/frame", **query), exposure(image, 1024))
    line = browser.refused("/api/streamed/frame", 404, at="0", part="000000", place=0)
    assert "hits alone are kept" in line


def test_only_the_tables_that_are_shown_are_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from halfstep.web.view.streamed import Streamed

    asked: list[str] = []
    read: Callable[..., object] = Streamed._read
    monkeypatch.setattr(
        Streamed, "_read", lambda self, table, *rest: asked.append(table.stem) or read(self, table, *rest)
    )
    Browser(run).json("/api/streamed/events", at="0", start=22, count=5, images="no")
    assert asked == ["000002"]


def test_a_run_that_goes_on_grows_and_damage_costs_its_own_part(run: Path) -> None:
    browser = Browser(run)
    (run / "run.json").write_text('{"sessions": [{"started": "now", "ended_by": null}]}')
    assert browser.json("/api/streamed", at="0")["report"] == {}
    Parts(Outputs(run, CxiSettings(min_peaks=2))).commit([row_of(number) for number in range(50, 53)])
    assert browser.json("/api/streamed", at="0")["events"] == 53
    (run / "events" / "000001.parquet").write_bytes(b"PAR1 and nothing more")
    (run / "run.json").write_text("{")
    facts = browser.json("/api/streamed", at="0")
    assert (facts["events"], len(facts["problems"])) == (43, 2)
    found = browser.json("/api/streamed/events", at="0", start=8, count=4, images="no")
    assert [row["event"] for row in found["rows"]] == ["e8", "e9", "e20", "e21"]
    assert "000001.parquet: no readable table" in found["problems"][0]
    assert "no readable table" in browser.refused("/api/streamed/event", 500, at="0", part="000001", place=0)
    (run / "cxi" / "peaks_000000.cxi").write_bytes(b"no HDF5")
    assert "cannot be read" in browser.refused("/api/streamed/frame", 500, at="0", part="000000", place=2)
    assert browser.json("/api/streamed/event", at="0", part="000000", place=2)["n_peaks"] == 2


@pytest.mark.parametrize("part", ["../../x", "x", "", "-1", "000000.parquet"])
def test_unknown_parts_are_one_line(run: Path, part: str) -> None:
    assert "expected the number of a table" in Browser(run).refused("/api/streamed/event", 400, at="0", part=part)
    assert "it has 10" in Browser(run).refused("/api/streamed/frame", 400, at="0", part="000000", place=10)


def test_an_image_that_leads_out_is_not_read(run: Path, tmp_path: Path) -> None:
    image = run / "cxi" / "peaks_000000.cxi"
    image.rename(tmp_path / "outside.cxi")
    image.symlink_to(tmp_path / "outside.cxi")
    line = Browser(run).refused("/api/streamed/frame", 403, at="0", part="000000", place=2)
    assert "leads out" in line


@pytest.mark.parametrize("damage", [5, {"a": 1}, "abc", [1, None]])
def test_a_report_of_another_shape_is_shown_as_far_as_it_goes(tmp_path: Path, damage: object) -> None:
    (tmp_path / "events").mkdir()
    (tmp_path / "run.json").write_text(json.dumps({"peaks": 7, "sessions": damage, "gaps": damage}))
    found = Browser(tmp_path).json("/api/streamed", at="0")
    assert found["report"] == {"peaks": 7} and found["sessions"] == found["gaps"] == []
