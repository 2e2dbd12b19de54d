"""Pages as a browser asks for them: behind the guard without a socket, or from a process."""

from __future__ import annotations

import io
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from starlette.testclient import TestClient

from halfstep.web.guard import Guard
from halfstep.web.view import view_app
from tests.support.cli import HALFSTEP

Answer = Any


class Browser:
    """Asks for pages of the folders given."""

    def __init__(self, *paths: Path, **options: Any) -> None:
        self.client = TestClient(Guard(view_app(paths, **options)), base_url="http://127.0.0.1:8010")

    def answer(self, path: str, **query: object) -> Answer:
        return self.client.get(path, params={name: str(value) for name, value in query.items()})

    def json(self, path: str, **query: object) -> Any:
        found = self.answer(path, **query)
        assert found.status_code == 200, found.text
        return found.json()

    def picture(self, path: str, **query: object) -> np.ndarray:
        found = self.answer(path, **query)
        assert found.status_code == 200, found.text
        assert found.headers["content-type"] == "image/png"
        return np.asarray(Image.open(io.BytesIO(found.content)))

    def refused(self, path: str, status: int, **query: object) -> str:
        """The one line of an answer of that status."""
        found = self.answer(path, **query)
        assert found.status_code == status, found.text
        assert found.headers["content-type"].startswith("text/plain")
        assert found.text.endswith("\n") and len(found.text.splitlines()) == 1
        return found.text.strip()


@contextmanager
def served(*arguments: object, verb: str = "view") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`halfstep view`, or another verb that serves pages, in a process of its own, and its URL."""
    command = [*HALFSTEP, verb, *map(str, arguments), "--no-open"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.fullmatch(r"(http://\S+)/: Ctrl-C ends it\n", process.stdout.readline())
        assert found is not None
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()
