"""The pages of `halfstep view`: routes to what is shown, and nothing that writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from halfstep.errors import InputError
from halfstep.web.answers import as_json, as_png, asset
from halfstep.web.view.datasets import Datasets
from halfstep.web.view.decoding import Decoder
from halfstep.web.view.places import Shown, kind_of, none_of_ours
from halfstep.web.view.runs import Runs
from halfstep.web.view.streamed import Streamed
from halfstep.web.view.training import Training

_MOST_ROWS = 500
_LARGEST = (1 << 63) - 1
_REPORT_POLICY = (  # of a page that another program wrote: its own script and style, and nothing of this server
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; "
    "frame-ancestors 'none'; sandbox allow-scripts allow-downloads"
)

Answer = Callable[[Request], Response]


def view_app(paths: Sequence[Path], *, autoencoder: str | None = None) -> ASGIApp:
    """The application that shows what lies in the folders `paths`. `autoencoder`: of latents that do not say theirs.

    It is to be served behind a `Guard`, which answers errors too. Raises InputError when a path is no folder.
    """
    shown = Shown(paths)
    decoder = Decoder(autoencoder)
    datasets, runs = Datasets(shown, decoder), Runs(shown, decoder)
    training, streamed = Training(shown), Streamed(shown)

    def there(request: Request) -> Path:
        return shown.path(_text(request, "at"))

    def json_of(answer: Callable[[Request], Any]) -> Answer:
        return lambda request: as_json(answer(request))

    def png_of(answer: Callable[[Request], bytes]) -> Answer:
        return lambda request: as_png(answer(request))

    def verify(request: Request) -> dict[str, Any]:
        path = there(request)
        verifiers = {"dataset": datasets.verify, "runs": runs.verify}
        if (verifier := verifiers.get(kind_of(path))) is None:
            raise InputError(f"{path}: has no checksums to verify; stores of latents and of recorded runs do")
        return verifier(path)

    gets: dict[str, Answer] = {
        "/": lambda _: asset("view/view.html"),
        "/assets/{name:path}": lambda r: asset(r.path_params["name"]),
        "/report": lambda r: _report(shown.report(there(r))),
        "/api/places": json_of(lambda r: _places(shown, there(r) if "at" in r.query_params else None)),
        "/api/place": json_of(lambda r: _place(shown, there(r))),
        "/api/dataset": json_of(lambda r: datasets.facts(there(r))),
        "/api/dataset/sequences": json_of(lambda r: datasets.sequences(there(r), _text(r, "filter"), *_page(r))),
        "/api/dataset/sequence": json_of(lambda r: datasets.sequence(there(r), _text(r, "key"))),
        "/api/dataset/decoding": json_of(lambda r: datasets.decoding(there(r))),
        "/api/dataset/frame": json_of(lambda r: datasets.frame(there(r), _text(r, "key"), _number(r, "k"))),
        "/api/dataset/picture": png_of(
            lambda r: datasets.picture(there(r), _text(r, "key"), _number(r, "k"), _number(r, "t"))
        ),
        "/api/dataset/channel": png_of(
            lambda r: datasets.channel(there(r), _text(r, "key"), _number(r, "k"), _number(r, "c"), _number(r, "t"))
        ),
        "/api/runs": json_of(lambda r: runs.facts(there(r))),
        "/api/runs/rows": json_of(lambda r: runs.rows(there(r), _text(r, "filter"), *_page(r))),
        "/api/runs/run": json_of(lambda r: runs.run(there(r), _text(r, "key"))),
        "/api/runs/decoding": json_of(lambda r: runs.decoding(there(r), _text(r, "key"))),
        "/api/runs/metrics": json_of(lambda r: runs.metrics(there(r), _text(r, "key"))),
        "/api/runs/picture": png_of(
            lambda r: runs.picture(there(r), _text(r, "key"), _number(r, "k"), _number(r, "t"), _text(r, "state", "at"))
        ),
        "/api/runs/channel": png_of(
            lambda r: runs.channel(there(r), _text(r, "key"), _number(r, "k"), _number(r, "c"), _number(r, "t"))
        ),
        "/api/training": json_of(lambda r: training.facts(there(r))),
        "/api/training/log": json_of(lambda r: training.log(there(r), _number(r, "start"), _text(r, "file"))),
        "/api/streamed": json_of(lambda r: streamed.facts(there(r))),
        "/api/streamed/events": json_of(
            lambda r: streamed.events(there(r), *_page(r), images=_text(r, "images") == "yes")
        ),
        "/api/streamed/event": json_of(lambda r: streamed.event(there(r), _text(r, "part"), _number(r, "place"))),
        "/api/streamed/frame": png_of(lambda r: streamed.frame(there(r), _text(r, "part"), _number(r, "place"))),
    }
    routes = [Route(path, answer, methods=["GET"], name=path) for path, answer in gets.items()]
    return Router([*routes, Route("/api/verify", json_of(verify), methods=["POST"], name="verify")])


def _places(shown: Shown, path: Path | None) -> dict[str, Any]:
    found = shown.find(path)
    looked = shown.roots if path is None else (path,)
    holding = [shown.path(place.at) for place in found.places]
    empty = [root for root in looked if not any(place.is_relative_to(root) for place in holding)]
    nothing = [none_of_ours(root) for root in empty] if found.complete else []
    return {"places": [asdict(place) for place in found.places], "complete": found.complete, "nothing": nothing}


def _place(shown: Shown, path: Path) -> dict[str, Any]:
    return {"kind": kind_of(path), "crumbs": shown.crumbs(path), "path": str(path)}


def _report(content: bytes) -> Response:
    headers = {"content-type": "text/html; charset=utf-8", "content-security-policy": _REPORT_POLICY}
    return Response(content, headers=headers)


def _text(request: Request, name: str, default: str = "") -> str:
    return request.query_params.get(name, default)


def _number(request: Request, name: str) -> int:
    """A whole number from 0 on; 0 where none is given."""
    text = request.query_params.get(name, "0")
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) <= _LARGEST):
        raise InputError(f"{name}: got {text[:40]!a}; expected a whole number, 0 or more")
    return int(text)


def _page(request: Request) -> tuple[int, int]:
    """The number of the first row, and how many are wanted."""
    return _number(request, "start"), min(_number(request, "count"), _MOST_ROWS)
