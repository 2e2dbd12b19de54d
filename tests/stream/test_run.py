"""Runs from messages in memory: what comes out, and what becomes of everything else."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfstep import files
from halfstep.errors import BusyError, FileError, InputError
from halfstep.stream import (
    Event,
    Identity,
    ModelSpec,
    Outputs,
    Preparation,
    Result,
    StreamEngine,
    StreamOptions,
    StreamReport,
)
from halfstep.stream.events import Message
from halfstep.stream.sinks.cxi import CxiSettings
from halfstep.stream.stages import Ends
from tests.support.streaming import ListSource, images_of, make_events, messages_of, rows_of, tiny_weights

BRIGHT = ModelSpec("tests.support.streaming:bright")
FRAGILE = ModelSpec("tests.support.streaming:fragile")


def run(
    folder: Path | None, messages: Sequence[Message | bytes] | ListSource, consumers: Any = (), **options: Any
) -> StreamReport:
    source = messages if isinstance(messages, ListSource) else ListSource(messages)
    settings = StreamOptions(**{"model": BRIGHT, "precision": "fp32", "batch_size": 4, **options})
    outputs = Outputs(folder, CxiSettings(min_peaks=1), masks=True) if folder is not None else None
    return StreamEngine(source, settings, outputs, consumers=consumers).run()


def dark(number: int, shape: tuple[int, int, int] = (1, 40, 50), dtype: str = "uint16") -> np.ndarray:
    return np.random.default_rng(number).integers(90, 110, shape).astype(dtype)


def event(data: np.ndarray, number: int = 0, **facts: Any) -> Event:
    return Event(Identity("r", "s", f"e{number}", number), data, facts)


def letters(folder: Path) -> list[dict[str, Any]]:
    path = folder / "dead_letters.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("style", ["center", "bottom-right"])
@pytest.mark.parametrize("size", [None, (64, 96)])
@pytest.mark.parametrize("policy", ["fp32", "bf16-true", "16-mixed"])
def test_peaks_are_where_they_were_on_the_wire(
    style: str, size: tuple[int, int] | None, policy: str, tmp_path: Path
) -> None:
    """Several panels, padded either way, in half: places, panels and the wire's values."""
    events, planted = [], []
    for number in range(7):
        data = dark(number, (3, 40, 50))
        rng = np.random.default_rng(100 + number)
        for panel in range(3):
            y, x = rng.integers(0, 39), rng.integers(0, 48)
            data[panel, y : y + 2, x] = (5000, 5001)
            planted.append((f"e{number}", panel, y + 0.5, float(x), 10001.0))
        events.append(event(data, number, timestamp=number * 0.5, photon_energy_eV=9000.0))
    preparation = Preparation(size=size, pad_style=style)  # type: ignore[arg-type]
    report = run(tmp_path / "r", messages_of(events), preparation=preparation, precision=policy)
    assert report.held and report.peaks == 21
    rows = rows_of(tmp_path / "r")
    found = [
        (row["event"], *place)
        for row in rows
        for place in zip(row["peak_panel"], row["peak_y"], row["peak_x"], row["peak_intensity"], strict=True)
    ]
    assert found == planted
    assert [row["timestamp"] for row in rows] == [number * 0.5 for number in range(7)]
    for row, image in images_of(tmp_path / "r", rows):
        assert np.array_equal(image, events[row["sequence"]].data.reshape(120, 50))


def test_a_run_goes_on_and_repeats_are_told_again(tmp_path: Path) -> None:
    events = [event(dark(number), number) for number in range(10)]
    run(tmp_path / "r", messages_of(events[:6]))
    source = ListSource(messages_of([events[7], *events, events[3]]))
    report = run(tmp_path / "r", source)
    assert report.balance["out"] == 4 and report.balance["skipped"] == 8 and report.held
    assert sorted(row["sequence"] for row in rows_of(tmp_path / "r")) == list(range(10))
    assert {identity.sequence for kind, identity in source.told if kind == "committed"} >= set(range(10))
    assert [session["out"] for session in json.loads((tmp_path / "r" / "run.json").read_text())["sessions"]] == [6, 4]


def test_another_event_under_a_number_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "r", messages_of([event(dark(1), 1)]))
    source = ListSource(messages_of([event(dark(2), 1)]))
    report = run(tmp_path / "r", source)
    assert report.balance["refused"] == 1 and not report.held
    assert "another event had this number before" in letters(tmp_path / "r")[0]["reason"]


