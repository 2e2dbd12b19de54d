"""Who may ask, and what pages may load."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.responses import PlainTextResponse
from starlette.routing import Route, Router, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from halfstep.errors import InputError, StoreError
from halfstep.web.guard import Guard, Refusal, names_of

HERE = "http://127.0.0.1:8010"
SOCKETS = "ws://127.0.0.1:8010"
ERRORS = {
    "input": (InputError("a line"), 400),
    "store": (StoreError("a line\nand another"), 500),
    "there": (Refusal("not there", 404), 404),
    "odd": (KeyError("x"), 500),
}


async def echo(socket: WebSocket) -> None:
    await socket.accept()
    await socket.send_text(await socket.receive_text())
    await socket.close()


async def broken(socket: WebSocket) -> None:
    await socket.accept()
    raise InputError("no such world")


def fail(request: Any) -> PlainTextResponse:
    raise ERRORS[request.path_params["name"]][0]


APP = Router(
    [
        Route("/", lambda _: PlainTextResponse("hello"), methods=["GET", "POST"], name="hello"),
        Route("/own", lambda _: PlainTextResponse("", headers={"content-security-policy": "mine"}), name="own"),
        Route("/fail/{name}", fail),
        WebSocketRoute("/echo", echo),
        WebSocketRoute("/broken", broken),
    ]
)


def client(names: frozenset[str] | None = names_of("127.0.0.1"), base: str = HERE) -> TestClient:
    return TestClient(Guard(APP, names), base_url=base, raise_server_exceptions=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8010", "localhost:9000", "LOCALHOST", "[::1]:8010"])
def test_the_names_of_this_machine_are_answered(host: str) -> None:
    assert client().get("/", headers={"host": host}).text == "hello"


FOREIGN_HOSTS = """
evil.example 127.0.0.1.evil.example evil.example:8010 10.0.0.1 a@127.0.0.1 127.0.0.1:x [::1 127.0.0.1/x localhost.
127.0.0.1#
"""
FOREIGN_PAGES = """
https://evil.example null http://127.0.0.1:3000 http://localhost:8010 127.0.0.1:8010 file:// ftp://127.0.0.1:8010
http://127.0.0.1:8010.evil.example
"""


@pytest.mark.parametrize("host", ["", *FOREIGN_HOSTS.split()])
def test_any_other_host_is_refused(host: str) -> None:
    answer = client().get("/", headers={"host": host})
    assert answer.status_code == 403
    assert answer.text.startswith("Host: got ")
    with pytest.raises(WebSocketDisconnect), client().websocket_connect(f"{SOCKETS}/echo", headers={"host": host}):
        pass


def test_an_address_that_is_shared_is_asked_by_addresses_not_by_foreign_names() -> None:
    shared = client(names_of("0.0.0.0"))
    assert shared.get("/", headers={"host": "10.1.2.3:80"}).status_code == 200
    assert shared.get("/", headers={"host": "evil.example"}).status_code == 403
    named = client(names_of("lab.example"))
    assert named.get("/", headers={"host": "lab.example:80"}).status_code == 200
    assert named.get("/", headers={"host": "evil.example:80"}).status_code == 403


@pytest.mark.parametrize("origin", ["", *FOREIGN_PAGES.split()])
def test_a_foreign_page_is_refused(origin: str) -> None:
    for method in ("GET", "POST"):
        answer = client().request(method, "/", headers={"origin": origin})
        assert answer.status_code == 403
        assert answer.text.startswith("Origin: got ")
    with (
        pytest.raises(WebSocketDisconnect) as closed,
        client().websocket_connect(f"{SOCKETS}/echo", headers={"origin": origin}),
    ):
        pass
    assert (closed.value.code, closed.value.reason[:12]) == (1008, "Origin: got ")


def test_our_own_page_is_answered() -> None:
    assert client().post("/", headers={"origin": HERE}).status_code == 200
    with client().websocket_connect(f"{SOCKETS}/echo", headers={"origin": HERE}) as socket:
        socket.send_text("hello")
        assert socket.receive_text() == "hello"


@pytest.mark.parametrize(
    ("site", "mode", "method", "status"),
    [
        ("same-origin", "cors", "POST", 200),
        ("none", "navigate", "GET", 200),
        ("cross-site", "navigate", "GET", 200),  # a link that somebody follows
        ("cross-site", "no-cors", "GET", 403),  # a picture or script of another page
        ("same-site", "cors", "GET", 403),  # another port of this machine
        ("cross-site", "navigate", "POST", 403),
    ],
)
def test_what_a_browser_says_of_the_request(site: str, mode: str, method: str, status: int) -> None:
    headers = {"sec-fetch-site": site, "sec-fetch-mode": mode}
    assert client().request(method, "/", headers=headers).status_code == status


def test_every_answer_keeps_a_page_to_this_server() -> None:
    for answer in (client().get("/"), client().get("/nowhere"), client().get("/", headers={"host": "evil.example"})):
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "frame-ancestors 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert client().get("/own").headers["content-security-policy"] == "mine"


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_one_plain_line(name: str) -> None:
    error, status = ERRORS[name]
    answer = client().get(f"/fail/{name}")
    assert answer.status_code == status
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    line = "unexpected KeyError: 'x'" if name == "odd" else " ".join(str(error).split())
    assert answer.text == line + "\n"


def test_what_nobody_foresaw_is_reported_too() -> None:
    with pytest.raises(KeyError):
        TestClient(Guard(APP), base_url=HERE).get("/fail/odd")


def test_a_socket_closes_with_the_line_of_its_error() -> None:
    with client().websocket_connect(f"{SOCKETS}/broken") as socket, pytest.raises(WebSocketDisconnect) as closed:
        socket.receive_text()
    assert (closed.value.code, closed.value.reason) == (1008, "no such world")


def test_a_page_that_goes_away_is_no_error() -> None:
    with TestClient(Guard(APP)).websocket_connect(f"{SOCKETS}/echo"):
        pass  # leaves without a word
