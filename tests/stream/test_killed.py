"""kill -9 and SIGSTOP of the engine and of producers, at any point: nothing lost, doubled or mislabeled.

HALFSTEP_TRIALS says how often; ten times by default.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from tests.support.streaming import FORKED, images_of, make_events, rows_of, run_engine, run_producer, tiny_weights

TRIALS = int(os.environ.get("HALFSTEP_TRIALS", "10"))
COUNT = 120


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_weights(tmp_path_factory.mktemp("weights") / "w.pt")


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(TRIALS))
def test_whoever_is_killed_nothing_is_lost_doubled_or_mislabeled(trial: int, weights: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(trial)
    url, folder = f"ipc://{tmp_path}/socket", tmp_path / "run"
    names = ["a", "b"] if trial % 2 else ["a"]

    def engine() -> object:
        return FORKED.Process(target=run_engine, args=(folder, url, weights), kwargs={"sources": len(names)})

    def producer(name: str) -> object:
        return FORKED.Process(target=run_producer, args=(url, COUNT, f"run of {name}", name))

    makers = {"engine": engine, **{name: (lambda name=name: producer(name)) for name in names}}
    running = {name: make() for name, make in makers.items()}
    for process in running.values():
        process.start()
    for _ in range(int(rng.integers(1, 5))):
        _wait_for_parts(folder, int(rng.integers(0, 12 * len(names))), running["engine"])
        name = str(rng.choice(list(makers)))
        if not running[name].is_alive():
            continue
        if rng.random() < 0.3:
            with suppress(ProcessLookupError):  # it may have just ended
                os.kill(running[name].pid, signal.SIGSTOP)
                time.sleep(float(rng.random()))
                os.kill(running[name].pid, signal.SIGCONT)
            continue
        running[name].kill()
        running[name].join()
        running[name] = makers[name]()
        running[name].start()
    for name in names:
        while running[name].is_alive():
            running[name].join(0.1)
            if not running["engine"].is_alive():  # it had heard the end of one that was killed and began again
                assert running["engine"].exitcode == 0
                running["engine"] = engine()
                running["engine"].start()
        assert running[name].exitcode == 0
    if running["engine"].is_alive():  # a new one may not have heard the ends that an older one has heard
        os.kill(running["engine"].pid, signal.SIGTERM)
    running["engine"].join()
    assert running["engine"].exitcode in (0, -signal.SIGTERM)

    _is_whole(folder, names)


@pytest.mark.slow
def test_a_driver_of_ray_that_is_killed_goes_on_where_it_was(weights: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    url, folder = f"ipc://{tmp_path}/socket", tmp_path / "run"

    def engine() -> object:
        process = FORKED.Process(target=run_engine, args=(folder, url, weights), kwargs={"ray": True, "lanes": 2})
        process.start()
        return process

    running, producer = engine(), FORKED.Process(target=run_producer, args=(url, COUNT, "run of a", "a"))
    producer.start()
    _wait_for_parts(folder, 3, running)
    running.kill()
    running.join()
    assert 0 < len(rows_of(folder)) < COUNT
    running = engine()
    producer.join()
    running.join()
    assert (producer.exitcode, running.exitcode) == (0, 0)
    _is_whole(folder, ["a"])


def _is_whole(folder: Path, names: list[str]) -> None:
    """Each event of each source once, with its own image."""
    rows = rows_of(folder)
    identities = [(row["source"], row["sequence"], row["event"]) for row in rows]
    assert sorted(identities) == sorted((name, number, f"e{number}") for name in names for number in range(COUNT))
    expected = {event.identity.event: event.data for event in make_events(COUNT)}
    hits = 0
    for row, image in images_of(folder, rows):
        assert np.array_equal(image, expected[row["event"]].reshape(image.shape))
        hits += 1
    assert hits == sum(row["n_peaks"] > 0 for row in rows) > 0
    files = {path.name for path in (folder / "cxi").iterdir()}
    assert files == {Path(row["file"]).name for row in rows if row["file"] is not None}


def _wait_for_parts(folder: Path, parts: int, engine: object) -> None:
    """Until so many are there, or whoever makes them has ended."""
    while engine.is_alive() and len(list((folder / "events").glob("*.parquet"))) < parts:
        time.sleep(0.01)
