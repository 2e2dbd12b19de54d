"""Training runs: the log as columns, and only what is new of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from halfstep.files import write_durably
from halfstep.web.view import training
from tests.support.web import Browser


def line(step: int, **values: Any) -> str:
    record = {"step": step, "loss": 3.0 / step, "grad_norm": 1.0, "loss_scale": None, "samples_per_second": 8, **values}
    return json.dumps(record) + "\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "results" / "eqm"
    (folder / "checkpoints" / "0000002").mkdir(parents=True)
    (folder / "config.json").write_text('{"model": "EqM-S/8"}')
    (folder / "log.jsonl").write_text(line(1) + line(2))
    return folder


def test_a_log_is_followed_by_its_new_bytes(run: Path) -> None:
    browser, log = Browser(run), run / "log.jsonl"
    first = browser.json("/api/training/log", at="0")
    assert first["columns"]["step"] == [1, 2] and first["columns"]["loss"] == [3.0, 1.5]
    assert first["columns"]["loss_scale"] == [None, None] and first["newest"]["step"] == 2
    query = {"at": "0", "start": first["next"], "file": first["file"]}
    assert browser.json("/api/training/log", **query)["columns"]["step"] == []
    with log.open("a") as file:
        file.write(line(3) + line(4)[:10])  # the writer is in the middle of a line
        file.flush()
        second = browser.json("/api/training/log", **query)
        assert second["columns"]["step"] == [3] and not second["again"]
        file.write(line(4)[10:])
    third = browser.json("/api/training/log", **{**query, "start": second["next"]})
    assert third["columns"]["step"] == [4] and third["next"] == log.stat().st_size


def test_a_run_that_goes_on_from_an_earlier_step_is_told_again(run: Path) -> None:
    browser = Browser(run)
    first = browser.json("/api/training/log", at="0")
    write_durably(run / "log.jsonl", (line(1) + line(2, loss=9.0) + line(3)).encode())
    again = browser.json("/api/training/log", at="0", start=first["next"], file=first["file"])
    assert again["again"] and again["columns"]["loss"] == [3.0, 9.0, 1.0]
    (run / "log.jsonl").write_text(line(1))  # cut short, the same file
    cut = browser.json("/api/training/log", at="0", start=again["next"], file=again["file"])
    assert cut["again"] and cut["columns"]["step"] == [1]


def test_a_long_log_comes_in_pieces(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_MOST_BYTES", 1000)
    (run / "log.jsonl").write_text("".join(line(step) for step in range(1, 200)))
    browser, steps, start, answers = Browser(run), [], 0, 0
    while True:
        found = browser.json("/api/training/log", at="0", start=start)
        steps += found["columns"]["step"]
        start, answers = found["next"], answers + 1
        if start == found["size"]:
            break
    assert steps == list(range(1, 200)) and answers > 10


def test_lines_that_cannot_be_read_are_counted(run: Path) -> None:
    odd = ["{", "[]", '{"loss": 1}', '{"step": "x"}', "\xff", "[" * 5000, "null"]
    (run / "log.jsonl").write_text(line(1) + "\n".join(odd) + "\n" + line(2, loss="high", grad_norm=True))
    found = Browser(run).json("/api/training/log", at="0")
    assert found["unreadable"] == len(odd)
    assert found["columns"]["step"] == [1, 2]
    assert found["columns"]["loss"] == [3.0, None] and found["columns"]["grad_norm"] == [1.0, None]


def test_settings_and_checkpoints(run: Path) -> None:
    browser = Browser(run.parent)
    about = browser.json("/api/training", at="0/eqm")
    assert about == {"settings": {"model": "EqM-S/8"}, "checkpoints": 1, "newest": "0000002"}
    (run / "config.json").write_text("{")
    assert "is damaged" in browser.refused("/api/training", 500, at="0/eqm")
    assert browser.json("/api/training/log", at="0/eqm")["columns"]["step"] == [1, 2]
    (run / "log.jsonl").unlink()
    assert "is not there" in browser.refused("/api/training/log", 404, at="0/eqm")


def test_settings_nested_too_deeply_are_one_line(run: Path) -> None:
    (run / "config.json").write_text(json.dumps({"a": "inner"}).replace('"inner"', "[" * 900 + "]" * 900))
    found = Browser(run).answer("/api/training", at="0")
    assert (found.status_code, found.text) == (400, "what is asked for is nested too deeply to be shown\n")


@pytest.mark.parametrize("settings", ["null", "5", "[1]"])
def test_settings_that_are_none_are_one_line(run: Path, settings: str) -> None:
    (run / "config.json").write_text(settings)
    found = Browser(run).answer("/api/training", at="0")
    assert found.status_code == 500 and "config.json: is damaged (no JSON object)" in found.text
    assert Browser(run).json("/api/training/log", at="0")["columns"]["step"] == [1, 2]
