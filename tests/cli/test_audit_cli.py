"""halfstep audit, end to end."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from halfstep.precision import PrecisionPolicy, prepare
from tests.support.cli import run_process

FACTORY = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.Linear(32, 4))
    with torch.no_grad():
        made[0].weight *= 1e6
    return made

def odd():
    made = nn.Sequential()
    made.add_module("<b>&", net())
    return made, (torch.randn(2, 8),)

def fails():
    raise ValueError("no weights here")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "planted_factories.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href") and value and value[0] != "#"]


def test_an_audit_from_the_command_line(folder: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(folder / "calls.npz", **{f"{n}/input": rng.standard_normal((4, 8), np.float32) for n in "abc"})
    command = [
        "audit",
        "--model",
        "planted_factories:net",
        "--inputs",
        "calls.npz",
        "--train",
        "-o",
        "report",
        "--json",
    ]
    found = json.loads(run_process(*command, "--json").stdout)
    assert found["islands"] == ["0", "1"]
    assert found["held_out"] == 1
    assert found["error"] <= found["tolerance"]
    assert found["training"]["scale"] >= 1
    assert json.loads((folder / "report" / "audit.json").read_text()) == found
    links = Links()
    links.feed((folder / "report" / "report.html").read_text())
    assert links.loaded == []
    assert links.tags.count("svg") == 2
    namespace: dict[str, object] = {}
    exec(FACTORY, namespace)
    net = namespace["net"]()  # type: ignore[operator]
    x = torch.from_numpy(np.load(folder / "calls.npz")["a/input"])
    with torch.no_grad():
        expected = net(x)
        half = prepare(net, PrecisionPolicy.parse(found["policy"]))(x)
    assert (half - expected).norm() <= 1e-2 * expected.norm()


def test_what_it_says_and_how_it_ends(folder: Path) -> None:
    said = run_process("audit", "--model", "planted_factories:odd", "-o", "report")
    assert "fp16 with 2 islands is within 0.01" in said.stdout
    assert "--precision '16-true,islands=<b>&.0+|<b>&.1'" in said.stdout
    assert "<b>&" not in (folder / "report" / "report.html").read_text().replace("&lt;b&gt;&amp;", "")
    not_met = run_process("audit", "--model", "planted_factories:net", "--tolerance", "1e-9", check=3)
    assert "is not met" in not_met.stdout
    rescaled = run_process("audit", "--model", "planted_factories:net", "--cure", "rescale")
    assert "no island" in rescaled.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "planted_factories:fails"], "failed (no weights here)"),
        (["--model", "planted_factories:net", "--inputs", "none.npz"], "none.npz: no such file"),
        (["--model", "planted_factories:net", "--target", "fp8"], "got 'fp8'; expected fp16 or bf16"),
        (["--model", "planted_factories:net", "--cure", "magic"], "expected islands or rescale"),
        (["--model", "planted_factories:net", "-o", "planted_factories.py"], "is a file; expected a folder"),
        (["--model", "EqM-S/8"], "returns only zeros in fp32"),
    ],
)
def test_bad_input_is_one_line(folder: Path, arguments: list[str], message: str) -> None:
    failed = run_process("audit", *arguments, check=2)
    assert message in failed.stderr
    assert failed.stderr.count("\n") == 1
