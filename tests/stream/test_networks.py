"""Any network: exported, scripted, in actors on Ray that die."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from halfstep.engine import Lanes, RemoteError, remote_functions
from halfstep.engine.remote import cluster
from halfstep.stream import ModelSpec, Outputs, StreamEngine, StreamOptions
from halfstep.stream.sinks.cxi import CxiSettings
from tests.support.streaming import ListSource, bright, make_events, messages_of, rows_of


def run(folder: Path, model: str, events: list, **options: object) -> object:
    settings = StreamOptions(**{"model": ModelSpec(model), "precision": "fp32", "batch_size": 4, **options})
    source = ListSource(messages_of(events))
    return StreamEngine(source, settings, Outputs(folder, CxiSettings(min_peaks=1))).run()


def planted(count: int) -> list:
    """A bright pixel in each, whose place tells the number."""
    events = list(make_events(count, (1, 64, 64)))
    for number, event in enumerate(events):
        event.data[0] = np.random.default_rng(number).integers(90, 110, (64, 64))
        event.data[0, number % 64, 5] = 230
    return events


def places(folder: Path) -> list[list[float]]:
    return [row["peak_y"] for row in rows_of(folder)]


@pytest.mark.parametrize("policy", ["fp32", "bf16-true"])
@pytest.mark.parametrize("kind", ["pt2", "ts"])
def test_networks_out_of_files(kind: str, policy: str, tmp_path: Path) -> None:
    path = tmp_path / f"network.{kind}"
    x = torch.zeros(4, 1, 64, 64)
    if kind == "pt2":
        torch.export.save(torch.export.export(bright(), (x,)), path)
    else:
        torch.jit.trace(bright(), x).save(str(path))
    report = run(tmp_path / "r", str(path), planted(6), precision=policy)
    assert report.held and report.policy == policy
    assert places(tmp_path / "r") == [[float(number)] for number in range(6)]


class Counting:
    """In an actor: items to numbers; a negative one ends its process."""

    def __call__(self, item: int) -> tuple[int, int]:
        if item < 0:
            os._exit(1)
        return item, os.getpid()


@pytest.mark.slow
def test_actors_that_die_begin_again_and_an_item_that_kills_them_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray")
    with cluster():
        with remote_functions(Counting(), 2, gpus=False) as functions, Lanes.open(functions, "actor") as lanes:
            first = [lanes.submit(item).result() for item in range(4)]
            os.kill(first[0][1], signal.SIGKILL)
            futures = [lanes.submit(item) for item in range(20)]
            assert [future.result()[0] for future in futures] == list(range(20))
            with pytest.raises(RemoteError, match="died 3 times on the same item"):
                lanes.submit(-1).result()
            assert lanes.submit(7).result()[0] == 7
        events = planted(9)
        events[4].data[0, 9, 9] = 60000
        report = run(tmp_path / "r", "tests.support.streaming:deadly", events, ray=True, lanes=2)
    assert (report.balance["out"], report.balance["refused"]) == (8, 1)
    assert places(tmp_path / "r") == [[float(number)] for number in range(9) if number != 4]
    assert '"e4"' in (tmp_path / "r" / "dead_letters.jsonl").read_text()
    assert capfd.readouterr().out == ""  # what Ray says of it stands not amid what a command prints
