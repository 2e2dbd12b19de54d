"""The application of `halfstep live`, without a browser: who plays, what is refused, what is recorded."""

from __future__ import annotations

import io
import json
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import av
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient, WebSocketTestSession
from starlette.websockets import WebSocket, WebSocketDisconnect

from halfstep.live import LiveEngine
from halfstep.web.guard import Guard
from halfstep.web.live.app import LiveApp, _Viewer
from halfstep.web.live.stage import Stage, as_jpeg
from tests.live.worlds import CPU, HEIGHT, WIDTH, Corridor, Mirror

HEADERS = {"host": "127.0.0.1"}
FORWARD = {"act": {"forward": 1, "left": 0, "turn": 0}, "number": 1}


@contextmanager
def served(model: Any, source: str) -> Iterator[tuple[TestClient, LiveApp, Stage]]:
    engine = LiveEngine(model, CPU, steps=1)
    stage = Stage(engine, most_per_second=1000)
    app = LiveApp(stage, model.spec, title="a corridor", source=source)
    stage.start()
    try:
        with TestClient(Guard(app.asgi), base_url="http://127.0.0.1", headers=HEADERS) as client:
            yield client, app, stage
    finally:
        stage.end()


@pytest.fixture
def corridor() -> Iterator[tuple[TestClient, LiveApp, Stage]]:
    with served(Corridor(), "keys") as found:
        yield found


def frame(message: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
    data = message["bytes"]
    (length,) = struct.unpack(">H", data[:2])
    return json.loads(data[2 : 2 + length]), np.asarray(Image.open(io.BytesIO(data[2 + length :])))


def until(socket: WebSocketTestSession, wanted: Any, most: int = 500) -> Any:
    """The first frame's facts, or line, for which `wanted` holds."""
    for _ in range(most):
        message = socket.receive()
        if message["type"] == "websocket.close":
            raise WebSocketDisconnect(message["code"], message.get("reason"))
        found = frame(message)[0] if message.get("bytes") else json.loads(message["text"])
        if wanted(found):
            return found
    raise AssertionError("never came")


def test_a_player_walks_while_a_key_is_held(corridor: Any) -> None:
    client, _, stage = corridor
    with client.websocket_connect("/frames", headers=HEADERS) as socket:
        about = until(socket, lambda found: "world" in found)["world"]
        assert about["title"] == "a corridor" and about["source"] == "keys" and about["height"] == HEIGHT
        assert until(socket, lambda found: "role" in found) == {"role": "player", "watchers": 0}
        socket.send_text(json.dumps(FORWARD))
        assert until(socket, lambda found: found.get("number", 0) >= 3)["heard"] == 1
        socket.send_text(json.dumps({"act": {"forward": 0}, "number": 2}))
        facts = until(socket, lambda found: "facts" in found)["facts"]
        assert facts["frames"] >= 4 and facts["precision"] == "fp32" and facts["refused"] == 0
        before = stage.facts()["frames"]
        socket.send_text(json.dumps({"seed": 9}))
        assert until(socket, lambda found: found.get("seed") == 9)["number"] == 0
        assert stage.facts()["frames"] == before + 1  # nobody holds a key


def test_precision_steps_and_their_errors(corridor: Any) -> None:
    client, _, _ = corridor
    with client.websocket_connect("/frames", headers=HEADERS) as socket:
        socket.send_text(json.dumps({"precision": "bf16"}))
        assert until(socket, lambda found: "facts" in found and found["facts"]["precision"] == "bf16")
        socket.send_text(json.dumps(FORWARD))
        assert until(socket, lambda found: found.get("difference") is not None)["precision"] == "bf16"
        socket.send_text(json.dumps({"steps": 99}))
        assert until(socket, lambda found: "error" in found)["error"] == (
            "steps: got 99; the model makes a frame in 1 to 8"
        )
        socket.send_text(json.dumps({"precision": "int4"}))
        assert "int4" in until(socket, lambda found: "error" in found)["error"]


def test_one_plays_others_watch_and_the_next_one_plays_on(corridor: Any) -> None:
    client, _, stage = corridor
    with client.websocket_connect("/frames", headers=HEADERS) as second:
        assert until(second, lambda found: "role" in found)["role"] == "player"
        with client.websocket_connect("/frames", headers=HEADERS) as third:
            assert until(third, lambda found: "role" in found) == {"role": "watcher", "watchers": 1}
            third.send_text(json.dumps(FORWARD))  # does nothing
            third.send_text(json.dumps({"seed": 5}))
            until(third, lambda found: "facts" in found)
            assert stage.facts()["frames"] == 1 and stage.facts()["seed"] == 0
            second.send_text(json.dumps(FORWARD))
            assert until(third, lambda found: found.get("number") == 2)
            second.close()
            assert until(third, lambda found: found.get("role") == "player")
            third.send_text(json.dumps({"seed": 6}))
            assert until(third, lambda found: found.get("seed") == 6)


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("no json", 1007),
        ("[1, 2]", 1007),
        ('{"act": {"forward": 2}, "number": 1}', 1007),
        ('{"act": {"forward": NaN}, "number": 1}', 1007),
        ('{"act": {"up": 1}, "number": 1}', 1007),
        ('{"act": {"forward": true}, "number": 1}', 1007),
        ('{"act": {"forward": 0}, "number": true}', 1007),
        ('{"act": {"forward": 0}, "number": %s}' % ("9" * 400), 1007),
        ('{"seed": -1}', 1007),
        ('{"seed": true}', 1007),
        ('{"steps": true}', 1007),
        ("[" * 1000, 1007),
        ('{"unknown": 1}', 1007),
        ("{" + " " * 2000 + "}", 1009),
        (b"\xff\xd8 a picture", 1003),
    ],
)
def test_messages_that_are_none_close_and_are_counted(corridor: Any, message: str | bytes, code: int) -> None:
    client, app, _ = corridor
    with client.websocket_connect("/frames", headers=HEADERS) as socket:
        if isinstance(message, bytes):
            socket.send_bytes(message)
        else:
            socket.send_text(message)
        with pytest.raises(WebSocketDisconnect) as closed:
            until(socket, lambda found: False)
        assert closed.value.code == code
    assert app.refused == 1
    with client.websocket_connect("/frames", headers=HEADERS) as socket:  # and may come back
        assert until(socket, lambda found: "role" in found)["role"] == "player"


