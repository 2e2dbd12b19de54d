"""Producers and engine over real sockets, in every format; damaged messages among the good ones."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
import zmq.auth

from halfstep.errors import HalfstepError, InputError
from halfstep.stream import ModelSpec, Outputs, StreamEngine, StreamOptions
from halfstep.stream.config import load_run
from halfstep.stream.events import Event, Identity, MessageError
from halfstep.stream.formats import FORMATS, Fields, npz
from halfstep.stream.protocol import State, pack_ask, pack_end, pack_event, pack_state, unpack, unpack_state
from halfstep.stream.send import SendReport, send
from halfstep.stream.sinks.cxi import CxiSettings
from halfstep.stream.sockets import Curve, Sockets
from halfstep.stream.sources.acknowledged import AcknowledgedSource
from halfstep.stream.sources.base import Source
from halfstep.stream.sources.pull import PullSource
from tests.support.cli import run_cli
from tests.support.streaming import images_of, make_events, rows_of, tiny_weights

LONG_S = 120.0
BRIGHT = ModelSpec("tests.support.streaming:bright")


def sending(*arguments: Any, **options: Any) -> Future[SendReport]:
    """`send` in a thread of its own."""
    done: Future[SendReport] = Future()

    def work() -> None:
        try:
            done.set_result(send(*arguments, **{"give_up_s": LONG_S, **options}))
        except HalfstepError as error:
            done.set_exception(error)

    threading.Thread(target=work).start()
    return done


def run(folder: Path, source: Source, **options: Any) -> Any:
    settings = StreamOptions(**{"model": BRIGHT, "precision": "fp32", "batch_size": 4, **options})
    with source:
        return StreamEngine(source, settings, Outputs(folder, CxiSettings(min_peaks=1))).run()


def hits(count: int, dtype: str = "uint16") -> Iterator[Event]:
    """`make_events`, each with a bright pixel."""
    for event in make_events(count, (2, 40, 50), dtype):
        event.data[1, 7, 9] = 60000
        yield event


@pytest.mark.parametrize("format", ["npz", "hdf5"])
def test_events_that_are_pushed_come_out_as_they_were(format: str, tmp_path: Path) -> None:
    source = PullSource(["tcp://127.0.0.1:*"], lambda message: FORMATS[format](message, Fields()), bind=True)
    sent = list(hits(30))
    done = sending(sent, source.urls[0], format=format)
    report = run(tmp_path / "r", source, total_events=30)
    assert done.result(LONG_S).sent == 30
    assert (report.guarantee, report.balance["out"], report.held) == ("unnumbered", 30, True)
    images = {row["timestamp"]: image for row, image in images_of(tmp_path / "r", rows_of(tmp_path / "r"))}
    assert len(images) == 30
    for event in sent:
        assert np.array_equal(images[event.facts["timestamp"]], event.data.reshape(80, 50))


def test_what_is_no_message_is_a_dead_letter(tmp_path: Path) -> None:
    source = PullSource(["tcp://127.0.0.1:*"], lambda message: FORMATS["npz"](message, Fields()), bind=True)
    first, second = hits(2)
    messages = [[b""], [npz.encode([first])], [b"nonsense"], [npz.encode([first])[:-30]], [b"two", b"parts"]]

    def push() -> None:
        sockets = Sockets()
        socket = sockets.open(zmq.PUSH, source.urls[0], bind=False)
        for parts in [*messages, [npz.encode([second])]]:
            socket.send_multipart(parts)
        sockets.close(LONG_S)

    thread = threading.Thread(target=push)
    thread.start()
    report = run(tmp_path / "r", source, total_events=2)
    thread.join()
    assert (report.balance["out"], report.balance["refused"], report.held) == (2, 4, False)
    letters = [json.loads(line) for line in (tmp_path / "r" / "dead_letters.jsonl").read_text().splitlines()]
    assert [letter["size"] for letter in letters] == [0, 8, len(messages[3][0]), 8]


def test_a_detector_says_when_it_ends(tmp_path: Path) -> None:
    source = PullSource(
        ["tcp://127.0.0.1:*"], lambda message: FORMATS["dectris"](message, Fields()), bind=True, numbered=True
    )
    done = sending(hits(12), source.urls[0], format="dectris", run="series 7")
    report = run(tmp_path / "r", source)
    assert done.result(LONG_S).sent == 12
    assert (report.ended_by, report.held, report.guarantee) == ("end of its sources", True, "numbered")
    assert [(row["run"], row["sequence"]) for row in rows_of(tmp_path / "r")] == [("series 7", n) for n in range(12)]


def test_damaged_events_come_again(tmp_path: Path) -> None:
    """A man in the middle flips bits, drops messages and sends some twice; all events come out once."""
    front, back = f"ipc://{tmp_path}/front", f"ipc://{tmp_path}/back"
    stop = threading.Event()

    def meddle() -> None:
        sockets, dice = Sockets(), random.Random(5)
        router, dealer = sockets.open(zmq.ROUTER, front, bind=True), sockets.open(zmq.DEALER, back, bind=False)
        names: list[bytes] = []
        while not stop.is_set():
            while router.poll(5):
                name, *parts = router.recv_multipart()
                names = [name]
                number = dice.randrange(8)
                if number == 0:
                    continue
                if number == 1:
                    victim = dice.randrange(len(parts))
                    flipped = bytearray(parts[victim] or b"x")
                    flipped[dice.randrange(len(flipped))] ^= 1 << dice.randrange(8)
                    parts[victim] = bytes(flipped)
                for _ in range(2 if number == 2 else 1):
                    dealer.send_multipart(parts)
            while dealer.poll(5):
                parts = dealer.recv_multipart()
                if names and dice.randrange(8):
                    router.send_multipart([names[0], *parts])
        sockets.close()

    source = AcknowledgedSource([back], bind=True, window=20)
    thread = threading.Thread(target=meddle)
    thread.start()
    done = sending(hits(60), front)
    done.add_done_callback(lambda _: stop.set())
    report = run(tmp_path / "r", source, part_events=10)
    stop.set()
    thread.join()
    rows = rows_of(tmp_path / "r")
    assert sorted(row["sequence"] for row in rows) == list(range(60))
    assert report.balance["out"] == 60
    assert report.balance["refused"] > 0  # the damaged ones are kept as dead letters


def test_a_producer_that_begins_again_under_its_name_is_known(tmp_path: Path) -> None:
    """With the run's name it goes on; without, its numbers are of another run."""
    url = f"ipc://{tmp_path}/s"
    for expected in (20, 0):
        done = sending(hits(20), url, run="monday")
        report = run(tmp_path / "r", AcknowledgedSource([url], bind=True, window=200))
        assert (report.balance["out"], report.held) == (expected, True)
        assert done.result(LONG_S).sent == 20
    done = sending(hits(5), url)
    assert run(tmp_path / "r", AcknowledgedSource([url], bind=True, window=200)).balance["out"] == 5
    assert done.result(LONG_S).sent == 5
    assert len(rows_of(tmp_path / "r")) == 25


