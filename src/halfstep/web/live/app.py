"""The application of `halfstep live`: one page, a WebSocket with frames, and the same frames as MJPEG.

The first browser plays, all others watch; when the player leaves, the watcher who came first plays on. Messages of the
player are JSON with one wish each:

{"act": {"forward": 1, "left": 0, "turn": 0}, "number": 7}   what is held from now on
{"seed": 3}  {"steps": 4}  {"precision": "bf16"}  {"record": true}

or the JPEG of a camera's picture. What is neither closes the connection, and is counted.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any

import anyio
from PIL import UnidentifiedImageError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route, Router, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from halfstep.errors import HalfstepError
from halfstep.live import Action, FrameSpec
from halfstep.web.answers import asset
from halfstep.web.guard import Refusal
from halfstep.web.live.recording import Recording
from halfstep.web.live.stage import MOST_PIXELS, Shown, Stage, from_jpeg

_MOST_JSON, _MOST_PICTURE = 1024, 4 << 20  # bytes of a message
_UNSUPPORTED, _INVALID, _TOO_LARGE = 1003, 1007, 1009  # RFC 6455, 7.4.1
_FACTS_S = 1.0
_LARGEST = 2**31 - 1  # seed, or number of a wish


class _Malformed(Exception):
    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class _Viewer:
    """A browser that is connected: what it has not been sent yet, of frames and of each kind of line the newest, so
    that one that does not read holds no more than that."""

    def __init__(self, socket: WebSocket) -> None:
        self.socket, self.changed = socket, asyncio.Event()
        self.frame: Shown | None = None
        self.lines: dict[str, dict[str, Any]] = {}

    def show(self, frame: Shown) -> None:
        self.frame = frame
        self.changed.set()

    def tell(self, **line: Any) -> None:
        self.lines[next(iter(line))] = line
        self.changed.set()

    async def send(self) -> None:
        """Frames and lines as they come, until the browser leaves."""
        with suppress(WebSocketDisconnect):
            while True:
                await self.changed.wait()
                self.changed.clear()
                lines, self.lines = self.lines, {}
                frame, self.frame = self.frame, None
                for line in lines.values():
                    await self._send(json.dumps(line))
                if frame is not None:
                    await self._send(frame.message())

    async def _send(self, content: str | bytes) -> None:
        if self.socket.application_state is not WebSocketState.CONNECTED:
            return  # it was closed meanwhile
        if isinstance(content, str):
            await self.socket.send_text(content)
        else:
            await self.socket.send_bytes(content)


class LiveApp:
    """`title`: what is walked through; `source`: keys, camera, video or none, which the page goes by. `asgi` is to be
    served behind a `Guard`, which answers errors too."""

    def __init__(self, stage: Stage, spec: FrameSpec, *, title: str, source: str) -> None:
        self._stage, self._spec, self._title, self._source = stage, spec, title, source
        self._viewers: list[_Viewer] = []
        self._recording = Recording()
        self.refused = 0  # messages that were none
        routes = [
            Route("/", lambda request: asset("live/index.html")),
            Route("/assets/{name:path}", lambda request: asset(request.path_params["name"])),
            Route("/stream.mjpg", self._mjpeg),
            Route("/recording.mp4", self._download),
            WebSocketRoute("/frames", self._connect),
        ]
        self.asgi = Router(routes)

    async def _connect(self, socket: WebSocket) -> None:
        await socket.accept()
        viewer, loop = _Viewer(socket), asyncio.get_running_loop()
        self._viewers.append(viewer)
        viewer.tell(world=self._about())
        self._tell_roles()
        stop = self._stage.listen(partial(_in_loop, loop, viewer.show))
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(viewer.send)
                group.start_soon(self._tell_facts, viewer)
                try:
                    await self._hear(viewer)
                except _Malformed as error:
                    self.refused += 1
                    with suppress(WebSocketDisconnect):  # it did not wait for the answer
                        await socket.close(error.code, str(error))
                group.cancel_scope.cancel()
        finally:
            stop()
            if self._is_player(viewer):
                self._stage.act(Action(), 0)
            self._viewers.remove(viewer)
            self._tell_roles()

    async def _hear(self, viewer: _Viewer) -> None:
        """Until the browser leaves."""
        while True:
            message = await viewer.socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            data = message.get("bytes")
            if data is not None:
                await self._hear_picture(viewer, data)
            else:
                await self._hear_wish(viewer, message.get("text") or "")

    async def _hear_picture(self, viewer: _Viewer, data: bytes) -> None:
        if len(data) > _MOST_PICTURE:
            raise _Malformed(_TOO_LARGE, f"a picture of {len(data)} bytes; at most {_MOST_PICTURE}")
        if not self._spec.takes_pictures:
            raise _Malformed(_UNSUPPORTED, "a picture, which this world does not take")
        if not self._is_player(viewer):
            return
        try:
            picture = await run_in_threadpool(from_jpeg, data, (self._spec.width, self._spec.height))
        except (OSError, UnidentifiedImageError, ValueError) as error:
            raise _Malformed(_INVALID, f"expected a JPEG of at most {MOST_PIXELS} pixels") from error
        self._stage.see(picture)

    async def _hear_wish(self, viewer: _Viewer, text: str) -> None:
        if len(text) > _MOST_JSON:
            raise _Malformed(_TOO_LARGE, f"a message of {len(text)} characters; at most {_MOST_JSON}")
        wish = _parse(text)
        if not self._is_player(viewer):
            return  # a watcher's keys do nothing
        match wish:
            case {"act": dict(parts), "number": int(number)} if _is_whole(number):
                self._stage.act(_action(parts), number)
            case {"seed": int(seed)} if _is_whole(seed):
                await self._ask(viewer, self._stage.ask(lambda engine: engine.reset(seed)))
            case {"steps": int(steps)} if not isinstance(steps, bool):
                await self._ask(viewer, self._stage.ask(lambda engine: engine.set_steps(steps)))
            case {"precision": str(name)}:
                await self._ask(viewer, self._stage.ask(lambda engine: engine.set_precision(name)))
            case {"record": bool(wanted)}:
                self._record(wanted)
            case _:
                raise _Malformed(_INVALID, "expected act and number, seed, steps, precision or record")

    async def _ask(self, viewer: _Viewer, future: Future[None]) -> None:
        """A browser is not heard again before its wish is done: wishes cannot pile up."""
        try:
            await asyncio.wrap_future(future)
        except HalfstepError as error:
            viewer.tell(error=str(error))
        else:
            viewer.tell(facts=self._facts())

    def _record(self, wanted: bool) -> None:
        if wanted:
            self._recording.start(self._stage)
        else:
            self._recording.stop()
        for viewer in self._viewers:
            viewer.tell(facts=self._facts())

    async def _tell_facts(self, viewer: _Viewer) -> None:
        while True:
            await asyncio.sleep(_FACTS_S)
            viewer.tell(facts=self._facts())

    def _tell_roles(self) -> None:
        for viewer in self._viewers:
            viewer.tell(role="player" if self._is_player(viewer) else "watcher", watchers=len(self._viewers) - 1)

    def _is_player(self, viewer: _Viewer) -> bool:
        return self._viewers[0] is viewer

    def _about(self) -> dict[str, Any]:
        return {"title": self._title, "source": self._source, **asdict(self._spec)}

    def _facts(self) -> dict[str, Any]:
        return {**self._stage.facts(), "refused": self.refused, "recorded": self._recording.facts()}

    async def _mjpeg(self, request: Request) -> Response:
        kind = "multipart/x-mixed-replace; boundary=frame"
        return StreamingResponse(self._parts(), media_type=kind)

    async def _parts(self) -> AsyncIterator[bytes]:
        loop, changed = asyncio.get_running_loop(), asyncio.Event()
        newest: list[Shown] = []

        def show(frame: Shown) -> None:
            newest[:] = [frame]
            changed.set()

        stop = self._stage.listen(partial(_in_loop, loop, show))
        try:
            while True:
                await changed.wait()
                changed.clear()
                jpeg = newest[0].jpeg
                yield b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%b\r\n" % (len(jpeg), jpeg)
        finally:
            stop()

    async def _download(self, request: Request) -> Response:
        data = await run_in_threadpool(self._recording.as_mp4)
        if data is None:
            raise Refusal("recording.mp4: nothing was recorded yet; press record first", 404)
        headers = {"content-disposition": 'attachment; filename="halfstep.mp4"'}
        return Response(data, media_type="video/mp4", headers=headers)


def _in_loop(loop: asyncio.AbstractEventLoop, show: Callable[[Shown], None], frame: Shown) -> None:
    """Called in the stage's thread."""
    with suppress(RuntimeError):  # the loop is closed: the server has ended, and nobody looks
        loop.call_soon_threadsafe(show, frame)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Malformed(_INVALID, "expected JSON") from error


def _action(parts: dict[str, Any]) -> Action:
    values = [parts.get(name, 0) for name in ("forward", "left", "turn")]
    if set(parts) - {"forward", "left", "turn"} or not all(_is_share(value) for value in values):
        raise _Malformed(_INVALID, "expected forward, left and turn, from -1 to 1")
    return Action(*map(float, values))


def _is_whole(value: int) -> bool:
    return not isinstance(value, bool) and 0 <= value <= _LARGEST


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and abs(value) <= 1