def test_events_without_numbers_are_known_by_name_and_content(tmp_path: Path) -> None:
    """And those without a name are always new."""
    named = [Event(Identity("", "", f"t{number}"), dark(number)) for number in range(3)]
    same_name = Event(Identity("", "", "t0"), dark(9))
    nameless = Event(Identity("", "", ""), dark(1))
    report = run(tmp_path / "r", messages_of([*named, named[1], same_name, nameless, nameless]))
    assert (report.balance["out"], report.balance["skipped"]) == (6, 1)
    assert run(tmp_path / "r", messages_of(named)).balance["skipped"] == 3


def test_what_cannot_be_used_is_among_the_dead_letters_and_the_rest_comes_out(tmp_path: Path) -> None:
    broken = dark(1, dtype="float32")
    broken[0, 3, 4:7] = np.nan
    constant = np.full((1, 40, 50), 7, np.uint16)
    events = [
        event(dark(0), 0),
        event(broken, 1),
        event(dark(2, (1, 100, 50)), 2),  # too large
        event(constant, 3),
        event(dark(4, (5, 40, 50)), 4),  # more panels
        event(dark(5, dtype="int32"), 5),  # another type
        replace(event(dark(6), 6), identity=Identity("a\0", "", "")),
    ]
    source = ListSource([*messages_of(events[:3]), b"garbage", *messages_of(events[3:])])
    report = run(tmp_path / "r", source, preparation=Preparation(size=(64, 64)))
    assert (report.balance["came"], report.balance["out"], report.balance["refused"]) == (8, 4, 4)
    assert not report.held
    assert [row["sequence"] for row in rows_of(tmp_path / "r")] == [0, 3, 4, 5]
    told = letters(tmp_path / "r")
    reasons = " ".join(letter["reason"] for letter in told)
    for words in ("3 pixels that hold data are not finite", "larger than 64x64", "garbage", "zero characters"):
        assert words in reasons
    assert {identity.sequence for kind, identity in source.told if kind == "refused"} == {1, 2, -1}
    raw = (tmp_path / "r" / "dead_letters.bin").read_bytes()
    kept = next(letter for letter in told if letter["identity"] and letter["identity"]["sequence"] == 1)
    assert raw[kept["offset"] : kept["offset"] + kept["length"]] == broken.tobytes()


def test_masked_pixels_count_for_nothing(tmp_path: Path) -> None:
    data = dark(0, dtype="float32")
    data[0, :10] = np.nan
    data[0, 20, 20] = 1e9
    mask = np.ones((40, 50), bool)
    mask[:10] = mask[20, 20] = False
    expected = data[0, 10:].astype(np.float64)[mask[10:]]
    samples = Preparation(mask=mask)(data)[0, 0]
    top, left = Preparation().offset(data.shape)
    inner = samples[top : top + 40, left : left + 50].double().numpy()
    assert np.abs(inner[mask] - (expected - expected.mean()) / expected.std()).max() < 1e-4
    assert not inner[~mask].any()
    report = run(tmp_path / "r", messages_of([event(data)]), preparation=Preparation(mask=mask))
    assert (report.peaks, report.held) == (0, True)
    nothing = run(tmp_path / "n", messages_of([event(data)]), preparation=Preparation(mask=np.zeros((40, 50), bool)))
    assert (nothing.peaks, nothing.held) == (0, True)


def test_counts_on_a_pedestal_are_normalized_before_they_are_rounded() -> None:
    """Rounded first, bf16 would be 43% off."""
    import torch

    counts = (5000 + 20 * np.random.default_rng(0).standard_normal((1, 64, 64))).astype(np.float32)
    exact = (counts - counts.mean()) / counts.std()
    samples = Preparation(dtype=torch.bfloat16)(counts)[0].double().numpy()
    assert np.linalg.norm(samples - exact) / np.linalg.norm(exact) < 0.003