def test_a_producer_hears_what_was_refused(tmp_path: Path) -> None:
    events = list(hits(6, "float32"))
    events[2].data[0, 0, 0] = np.nan
    url = f"ipc://{tmp_path}/s"
    done = sending(events, url)
    report = run(tmp_path / "r", AcknowledgedSource([url], bind=True, window=200))
    assert (report.balance["out"], report.balance["refused"], report.held) == (5, 1, False)
    sent = done.result(LONG_S)
    assert list(sent.refused) == [2] and "not finite" in sent.refused[2]


def test_an_event_that_no_engine_takes_is_refused_once(tmp_path: Path) -> None:
    """int64 is numpy's own type, but none of the wire's."""
    events = list(hits(4))
    events[1] = replace(events[1], data=events[1].data.astype(np.int64))
    events[2] = replace(events[2], identity=Identity("", "", "a\0b"))
    url = f"ipc://{tmp_path}/s"
    done = sending(events, url)
    report = run(tmp_path / "r", AcknowledgedSource([url], bind=True, window=200))
    assert (report.balance["out"], report.balance["refused"]) == (2, 2)
    assert sorted(done.result(LONG_S).refused) == [1, 2]


def test_messages_of_the_protocol_are_themselves_again_or_refused() -> None:
    dice = random.Random(3)
    event = Event(Identity("run", "ü", "e", 2**40), np.arange(24, dtype=">i4").reshape(2, 3, 4), {"timestamp": 1.5})
    state = State("r", "s", "engine", 200, [(0, 5)], [(6, 6)], [(7, "why")], True, 9)
    message = unpack(pack_event(event))
    assert np.array_equal(message.events[0].data, event.data)
    assert (message.events[0].identity, message.events[0].facts) == (event.identity, event.facts)
    assert unpack(pack_ask("r", "s", [(1, 2), (5, 9)])).asked == ((1, 2), (5, 9))
    assert (unpack(pack_end("r", "s", 12)).ends, unpack(pack_end("r", "s", 12)).expected) == (True, 12)
    assert unpack_state(pack_state(state)) == state
    asking = pack_ask("r", "s", [(1, 2)])
    for parts, read in ((pack_event(event), unpack), (asking, unpack), (pack_state(state), unpack_state)):
        whole = [bytes(part) for part in parts]
        for _ in range(200):
            damaged = [*whole]
            victim = dice.randrange(4)
            if damaged[victim] and dice.random() < 0.7:
                flipped = bytearray(damaged[victim])
                flipped[dice.randrange(len(flipped))] ^= 1 << dice.randrange(8)
                damaged[victim] = bytes(flipped)
            elif damaged[victim]:
                damaged[victim] = damaged[victim][: dice.randrange(len(damaged[victim]))]
            else:
                del damaged[victim]
            with pytest.raises(MessageError):
                read(damaged)