@pytest.mark.parametrize("headers", [{**HEADERS, "origin": "https://evil.example"}, {"host": "evil.example"}])
def test_foreign_pages_get_nothing(corridor: Any, headers: dict[str, str]) -> None:
    client, _, _ = corridor
    assert client.get("/", headers=headers).status_code == 403
    assert client.get("/recording.mp4", headers=headers).status_code == 403
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/frames", headers=headers):
        pass


def test_the_page_and_its_parts(corridor: Any) -> None:
    client, _, _ = corridor
    page = client.get("/")
    assert (
        page.status_code == 200 and "halfstep live" in page.text and "http" not in page.text.replace("http-equiv", "")
    )
    for name in ("base.css", "icon.svg", "live/live.css", "live/live.js"):
        assert client.get(f"/assets/{name}").status_code == 200
    assert client.get("/assets/../guard.py").status_code == 404
    assert client.get(f"/assets/{'a' * 300}.css").status_code == 404
    assert client.get("/recording.mp4").status_code == 404


def test_what_was_shown_is_a_film(corridor: Any) -> None:
    client, _, _ = corridor
    with client.websocket_connect("/frames", headers=HEADERS) as socket:
        socket.send_text(json.dumps({"record": True}))
        assert until(socket, lambda found: "facts" in found and found["facts"]["recorded"]["on"])
        socket.send_text(json.dumps(FORWARD))
        until(socket, lambda found: found.get("number", 0) >= 5)
        socket.send_text(json.dumps({"record": False}))
        facts = until(socket, lambda found: "facts" in found and not found["facts"]["recorded"]["on"])["facts"]
    film = client.get("/recording.mp4")
    assert film.headers["content-type"] == "video/mp4"
    with av.open(io.BytesIO(film.content)) as container:
        shown = [picture.to_ndarray(format="rgb24") for picture in container.decode(video=0)]
    assert len(shown) == facts["recorded"]["frames"] >= 6
    assert shown[0].shape == (HEIGHT, WIDTH, 3)
    assert shown[-1].mean() > shown[0].mean() + 20  # it got brighter on the way


def test_pictures_of_a_camera_of_any_size_are_fitted() -> None:
    with (
        served(Mirror(), "camera") as (client, app, stage),
        client.websocket_connect("/frames", headers=HEADERS) as socket,
    ):
        picture = np.zeros((48, 96, 3), np.uint8)
        picture[:, 48:] = 200
        socket.send_bytes(as_jpeg(picture))
        while True:
            message = socket.receive()
            if message.get("bytes") and frame(message)[0]["number"] == 1:
                break
        shown = frame(message)[1]
        assert shown[:, : WIDTH // 2 - 1].mean() > 150 and shown[:, WIDTH // 2 + 1 :].mean() < 50
        socket.send_bytes(b"not a jpeg")
        with pytest.raises(WebSocketDisconnect) as closed:
            until(socket, lambda found: False)
        assert closed.value.code == 1007 and app.refused == 1
    assert stage.facts()["dropped"] == 0


@pytest.mark.parametrize("side", [5000, 30000])
def test_a_few_bytes_that_claim_a_huge_picture_are_not_unfolded(side: int) -> None:
    picture = bytearray(as_jpeg(np.zeros((HEIGHT, WIDTH, 3), np.uint8)))
    size = picture.index(b"\xff\xc0") + 5
    picture[size : size + 4] = struct.pack(">HH", side, side)
    with (
        served(Mirror(), "camera") as (client, app, _),
        client.websocket_connect("/frames", headers=HEADERS) as socket,
    ):
        socket.send_bytes(bytes(picture))
        with pytest.raises(WebSocketDisconnect) as closed:
            until(socket, lambda found: False)
        assert closed.value.code == 1007 and app.refused == 1


def test_wishes_do_not_pile_up(corridor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client, _, stage = corridor
    ask, asked, most, busy = stage.ask, [], [], threading.Event()

    def counted(call: Any) -> Any:
        asked.append(ask(call))
        most.append(sum(not future.done() for future in asked))
        return asked[-1]

    def wait() -> None:
        busy.wait(30)

    with client.websocket_connect("/frames", headers=HEADERS) as socket:
        ask(lambda _: wait())  # as a frame that takes long
        monkeypatch.setattr(stage, "ask", counted)
        for _ in range(20):
            socket.send_text(json.dumps({"steps": 2}))
        socket.send_text(json.dumps({"seed": 5}))
        time.sleep(0.3)
        busy.set()
        assert until(socket, lambda found: found.get("seed") == 5)
    assert max(most) == 1 and len(most) == 21


def test_who_does_not_read_is_kept_the_newest_of_each_kind() -> None:
    viewer = _Viewer(cast(WebSocket, None))
    for number in range(1000):
        viewer.tell(facts={"frames": number})
        viewer.tell(role="watcher", watchers=number)
    assert list(viewer.lines.values()) == [{"facts": {"frames": 999}}, {"role": "watcher", "watchers": 999}]
