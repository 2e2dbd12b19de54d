"""A link that goes down between producer and engine, in network namespaces of their own; needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cli import REPOSITORY
from tests.support.streaming import rows_of, tiny_weights

COUNT = 150
ENGINE = """
import sys
from pathlib import Path
from tests.support.streaming import run_engine
run_engine(Path(sys.argv[1]), "tcp://10.99.7.1:5650", Path(sys.argv[2]))
"""
PRODUCER = """
import sys
from tests.support.streaming import run_producer
run_producer("tcp://10.99.7.1:5650", int(sys.argv[1]), "a run")
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """Two, joined by a pair of devices."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2")
    names = f"hs{os.getpid()}a", f"hs{os.getpid()}b"
    try:
        for name in names:
            ip("netns", "add", name)
    except subprocess.CalledProcessError:
        pytest.skip("network namespaces are not allowed here")
    try:
        ip("link", "add", "hs0", "netns", names[0], "type", "veth", "peer", "name", "hs1", "netns", names[1])
        for name, device, address in ((names[0], "hs0", "10.99.7.1/24"), (names[1], "hs1", "10.99.7.2/24")):
            ip("-n", name, "addr", "add", address, "dev", device)
            ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1, int(os.environ.get("HALFSTEP_LONG_LINK_S", "15"))])
def test_a_link_that_was_down_loses_nothing(seconds: int, namespaces: tuple[str, str], tmp_path: Path) -> None:
    weights = tiny_weights(tmp_path / "w.pt")
    folder = tmp_path / "run"

    def start(name: str, script: str, *arguments: object) -> subprocess.Popen[bytes]:
        command = ["ip", "netns", "exec", name, sys.executable, "-c", script, *map(str, arguments)]
        return subprocess.Popen(command, cwd=REPOSITORY)

    engine = start(namespaces[0], ENGINE, folder, weights)
    producer = start(namespaces[1], PRODUCER, COUNT)
    try:
        while not list((folder / "events").glob("*.parquet")):  # on the way
            assert engine.poll() is None
            time.sleep(0.01)
        ip("-n", namespaces[1], "link", "set", "hs1", "down")
        time.sleep(seconds)  # that is what is tried
        ip("-n", namespaces[1], "link", "set", "hs1", "up")
        assert producer.wait(300) == 0
        assert engine.wait(300) == 0
    finally:
        engine.kill()
        producer.kill()
    assert sorted(row["sequence"] for row in rows_of(folder)) == list(range(COUNT))
