"""The README's commands and the examples run as they stand."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = {
    "roundtrip.py": ["picture.png"],
    "own_training_loop.py": ["auto"],
    "navigation_loader.py": [],
    "record_and_analyse.py": ["recorded"],
}


def blocks() -> list[tuple[str, str]]:
    """Language and text of what the README shows, in its order."""
    return re.findall(r"```(bash|python)\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)


@pytest.mark.slow
def test_the_readmes_commands(tmp_path: Path, toy_world: Path) -> None:
    (tmp_path / "photos" / "red").mkdir(parents=True)
    for i in range(5):
        shutil.copy(toy_world / "walk_000" / f"{i}.jpg", tmp_path / "photos" / "red")
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    for language, script in blocks():
        command = ["bash", "-euc", script] if language == "bash" else [sys.executable, "-c", script]
        subprocess.run(command, check=True, cwd=tmp_path, env={"PATH": path, "HOME": str(tmp_path)})
    assert (tmp_path / "latents-pt" / "red" / "4.jpg" / "0.pt").exists()
    assert (tmp_path / "results" / "EqM-S-8" / "checkpoints" / "0000020" / "ema.safetensors").exists()
    assert (tmp_path / "samples" / "contact_sheet.png").exists()
    assert (tmp_path / "analysis" / "report.html").exists()
    assert (tmp_path / "batch" / "latents" / "one-car-00" / "vid_001" / "step_000.npy.gz").exists()


def test_every_example_is_tried() -> None:
    assert {path.name for path in (REPOSITORY / "examples").glob("*.py")} == EXAMPLES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "examples" / name), *EXAMPLES[name]]
    subprocess.run(
        command, check=True, cwd=tmp_path, env={"MPLBACKEND": "Agg", "HOME": str(tmp_path), "PATH": "/usr/bin"}
    )


def test_files_that_the_readme_names_exist() -> None:
    text = (REPOSITORY / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (REPOSITORY / target).exists(), target
