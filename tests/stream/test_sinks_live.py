"""Live consumers: a real PULL, and a real REQ client that reads as indexamajig does. Sockets wait; nothing sleeps."""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq
import zmq.auth

from halfstep.errors import InputError
from halfstep.stream.events import Fact, Identity, Result
from halfstep.stream.sinks import live
from halfstep.stream.sinks.live import ConsumerError, CrystfelResponder, Pusher
from halfstep.stream.sockets import Curve
from tests.stream.test_sinks import DTYPES, result

ANY_PORT = "tcp://127.0.0.1:*"
PATIENCE_MS = 60_000


@pytest.fixture
def connected() -> Iterator[Callable[..., zmq.Socket[bytes]]]:
    """Makes sockets that wait for a minute at most, and for nothing at their end."""
    context = zmq.Context()

    def made(kind: int, url: str, **options: Any) -> zmq.Socket[bytes]:
        socket = context.socket(kind)
        for name, value in {"LINGER": 0, "RCVTIMEO": PATIENCE_MS, "SNDTIMEO": PATIENCE_MS, **options}.items():
            setattr(socket, name.lower(), value)
        socket.connect(url)
        return socket

    yield made
    context.destroy(linger=0)


def ends(work: Callable[[], object]) -> bool:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(PATIENCE_MS / 1000)
    return not thread.is_alive()


