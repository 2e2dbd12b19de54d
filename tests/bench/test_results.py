"""What is read back from files of suites: refused when it does not fit, compared with a warning, shown whole."""

import base64
import copy
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from halfstep.bench.report import as_html, as_markdown
from tests.support.cli import REPOSITORY, run_cli

CANARY = REPOSITORY / "benchmarks" / "intel-xeon-2-cores" / "canary.json"
FIGURES = {
    "calls": 32,
    "p50_ms": 2.0,
    "p99_ms": 3.0,
    "cost_ms": 2.0,
    "cpu_ms": 2.0,
    "wall_ms": 2.25,
    "energy_j": None,
    "energy_missing": "only of GPUs",
    "peak_memory_mb": 301.5,
    "held_memory_mb": 300.0,
    "switches": {"threads": 1, "autocast": None},
}
EVIDENCE = {
    "verdict": "fine",
    "pairs": 16,
    "ratio": 0.8,
    "low": 0.79,
    "high": 0.81,
    "p_slower": 1.0,
    "p_fine": 0.0005,
    "log_ratios": [-0.22, -0.21] * 8,
}
SUITE: dict[str, Any] = {
    "benchmark": "suite",
    "format": 1,
    "command": "halfstep bench suite",
    "machine": {"device": "A processor", "cores": 2, "torch": "2.13.0", "halfstep": "0.1.0"},
    "tolerance": 0.05,
    "verdict": "fine",
    "canary": {"case": "EqM at 64, fp32", **EVIDENCE, "ratio": 1.002, "can_tell": True},
    "rows": [
        {"case": "EqM at 64, fp32", **FIGURES, "against": None},
        {
            "case": "EqM at 64, bf16-mixed",
            **FIGURES,
            "cost_ms": 1.6,
            "switches": {"threads": 1, "autocast": [None, "bfloat16"]},
            "against": EVIDENCE,
        },
    ],
    "failed": {"CDiT at 7, fp32": "InputError: a <b> & a | b"},
}


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    return written(tmp_path / "a.json", SUITE)


def written(path: Path, result: Any) -> Path:
    path.write_text(json.dumps(result))
    return path


def changed(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(SUITE), **changes}


def test_two_suites_can_only_warn(tmp_path: Path, suite: Path) -> None:
    rows = copy.deepcopy(SUITE["rows"])
    rows[0]["cost_ms"], rows[1]["case"] = 2.5, "EqM at 128, fp32"
    later = written(tmp_path / "b.json", changed(rows=rows))
    found = run_cli("bench", "compare", suite, later)
    assert "EqM at 64, fp32: 1.250 times" in found.stdout
    assert f"EqM at 64, bf16-mixed: only in {suite}" in found.stdout
    assert f"EqM at 128, fp32: only in {later}" in found.stdout
    assert "warning: EqM at 64, fp32: 25.0% slower" in found.stderr
    assert "prove nothing" in found.stderr
    assert json.loads(run_cli("bench", "compare", suite, later, "--json").stdout)["ratios"] == {"EqM at 64, fp32": 1.25}
    same = run_cli("bench", "compare", suite, suite)
    assert "warning" not in same.stderr and "1.000 times" in same.stdout


@pytest.mark.parametrize(
    ("key", "value"), [("device", "Another"), ("cores", 4), ("torch", "2.14.0"), ("halfstep", "0.2.0")]
)
def test_another_machine_or_version_is_refused_without_force(
    tmp_path: Path, suite: Path, key: str, value: object
) -> None:
    other = written(tmp_path / "b.json", changed(machine={**SUITE["machine"], key: value}))
    refused = run_cli("bench", "compare", suite, other, check=2)
    assert f"{key} {SUITE['machine'][key]} and {value}" in refused.stderr and "--force" in refused.stderr
    assert "1.000 times" in run_cli("bench", "compare", suite, other, "--force").stdout


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("no", "is no JSON"),
        ("[1]", "is not of `halfstep bench suite`; got something else"),
        ('{"benchmark": "encode"}', "is not of `halfstep bench suite`; got encode"),
        (json.dumps(changed(format=2)), "has format 2; this version reads 1"),
        (json.dumps(changed(rows=[])), "holds no rows"),
        (json.dumps(changed(rows=[{**SUITE["rows"][0], "case": "x"}])), "no case in common"),
    ],
)
def test_files_that_are_no_suite_are_refused(tmp_path: Path, suite: Path, content: str, why: str) -> None:
    (tmp_path / "b.json").write_text(content)
    assert why in run_cli("bench", "compare", suite, tmp_path / "b.json", check=2).stderr