def test_what_half_spoils_is_computed_again_in_fp32_and_what_fp32_spoils_is_refused(tmp_path: Path) -> None:
    fine, high, low = dark(0), dark(1), dark(2, dtype="int32")
    high[0, 5, 5] = 5000  # 44 deviations up
    low[0, 5, 5] = -5000
    events = [event(fine, 0), event(high, 1), event(low, 2)]
    report = run(tmp_path / "r", messages_of(events), model=FRAGILE, precision="16-true")
    assert (report.balance["out"], report.balance["retried"], report.balance["refused"]) == (2, 1, 1)
    rows = {row["sequence"]: row for row in rows_of(tmp_path / "r")}
    assert (rows[0]["retried_in_fp32"], rows[1]["retried_in_fp32"]) == (False, True)
    assert (rows[1]["peak_y"], rows[1]["peak_x"]) == ([5.0], [5.0])
    assert letters(tmp_path / "r")[0]["identity"]["sequence"] == 2


def test_gaps_are_named(tmp_path: Path) -> None:
    events = [event(dark(number), number) for number in (0, 1, 4, 7)]
    end = Message(run="r", source="s", ends=True, expected=10)
    report = run(tmp_path / "r", ListSource([*messages_of(events), end], "numbered"))
    assert report.ended_by == "end of its sources" and not report.held
    assert [(gap["first"], gap["last"]) for gap in report.gaps] == [(2, 3), (5, 6), (8, 9)]
    assert report.missing == 6


def test_what_a_start_announces_is_missed_at_the_end(tmp_path: Path) -> None:
    start = Message(run="r", source="s", starts=True, expected=5)
    end = Message(run="r", source="s", ends=True)
    report = run(
        tmp_path / "r", ListSource([start, *messages_of([event(dark(0), 0), event(dark(2), 2)]), end], "numbered")
    )
    assert [(gap["first"], gap["last"]) for gap in report.gaps] == [(1, 1), (3, 4)]
    assert not report.held


def test_the_end_of_a_source_is_remembered_over_a_kill_and_forgotten_after_the_run(tmp_path: Path) -> None:
    events = [Event(Identity("r", name, "e", 0), dark(number)) for number, name in enumerate("ab")]
    path = tmp_path / "r" / "ends.json"
    run(tmp_path / "r", [])
    Ends(path).note(("r", "a"), 1)  # and then it was killed
    ends = Message(run="r", source="b", ends=True, expected=1)
    waits = ListSource([*messages_of(events), ends, b"never received"], "acknowledged")
    report = run(tmp_path / "r", waits, sources=2, workers=1)
    assert report.ended_by == "end of its sources" and report.balance["out"] == 2
    assert not path.exists()


def test_facts_of_a_start_go_to_the_events_of_its_run(tmp_path: Path) -> None:
    start = Message(run="r", source="s", starts=True, facts={"photon_energy_eV": 9500.0})
    other = replace(event(dark(1), 1), identity=Identity("other", "s", "x", 0))
    run(tmp_path / "r", [start, *messages_of([event(dark(0), 0), other])])
    assert [row["photon_energy_eV"] for row in rows_of(tmp_path / "r")] == [9500.0, None]


@pytest.mark.parametrize("total", [1, 5, 8])
def test_it_ends_after_as_many_events_as_asked(total: int, tmp_path: Path) -> None:
    report = run(tmp_path / "r", messages_of(make_events(20)), total_events=total)
    assert report.balance["out"] == report.balance["came"] == total
    assert (report.ended_by, report.held) == ("total_samples", True)


def test_consumers_get_every_result_in_order_with_its_mask() -> None:
    taken: list[Result] = []
    data = dark(0)
    data[0, 3, 4] = 9000
    report = run(None, messages_of([event(data, 0), event(dark(1), 1)]), consumers=[taken.append])
    assert report.held and [result.event.identity.sequence for result in taken] == [0, 1]
    assert taken[0].mask is not None and np.argwhere(taken[0].mask).tolist() == [[0, 3, 4]]
    assert taken[0].peaks.tolist() == [[0, 3, 4]] and taken[0].intensities.tolist() == [9000]


def test_a_consumer_that_fails_ends_the_run_and_nothing_is_told(tmp_path: Path) -> None:
    def fail(result: Result) -> None:
        raise ValueError("no more")

    source = ListSource(messages_of([event(dark(0), 0)]))
    with pytest.raises(ValueError, match="no more"):
        run(tmp_path / "r", source, consumers=[fail])
    assert source.told == [] and rows_of(tmp_path / "r") == []
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    assert not record["held"] and record["balance"]["leased"] == 1


