"""A base install reads and writes stores; a library that is missing is named with the pip command that brings it."""

import copy
import pickle
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest

import halfstep
from halfstep.extras import EXTRAS
from halfstep.store import DatasetWriter, Manifest, TrajectoryStore
from tests.support.arrays import latents
from tests.support.cli import run_script

BLOCKED = """
import sys
for name in {names!r}:
    sys.modules[name] = None
"""
LIBRARIES = sorted({module for modules in EXTRAS.values() for module in modules})


def without(names: list[str], script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script in which some libraries cannot be imported."""
    command = [sys.executable, "-c", BLOCKED.format(names=names) + script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


CLI = "from halfstep.cli import main; main()"


def test_stores_are_read_and_written_without_any_extra(tmp_path: Path, manifest: Manifest) -> None:
    with DatasetWriter(tmp_path / "latents", manifest) as writer:
        writer.append("a", latents(2))
    runs = TrajectoryStore.create(tmp_path / "runs")
    runs.add("r", np.zeros((3, 2, 4, 4), np.float32), sigmas=[1.0, 0.5, 0.0])
    script = """
from halfstep import DatasetStore, TrajectoryStore, open_trajectories
assert DatasetStore.open(sys.argv[1]).read("a").shape == (2, 2, 3, 4)
run = open_trajectories(sys.argv[2])["r"]
TrajectoryStore.create(sys.argv[2] + "2").add("r", run.latents, sigmas=run.sigmas.tolist())
from halfstep.cli import main
sys.argv[1:] = ["store", "verify", sys.argv[2] + "2"]
main()
"""
    done = without(LIBRARIES, script, tmp_path / "latents", tmp_path / "runs")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("missing", "command", "told"),
    [
        ("torch", ["encode", "-i", "x", "-o", "y"], "encode: torch is not installed; pip install 'halfstep[encode]'"),
        ("av", ["encode", "-i", "x", "-o", "y"], "encode: av is not installed; pip install 'halfstep[encode]'"),
        ("PIL", ["toy-world", "-o", "y"], "toy-world: PIL is not installed; pip install 'halfstep[encode]'"),
        ("safetensors", ["train", "eqm", "--data-path", "x"], "train: safetensors is not installed; pip install 'ha"),
        ("torch", ["sample", "--ckpt", "x", "-o", "y"], "sample: torch is not installed; pip install 'halfstep[sam"),
        ("scipy", ["analyze", "--batch-dir", "RUNS"], "analyze: scipy is not installed; pip install 'halfstep[an"),
        ("plotly", ["analyze", "--batch-dir", "RUNS"], "analyze: plotly is not installed; pip install 'halfstep[an"),
        ("transformers", ["generate", "--template", "a cat", "-o", "y"], "pip install 'halfstep[generate]'"),
        ("torchmetrics", ["eval", "fid", "A", "A"], "pip install 'halfstep[fid]'"),
        ("matplotlib", ["demo", "-o", "y"], "demo: matplotlib is not installed; pip install 'halfstep[all]'"),
        ("ray", ["encode", "-i", "A", "-o", "y", "--ray"], "--ray: ray is not installed; pip install 'halfstep[ray]'"),
    ],
)
def test_a_missing_library_is_one_line(
    missing: str, command: list[str], told: str, tmp_path: Path, toy_world: Path
) -> None:
    TrajectoryStore.create(tmp_path / "runs").add("r", np.zeros((3, 2, 4, 4), np.float32), sigmas=[1.0, 0.5, 0.0])
    places = {"RUNS": str(tmp_path / "runs"), "A": str(toy_world / "walk_000"), "y": str(tmp_path / "y")}
    done = without([missing], CLI, *(places.get(word, word) for word in command))
    assert done.returncode == 2
    assert done.stderr.startswith("halfstep: ")
    assert len(done.stderr.splitlines()) == 1
    assert told in done.stderr
    assert not any(path for path in (tmp_path / "y").glob("*") if path.name != ".lock")


def test_a_public_name_names_what_it_misses() -> None:
    script = "import halfstep\ntry: halfstep.encode\nexcept halfstep.errors.InputError as error: print(error)"
    done = without(["diffusers", "torch"], "import halfstep.errors\n" + script)
    assert done.stdout == "encode: torch is not installed; pip install 'halfstep[encode]'\n"


def test_the_public_names_are_there_and_torch_comes_when_it_is_used() -> None:
    assert set(dir(halfstep)) >= set(halfstep.__all__)
    for name in halfstep.__all__:
        assert getattr(halfstep, name) is not None
    script = """
import halfstep, halfstep.store, halfstep.cli
halfstep.DatasetStore
assert not {"torch", "diffusers", "matplotlib", "PIL", "av"} & set(sys.modules), "imported too early"
import halfstep.encode
from halfstep import encode
assert callable(encode) and callable(halfstep.encode) and callable(halfstep.train) and encode.EncodeOptions
"""
    done = without([], script)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_extras_bring_what_they_say() -> None:
    """The list in the code is that of the package's metadata."""
    listed = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = listed["optional-dependencies"]

    def packages(extra: str) -> set[str]:
        found: set[str] = set()
        for line in extras[extra]:
            name, _, inner = line.partition("[")
            plain = name.partition(">")[0].lower().replace("_", "-")
            found |= set().union(*map(packages, inner[:-1].split(","))) if plain == "halfstep" else {plain}
        return found

    modules = packages_distributions()
    for extra, names in EXTRAS.items():
        for module in names:
            brought = {name.lower().replace("_", "-") for name in modules.get(module, [module])}
            assert brought & packages(extra), f"{extra}: {module}"
    assert packages("all") >= set().union(*(packages(extra) for extra in EXTRAS))


@pytest.mark.parametrize("verb", ["encode", "train", "sample", "analyze"])
def test_a_verb_reaches_another_process_as_a_function_does(verb: str) -> None:
    function = getattr(halfstep, verb)
    assert pickle.loads(pickle.dumps(function)) is function
    assert copy.deepcopy(function) is function
    script = f"import pickle; print(callable(pickle.loads({pickle.dumps(function)!r})))"
    assert run_script(script).stdout.strip() == "True"