def test_a_port_that_is_taken_is_named_at_once() -> None:
    with PullSource(["tcp://127.0.0.1:*"], lambda message: FORMATS["npz"](message, Fields()), bind=True) as source:
        (url,) = source.urls
        with pytest.raises(InputError, match=f"{url}: is taken by another process"):
            AcknowledgedSource([url], bind=True, window=9)
        with pytest.raises(InputError, match="expected tcp://HOST:PORT"):
            Sockets().open(zmq.PULL, "http://x", bind=True)


def test_strangers_are_not_let_in_where_there_are_certificates(tmp_path: Path) -> None:
    for name in ("engine", "friend", "stranger"):
        zmq.auth.create_certificates(tmp_path, name)
    (tmp_path / "clients").mkdir()
    (tmp_path / "friend.key").rename(tmp_path / "clients" / "friend.key")
    url = f"ipc://{tmp_path}/s"
    ours = Curve(tmp_path / "engine.key_secret", clients=tmp_path / "clients")
    theirs = {n: Curve(tmp_path / f"{n}.key_secret", server=tmp_path / "engine.key") for n in ("friend", "stranger")}
    source = AcknowledgedSource([url], bind=True, window=200, curve=ours)
    refused = sending(hits(3), url, curve=theirs["stranger"], give_up_s=1.0)
    done = sending(hits(3), url, curve=theirs["friend"], source="friend")
    report = run(tmp_path / "r", source)
    assert done.result(LONG_S).sent == 3
    assert report.balance["came"] == 3
    with pytest.raises(Exception, match="nothing was heard of an engine"):
        refused.result(LONG_S)


CONFIG = """
model: {{weights_path: {weights}, warmup_iterations: 1}}
runtime: {{batch_size: 4, total_samples: 9, queue_num_shards: 8}}
data: {{shape: [1, 64, 64]}}
data_source:
  source_type: socket
  socket_addresses: [["somewhere", 12321]]
  fields: {{detector_data: detector_data, timestamp: timestamp, photon_wavelength: photon_wavelength}}
  parse_location: producer
precision: {{dtype: float32}}
output: {{output_dir: {folder}/plain, min_num_peak: 1}}
ray: {{namespace: peaknet-pipeline}}
"""
WRITER = """
queue: {{name: peaknet_q2, num_shards: 8}}
peak_finding: {{min_num_peak: 3, max_num_peak: 50, connectivity: 8}}
geometry: {{geom_file: null}}
output: {{output_dir: {folder}/written, file_prefix: mine, buffer_size: 4, create_output_dir: true}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    weights = tiny_weights(tmp_path / "w.pt")
    (tmp_path / "c.yaml").write_text(CONFIG.format(weights=weights, folder=tmp_path))
    (tmp_path / "w.yaml").write_text(WRITER.format(folder=tmp_path))
    return tmp_path / "c.yaml"


def test_the_published_yamls(config: Path, tmp_path: Path) -> None:
    loaded = load_run(config, writer=tmp_path / "w.yaml")
    assert loaded.outputs == Outputs(tmp_path / "written", CxiSettings(min_peaks=3, max_peaks=50), "mine")
    assert loaded.options.part_events == 4
    assert loaded.notes == [
        f"{config}: runtime.queue_num_shards, data_source.parse_location, ray.namespace: change nothing here; they can "
        "be left out",
        f"{tmp_path}/w.yaml: output.create_output_dir, queue.name, queue.num_shards: change nothing here; they can be "
        "left out",
    ]
    one = load_run(config, settings=("data_source.socket_addresses=null", "data_source.socket_hostname=h"))
    assert one.outputs.folder == tmp_path / "plain"
    for setting, told in {
        "runtime.batchsize=3": "runtime.batchsize: unknown key; did you mean 'batch_size'",
        "model.weights_path=null": "model.weights_path: is not given",
        "data.shape=[1,60,64]": "PeakNet needs multiples of 32",
        "precision.dtype=fp8": "precision: got 'fp8'",
    }.items():
        result = run_cli("stream", "--config", config, "--set", setting, "-o", tmp_path / "x", check=2)
        assert told in result.stderr.splitlines()[-1]


def test_the_command(config: Path, tmp_path: Path) -> None:
    """`stream --json` is run.json; `stream send` its producer."""
    url = f"ipc://{tmp_path}/s"
    settings = ["--set", f"data_source.url={url}", "--set", "data_source.serialization_format=halfstep"]
    settings += ["--set", "runtime.total_samples=null"]
    done: Future[Any] = Future()
    thread = threading.Thread(
        target=lambda: done.set_result(send(hits(9), url, give_up_s=LONG_S)),
    )
    thread.start()
    result = run_cli("stream", "--config", config, "-o", tmp_path / "out", *settings, "--json", "--metrics-port", 18931)
    thread.join()
    report = json.loads(result.stdout)
    assert report == json.loads((tmp_path / "out" / "run.json").read_text())
    assert (report["balance"]["out"], report["held"]) == (9, True)
    assert len(rows_of(tmp_path / "out")) == 9
