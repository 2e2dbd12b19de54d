"""`halfstep view` as a process: its address, its end, and what is wrong with either."""

from __future__ import annotations

import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from tests.support.cli import run_cli
from tests.support.web import served


def test_a_free_port_is_found_and_ctrl_c_ends_it(tmp_path: Path) -> None:
    with served(tmp_path, "--port", 0) as (process, url):
        assert url.startswith("http://127.0.0.1:")
        assert "halfstep view" in httpx2.get(url, trust_env=False).text
        assert httpx2.get(url, headers={"host": "evil.example"}, trust_env=False).status_code == 403
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    assert (process.returncode, output, errors) == (0, "", "")


def test_ctrl_c_does_not_wait_for_what_is_under_way(latents: Path) -> None:
    with served(latents, "--port", 0) as (process, url), ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx2.get, f"{url}/api/dataset/decoding?at=0", trust_env=False, timeout=60)
        while not asked.running():
            pass
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        asked.exception()  # answered or cut off
    assert (process.returncode, output, errors) == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--port", "TAKEN"], "is taken on 127.0.0.1; give another, or 0 for any that is free"),
        (["--host", "no.such.host.invalid"], "--host: got 'no.such.host.invalid'; expected a name or address"),
        (["--host", "192.0.2.1"], "--host, --port: cannot listen on 192.0.2.1, port 8010"),
    ],
)
def test_an_address_that_cannot_be_had_is_one_line(arguments: list[str], told: str, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        given = [port if word == "TAKEN" else word for word in arguments]
        result = run_cli("view", tmp_path, "--no-open", *given, check=2)
    assert told in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_what_is_no_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "is a file; name a folder to view" in run_cli("view", tmp_path / "file", check=2).stderr
    assert "is not there; name a folder to view" in run_cli("view", tmp_path / "absent", check=2).stderr
    assert "got s3://bucket/latents; expected a local path" in run_cli("view", "s3://bucket/latents", check=2).stderr
