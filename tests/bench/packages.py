"""Small packages named halfstep, as revisions of long ago may have been: a PeakNet, a policy, and little else."""

import shutil
import subprocess
from pathlib import Path

import halfstep

MODELS = """
import torch


class PeakNet(torch.nn.Module):
    def __init__(self, **sizes):
        super().__init__()
        self.layer = torch.nn.Linear(32, 32)

    def forward(self, x):
        return self.layer(x)
"""
PRECISION = """
class PrecisionPolicy:
    @classmethod
    def parse(cls, text):
        return cls()


def prepare(module, policy):
    return module
"""


# What makes a package slower in all that it does with numpy.
SLOWER = """
import numpy

_tanh = numpy.tanh
numpy.tanh = lambda values: (_tanh(values), _tanh(values), _tanh(values))[0]
"""


def write_package(source: Path, *, models: str = MODELS, init: str = "") -> None:
    """Into `source`: the real errors and machine, those models, and what runs when the package is imported."""
    package = source / "halfstep"
    package.mkdir(parents=True, exist_ok=True)
    for name in ("errors.py", "machine.py"):
        shutil.copy(Path(halfstep.__file__).parent / name, package)
    (package / "__init__.py").write_text(init)
    (package / "precision.py").write_text(PRECISION)
    (package / "models.py").write_text(models)


def write_repository(root: Path, *, models: str = MODELS) -> None:
    """A git repository with such a package, committed."""
    write_package(root / "src", models=models)
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    for command in (["init", "-q", "-b", "main"], ["add", "-A"], [*identity, "commit", "-q", "-m", "First"]):
        subprocess.run(["git", *command], cwd=root, check=True)


def worktrees(root: Path) -> list[str]:
    listed = subprocess.run(["git", "worktree", "list"], cwd=root, capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()
