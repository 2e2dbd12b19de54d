"""An hour in which no frame comes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

from halfstep.stream import Event, ModelSpec, Outputs, StreamEngine, StreamOptions
from halfstep.stream.send import send
from halfstep.stream.sinks.cxi import CxiSettings
from halfstep.stream.sources.acknowledged import AcknowledgedSource
from halfstep.stream.sources.base import Incoming
from tests.support.streaming import make_events, rows_of, tiny_weights

HOUR_S = 3600.0
BEFORE, COUNT = 30, 60


class Hurried(AcknowledgedSource):
    """Once `BEFORE` events have come it waits a thousandth of the time that it is told to, until an hour is over by the
    clock of the engine; then it lets the producer go on."""

    def __init__(self, url: str, go_on: threading.Event) -> None:
        super().__init__([url], bind=True, window=20)
        self._go_on, self._received, self._idle_s = go_on, 0, 0.0
        self.resident_kb: list[int] = []

    def receive(self, timeout_s: float) -> Incoming | None:
        idle = self._received >= BEFORE and self._idle_s < HOUR_S
        incoming = super().receive(timeout_s / 1000 if idle else timeout_s)
        if incoming is not None:
            self._received += 1
        elif idle:
            if int(self._idle_s / 60) != int((self._idle_s + timeout_s) / 60):
                self.resident_kb.append(resident_kb())
            self._idle_s += timeout_s
            if self._idle_s >= HOUR_S:
                self._go_on.set()
        return incoming


def resident_kb() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))


def test_an_idle_hour_takes_no_memory_and_ends_nothing(tmp_path: Path) -> None:
    go_on = threading.Event()
    url = f"ipc://{tmp_path}/socket"

    def events() -> Iterator[Event]:
        for number, event in enumerate(make_events(COUNT)):
            if number == BEFORE:
                go_on.wait()
            yield event

    producer = threading.Thread(target=send, args=(events(), url), kwargs={"run": "r", "source": "s"})
    weights = tiny_weights(tmp_path / "w.pt")
    with Hurried(url, go_on) as source:
        producer.start()
        options = StreamOptions(ModelSpec(str(weights)), precision="fp32", batch_size=4, part_events=10, lanes=1)
        report = StreamEngine(source, options, Outputs(tmp_path / "run", CxiSettings(min_peaks=1))).run()
        producer.join()
    assert report.held
    assert len(rows_of(tmp_path / "run")) == COUNT
    minutes = source.resident_kb
    assert len(minutes) == 60
    assert max(minutes) <= 1.05 * minutes[0]