def test_two_files_or_a_revision(suite: Path) -> None:
    for words in ([], [suite], [suite, suite, suite], [suite, suite, "--against", "HEAD"]):
        assert "takes two files of suites, or --against REV" in run_cli("bench", "compare", *words, check=2).stderr
    assert "no such file" in run_cli("bench", "compare", suite, suite.with_name("c.json"), check=2).stderr


class _Page(HTMLParser):
    """Tags that are open, and what is asked for from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.sources += [value or "" for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


def test_the_page_needs_nothing_else(tmp_path: Path, suite: Path) -> None:
    run_cli("bench", "report", suite, "-o", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    page = _Page(text)
    assert page.open == []
    assert len(page.sources) == 2
    for source in page.sources:
        kind, _, data = source.partition("base64,")
        assert kind == "data:image/svg+xml;"
        assert ElementTree.fromstring(base64.b64decode(data)).tag.endswith("svg")
    assert not re.search(r"<script|<link|url\(", text)
    assert {"0.800", "0.790 to 0.810", "fine", "301.5", "None, bfloat16"} <= set(page.cells)
    assert "InputError: a <b> & a | b" in page.cells


def test_markdown_has_what_the_page_has(tmp_path: Path, suite: Path) -> None:
    text = run_cli("bench", "report", suite).stdout
    run_cli("bench", "report", suite, "-o", tmp_path / "report.md")
    assert (tmp_path / "report.md").read_text() == text == as_markdown({"a.json": SUITE})
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 4
    for lines in tables:
        assert len({re.sub(r"\\\|", "", line).count("|") for line in lines}) == 1
    assert "| EqM at 64, bf16-mixed | 0.800 | 0.790 to 0.810 | 16 | 1 | fine |" in text
    assert r"| CDiT at 7, fp32 | InputError: a <b> & a \| b |" in text
    assert "Canary: EqM at 64, fp32 against itself is 1.002 times" in text


def test_a_canary_that_sings_is_told() -> None:
    bad = changed(verdict="undecided", canary={**SUITE["canary"], "can_tell": False})
    for text in (as_markdown({"a": bad}), as_html({"a": bad})):
        assert "This machine cannot tell" in text
    assert "This machine cannot tell" not in as_markdown({"a": SUITE})


def test_a_canary_of_its_own_is_shown_with_the_others(tmp_path: Path, suite: Path) -> None:
    text = run_cli("bench", "report", CANARY, suite).stdout
    assert "the same was called slower in 0 of 200 trials; 10% more work was found in 100 of 100" in text
    assert "| the same, by CPU time | 200 | 0 | 0 |" in text
    run_cli("bench", "report", CANARY, suite, "-o", tmp_path / "report.html")
    page = _Page((tmp_path / "report.html").read_text())
    assert page.open == [] and "10% more work, by wall time" in page.cells


def test_other_places_are_refused(tmp_path: Path, suite: Path) -> None:
    for name in ("report.pdf", "none/report.html"):
        assert "--output: got" in run_cli("bench", "report", suite, "-o", tmp_path / name, check=2).stderr
    assert "--output: got" in run_cli("bench", "suite", "-o", tmp_path, check=2).stderr
    (tmp_path / "b.json").write_text('{"benchmark": "encode"}')
    assert "is not of `halfstep bench suite` or" in run_cli("bench", "report", tmp_path / "b.json", check=2).stderr