def test_a_part_that_cannot_be_written_ends_the_run_and_is_not_acknowledged(tmp_path: Path) -> None:
    run(tmp_path / "r", messages_of([event(dark(0), 0)]))
    shutil.rmtree(tmp_path / "r" / "masks")
    (tmp_path / "r" / "masks").touch()  # a file, where the second part needs a folder
    hit = dark(1)
    hit[0, 3, 4] = 9000
    source = ListSource(messages_of([event(hit, 1)]))
    with pytest.raises(FileError, match="masks"):
        run(tmp_path / "r", source, patience_s=0.0)
    assert source.told == []
    assert [row["sequence"] for row in rows_of(tmp_path / "r")] == [0]
    assert list((tmp_path / "r" / "cxi").iterdir()) == []


def test_a_part_whose_folder_cannot_be_synced_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its table has its name by then; left alone it would count, without the images that it names."""
    hit = dark(1)
    hit[0, 3, 4] = 9000
    synced = files.fsync_path

    def fail(path: Path) -> None:
        if path.name == "events":
            raise OSError(errno.EIO, "broken", str(path))
        synced(path)

    monkeypatch.setattr(files, "fsync_path", fail)
    with pytest.raises(FileError, match="events"):
        run(tmp_path / "r", messages_of([event(hit, 1)]), patience_s=0.0)
    monkeypatch.undo()
    assert rows_of(tmp_path / "r") == []
    assert run(tmp_path / "r", messages_of([event(hit, 1)])).balance["out"] == 1
    ((row, image),) = images_of(tmp_path / "r", rows_of(tmp_path / "r"))
    assert row["sequence"] == 1 and np.array_equal(image, hit[0])


def test_files_of_a_part_without_its_table_are_from_a_run_that_was_killed(tmp_path: Path) -> None:
    data = dark(0)
    data[0, 3, 4] = 9000
    run(tmp_path / "r", messages_of([event(data, 0)]))
    (tmp_path / "r" / "events" / "000000.parquet").unlink()
    (tmp_path / "r" / "cxi" / ".peaks_000001.cxi.7.tmp").touch()
    report = run(tmp_path / "r", messages_of([event(data, 0)]))
    assert report.balance["out"] == 1
    assert [path.name for path in (tmp_path / "r" / "cxi").iterdir()] == ["peaks_000000.cxi"]


def test_a_folder_has_one_engine_and_holds_nothing_of_others(tmp_path: Path) -> None:
    class Waits(ListSource):
        def receive(self, timeout_s: float) -> Any:
            with pytest.raises(BusyError, match="being written by another process"):
                run(tmp_path / "r", [])
            return super().receive(timeout_s)

    assert run(tmp_path / "r", Waits(messages_of([event(dark(0))]))).held
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"thesis\.tex"):
        run(tmp_path / "other", [])


def test_when_all_must_go_on_the_oldest_are_dropped_by_name(tmp_path: Path) -> None:
    report = run(
        tmp_path / "r",
        messages_of(make_events(40)),
        batch_size=1,
        lanes=1,
        queue_bytes=1,
        drop_oldest=True,
        preparation=Preparation(size=(64, 64)),
        model=ModelSpec(str(tiny_weights(tmp_path / "w.pt"))),
    )
    balance = report.balance
    assert balance["came"] == 40 == balance["out"] + balance["dropped"] and balance["leased"] == 0
    assert balance["dropped"] > 0 and not report.held
    dropped = {letter["identity"]["event"] for letter in letters(tmp_path / "r")}
    assert len(dropped) == balance["dropped"]
    assert dropped | {row["event"] for row in rows_of(tmp_path / "r")} == {f"e{number}" for number in range(40)}
    with pytest.raises(InputError, match="sent again"):
        run(tmp_path / "s", ListSource([], "acknowledged"), drop_oldest=True)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("missing.pt", "missing.pt: no such file"),
        ("missing.pt2", "missing.pt2: no such file"),
        ("nowhere:function", "expected package.module:function"),
        ("tests.support.streaming:make_events", "expected a function without arguments"),
    ],
)
def test_a_network_that_cannot_be_had_is_an_error(model: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=told):
        run(tmp_path / "r", messages_of(make_events(3)), model=ModelSpec(model))
    assert rows_of(tmp_path / "r") == []
