"""Small streamed runs: a tiny network, events, an engine in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import torch

from halfstep.models import PeakNet
from halfstep.stream import Event, Identity, ModelSpec, Outputs, StreamEngine, StreamOptions
from halfstep.stream.events import Message, MessageError
from halfstep.stream.send import send
from halfstep.stream.sinks.cxi import CxiSettings
from halfstep.stream.sinks.events import read_events
from halfstep.stream.sources.acknowledged import AcknowledgedSource
from halfstep.stream.sources.base import Incoming, Source

SIZES = {
    "backbone_hidden_sizes": [8, 12, 16, 24],
    "backbone_depths": [1, 1, 1, 1],
    "bifpn_num_blocks": 1,
    "bifpn_num_features": 16,
    "seg_out_channels": 32,
}


def tiny_weights(path: Path) -> Path:
    """Of a PeakNet that finds something or other."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(PeakNet(**SIZES).state_dict(), path)
    return path


def make_events(count: int, shape: tuple[int, int, int] = (1, 32, 32), dtype: str = "uint16") -> Iterator[Event]:
    """Each other than all others; the first pixel tells its number, the second its panel."""
    for number in range(count):
        data = np.random.default_rng(number).integers(0, 1000, shape).astype(dtype)
        data[:, 0, 0] = number % 65536 if dtype != "uint8" else number % 256
        data[:, 0, 1] = np.arange(shape[0])
        yield Event(Identity("", "", f"e{number}"), data, {"timestamp": number / 120})


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """All rows of a run's tables of events, in the order of its parts."""
    tables = [read_events(path) for path in sorted((folder / "events").glob("*.parquet"))]
    return pa.concat_tables(tables).to_pylist() if tables else []


FORKED = multiprocessing.get_context("forkserver")  # children begin with what takes long to import
FORKED.set_forkserver_preload(["tests.support.streaming", "halfstep.stream.engine", "halfstep.stream.send"])


def run_engine(folder: Path, url: str, weights: Path, **options: Any) -> None:
    """An engine of the acknowledged protocol, to its end; to be run in a process of its own."""
    torch.set_num_threads(1)
    settings: dict[str, Any] = {"precision": "fp32", "batch_size": 4, "part_events": 10, "lanes": 1, **options}
    part_events = settings["part_events"]
    with AcknowledgedSource([url], bind=True, window=2 * part_events) as source:
        outputs = Outputs(folder, CxiSettings(min_peaks=1))
        report = StreamEngine(source, StreamOptions(ModelSpec(str(weights)), **settings), outputs).run()
    sys.exit(0 if report.held else 1)


def run_producer(url: str, count: int, run: str, source: str = "sender") -> None:
    """Sends `make_events(count)`, until all are acknowledged; to be run in a process of its own."""
    send(make_events(count), url, run=run, source=source, give_up_s=300)


def images_of(folder: Path, rows: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Rows that have an image in a CXI file, with it: [panels * H, W]."""
    for row in rows:
        if row["file"] is not None:
            with h5py.File(folder / row["file"]) as file:
                yield row, file["/entry_1/data_1/data"][row["row"]]


def bright() -> torch.nn.Module:
    """A network whose peaks are known: pixels more than five deviations above the mean."""
    network = torch.nn.Conv2d(1, 1, 1)
    with torch.no_grad():
        network.weight.fill_(1.0)
        network.bias.fill_(-5.0)
    return network


class Fragile(torch.nn.Module):
    """The same, but fp16 overflows where a pixel is more than fifteen deviations above the mean; where one is more than
    twenty below it, fp32 does too."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(4096.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gain / self.gain - 5.0 + torch.where(x < -20, torch.inf, 0.0).to(x.dtype)


def fragile() -> torch.nn.Module:
    return Fragile()


class ListSource(Source):
    """Messages from memory; `told` keeps what a producer would be told."""

    def __init__(self, messages: Iterable[Message | bytes], guarantee: str = "unnumbered") -> None:
        self.guarantee = guarantee  # type: ignore[assignment]
        self._messages = list(messages)
        self.exhausted = not self._messages
        self.told: list[tuple[str, object]] = []

    def receive(self, timeout_s: float) -> Incoming:
        content = self._messages.pop(0)
        self.exhausted = not self._messages

        def load() -> Message:
            if isinstance(content, bytes):
                raise MessageError(f"message: {content!r}")
            return content

        size = 1 if isinstance(content, bytes) else sum(event.data.nbytes for event in content.events)
        return Incoming(size, load, content if isinstance(content, bytes) else b"", "memory")

    def committed(self, identities: Sequence[Identity]) -> None:
        self.told += [("committed", identity) for identity in identities]

    def refused(self, identity: Identity, reason: str) -> None:
        self.told.append(("refused", identity))


def messages_of(events: Iterable[Event]) -> list[Message]:
    return [Message((event,)) for event in events]


class Deadly(torch.nn.Module):
    """`bright`, but a pixel more than thirty deviations up ends the process."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.tensor(-5.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool((x > 30).any()):
            os._exit(1)
        return x + self.bias


def deadly() -> torch.nn.Module:
    return Deadly()