def array(said: Mapping[str, Any]) -> np.ndarray[Any, np.dtype[Any]]:
    return np.frombuffer(said["data"], said["type"]).reshape(said["shape"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_consumer_gets_all_of_each_result(connected: Callable[..., zmq.Socket[bytes]], dtype: str) -> None:
    facts: Mapping[str, Fact] = {
        "timestamp": (1 << 64) - 1,
        "photon_energy_eV": 9500.5,
        "note": "é\ud800",
        "big": 1 << 70,
    }
    identity = Identity("run", "été", "e" * 9999, (1 << 63) - 1)
    sent = [result(1, dtype=dtype, facts=facts, identity=identity), result(2, 0, dtype=dtype)]
    with Pusher(ANY_PORT) as pusher:
        consumer = connected(zmq.PULL, pusher.url)
        pusher.send([*sent, Result(sent[1].event, sent[1].peaks, sent[1].intensities)])
        got = [msgpack.unpackb(consumer.recv()) for _ in range(3)]
    for said, one in zip(got, sent, strict=False):
        assert Identity(*(said[name] for name in Identity._fields)) == one.event.identity
        for name, values in (("data", one.event.data), ("peaks", one.peaks), ("intensities", one.intensities)):
            assert array(said[name]).dtype == values.dtype
            assert array(said[name]).tobytes() == values.tobytes()
        np.testing.assert_array_equal(array(said["mask"]), one.mask)
    assert got[0]["facts"] == {**facts, "note": "é\\ud800", "big": str(1 << 70)}
    assert (got[2]["version"], got[2]["mask"]) == (1, None)


def test_a_pusher_connects_too(connected: Callable[..., zmq.Socket[bytes]]) -> None:
    with zmq.Context() as context, context.socket(zmq.PULL) as consumer:
        consumer.rcvtimeo = PATIENCE_MS
        port = consumer.bind_to_random_port("tcp://127.0.0.1")
        with Pusher(f"tcp://127.0.0.1:{port}", bind=False) as pusher:
            pusher.send([result(7)])
        assert msgpack.unpackb(consumer.recv())["event"] == "7"


def test_only_who_has_the_keys_is_sent_to(connected: Callable[..., zmq.Socket[bytes]], tmp_path: Path) -> None:
    (tmp_path / "clients").mkdir()
    zmq.auth.create_certificates(tmp_path, "engine")
    zmq.auth.create_certificates(tmp_path / "clients", "consumer")
    public, secret = zmq.auth.load_certificate(tmp_path / "clients" / "consumer.key_secret")
    server, _ = zmq.auth.load_certificate(tmp_path / "engine.key")
    ours = Curve(tmp_path / "engine.key_secret", clients=tmp_path / "clients")
    with Pusher(ANY_PORT, curve=ours, timeout_s=0.2) as pusher:
        connected(zmq.PULL, pusher.url)
        with pytest.raises(ConsumerError):
            pusher.send([result()])
        keys = {"CURVE_PUBLICKEY": public, "CURVE_SECRETKEY": secret, "CURVE_SERVERKEY": server}
        consumer = connected(zmq.PULL, pusher.url, **keys)
        pusher._socket.sndtimeo = PATIENCE_MS
        pusher.send([result(3)])
        assert msgpack.unpackb(consumer.recv())["event"] == "3"
    with pytest.raises(InputError, match=r"curve\.server: is not given"):
        Pusher("tcp://127.0.0.1:9", bind=False, curve=ours)
    with pytest.raises(InputError, match="is no ZeroMQ certificate"):
        Pusher(ANY_PORT, curve=Curve(tmp_path / "none.key_secret"))


@pytest.mark.parametrize("bind", [True, False])
def test_what_nobody_takes_is_an_error(bind: bool) -> None:
    with Pusher(ANY_PORT if bind else "tcp://127.0.0.1:9", bind, timeout_s=0.05) as pusher:
        with pytest.raises(ConsumerError, match=r"nobody took a result within 0\.05 s, after 0 of 2; start a consumer"):
            pusher.send([result(), result()])
        pusher.send([])


def test_a_consumer_that_stands_still_holds_nobody_for_ever(connected: Callable[..., zmq.Socket[bytes]]) -> None:
    """Its queue and ours fill up, then sending fails; the end does not wait for it."""
    pusher = Pusher(ANY_PORT, timeout_s=0.2)
    connected(zmq.PULL, pusher.url, RCVHWM=1)
    large = result(0, shape=(1, 1000, 1000), dtype="float64")
    with pytest.raises(ConsumerError, match="of 100; start a consumer, or a faster one"):
        pusher.send([large] * 100)
    assert ends(pusher.close)


@pytest.mark.parametrize("kind", [Pusher, CrystfelResponder])
def test_an_address_that_cannot_be_bound(kind: Any) -> None:
    with kind(ANY_PORT) as first, pytest.raises(InputError, match=f"^{first.url}: is taken by another process"):
        kind(first.url)
    with kind(first.url):  # free again at once
        pass
    for bad in ("tcp://127.0.0.1", "carrier://pigeon", "tcp://192.0.2.1:5010"):
        with pytest.raises(InputError, match=f"^{bad}: cannot .*; expected tcp://HOST:PORT"):
            kind(bad)


def find(content: Mapping[str, Any], key: str) -> Any:
    """`find_msgpack_kv`: the first value whose key the wanted one begins with."""
    return next((value for name, value in content.items() if key.startswith(name)), None)


def as_doubles(packed: bytes) -> list[float]:
    """An array of floats as C reads it, who takes the bytes for a double without asking: each must be one."""
    assert packed[0] == 0xDC  # array 16
    (count,) = struct.unpack_from(">H", packed, 1)
    assert packed[3::9] == b"\xcb" * count  # float 64
    return [struct.unpack_from(">d", packed, 4 + 9 * n)[0] for n in range(count)]


@pytest.mark.parametrize("dtype", [*DTYPES, "bool"])
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_indexamajig_reads_the_answer(connected: Callable[..., zmq.Socket[bytes]], dtype: str) -> None:
    facts: Mapping[str, Fact] = {"photon_energy_eV": 9000, "detector_distance": 0.25, "peak": 1, "": 2, "run_no": 3}
    hit = result(4, 20, (3, 6, 8), "uint8" if dtype == "bool" else dtype, facts)
    if dtype == "bool":
        hit = result(4, 20, (3, 6, 8), facts=facts, data=hit.event.data % 2 > 0)
    whole = np.max(hit.peaks[:, 1:], axis=1) < 3
    hit = Result(hit.event, np.where(whole[:, None], np.floor(hit.peaks), hit.peaks), np.floor(10 * hit.intensities))
    with CrystfelResponder(ANY_PORT) as responder:
        client = connected(zmq.REQ, responder.url)
        client.send(b"next")
        responder.offer(hit)
        message = client.recv()
    assert (responder.taken, responder.dropped) == (1, 0)
    assert len(message) > 15  # else it is taken for nothing
    content = msgpack.unpackb(message)
    data = find(content, "detector_data")
    small = ("bool", "uint8", "int8", "uint16", "int16", "int32", ">u2", ">i4")  # int32 has all of their values
    assert find(data, "type") == ("<i4" if dtype in small else "<f4")
    assert find(data, "shape") == [18, 8]
    np.testing.assert_array_equal(
        array({name: find(data, name) for name in ("type", "shape", "data")}).astype(np.float32),
        hit.event.data.reshape(18, 8).astype(np.float32),
    )
    peaks = find(content, "peak_list")
    slab_y = hit.peaks[:, 1] + 6 * hit.peaks[:, 0]
    for name, values in (("fs", hit.peaks[:, 2]), ("ss", slab_y), ("intensity", hit.intensities)):
        assert as_doubles(msgpack.packb(find(peaks, name))) == pytest.approx(values.tolist(), abs=1e-5)
        assert msgpack.packb(find(peaks, name)) in message
    assert find(content, "photon_energy_eV") == 9000
    assert find(content, "detector_distance") == 0.25
    assert [find(content, name) for name in ("run", "source", "event", "sequence")] == ["run", "source", "4", 4]
    names = list(content)
    assert not [(a, b) for a in names for b in names if a != b and b.startswith(a)]


def test_a_photon_energy_that_is_not_known(connected: Callable[..., zmq.Socket[bytes]]) -> None:
    with CrystfelResponder(ANY_PORT) as responder:
        client = connected(zmq.REQ, responder.url)
        responder.offer(result(1, 12))
        client.send(b"next")
        assert math.isnan(msgpack.unpackb(client.recv())["photon_energy_eV"])


def test_with_nothing_there_each_client_is_told_before_it_gives_up(
    connected: Callable[..., zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them, not one after the other, and they may ask again."""
    assert live._ANSWER_WITHIN_S < 3
    monkeypatch.setattr(live, "_ANSWER_WITHIN_S", 0.05)
    with CrystfelResponder(ANY_PORT) as responder:
        clients = [connected(zmq.REQ, responder.url) for _ in range(8)]
        for _ in range(2):
            for client in clients:
                client.send(b"next")
            assert [len(client.recv()) <= 15 for client in clients] == [True] * 8
        monkeypatch.setattr(live, "_ANSWER_WITHIN_S", 60)
        for client in clients:
            client.send(b"next")
        for number in range(8):
            responder.offer(result(number, 12))
        got = {msgpack.unpackb(client.recv())["event"] for client in clients}
        assert got == {str(number) for number in range(8)}
    assert (responder.taken, responder.dropped) == (8, 0)


def test_the_oldest_makes_room_and_is_counted(connected: Callable[..., zmq.Socket[bytes]]) -> None:
    with CrystfelResponder(ANY_PORT, capacity=3) as responder:
        for number in range(20):
            responder.offer(result(number, 12))
        assert (responder.taken, responder.dropped) == (0, 17)
        client = connected(zmq.REQ, responder.url)
        got = []
        for _ in range(2):
            client.send(b"next")
            got.append(msgpack.unpackb(client.recv())["event"])
    assert got == ["17", "18"]
    assert (responder.taken, responder.dropped) == (2, 18)  # what is left at the end was not taken either


def test_a_client_that_has_gone_does_not_stop_the_others(connected: Callable[..., zmq.Socket[bytes]]) -> None:
    with CrystfelResponder(ANY_PORT, capacity=1) as responder:
        for _ in range(5):
            gone = connected(zmq.REQ, responder.url)
            gone.send(b"next")
            gone.close()
        connected(zmq.DEALER, responder.url).send(b"x" * 10_000)  # no request: it is cut off
        client = connected(zmq.REQ, responder.url)
        client.send(b"next")
        offered = 0
        while not client.poll(10):
            responder.offer(result(offered, 12))
            offered += 1
            assert offered < 1000
        assert client.recv()
    assert responder.taken + responder.dropped == offered
    assert responder.taken >= 1


def test_the_end_waits_for_nobody(connected: Callable[..., zmq.Socket[bytes]]) -> None:
    responder = CrystfelResponder(ANY_PORT)
    connected(zmq.REQ, responder.url).send(b"next")
    assert ends(responder.close)
    assert ends(responder.close)
    with pytest.raises(ConsumerError, match="no longer answers"):
        responder.offer(result())
