"""halfstep bench compare --against REV: another revision against the working tree, in processes that take turns."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from halfstep.bench.compare import document
from halfstep.bench.facts import machine
from halfstep.bench.gate import TOLERANCE
from halfstep.bench.race import Side, race_all, race_with_itself
from halfstep.bench.suite import FORMAT, groups_of
from halfstep.bench.timing import BLOCK_S
from halfstep.bench.worker import WorkerError
from halfstep.errors import InputError
from halfstep.progress import SILENT, Progress


def compare_revision(
    revision: str,
    *,
    root: Path,
    models: Sequence[str] = (),
    precisions: Sequence[str] = (),
    tolerance: float = TOLERANCE,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Measure the cases of a suite, each at its smallest size in fp32 and in `precisions` (what `auto` is), as
    `revision` of the checkout around `root` runs them and as its working tree does. The benchmarks' own code is the
    same on both sides.

    A row a case with `before`, `after` and the gate's verdict; `absent` has what one of the two lacks, `failed` what
    raised. Raises InputError where there is no checkout of halfstep, or no such revision.
    """
    top = _checkout(root)
    groups, _ = groups_of(models, (), precisions, "auto")
    smallest = {group.baseline.workload: group for group in reversed(groups)}
    cases = [case for group in reversed(smallest.values()) for case in (group.baseline, *group.others)]
    with _worktree(top, revision) as (commit, old):
        pairs = {
            case.name: (Side(case, old / "src", revision), Side(case, top / "src", "the working tree"))
            for case in cases
        }
        progress.start(2 * len(pairs))
        outcome = race_all(pairs, tolerance=tolerance, progress=progress)
        rows: list[dict[str, Any]] = []
        canary = None
        for name in list(outcome.found):
            before, after = pairs[name]
            progress.show(name)
            progress.advance()
            try:
                row = {"case": name, "before": before.row(), "after": after.row(), "against": outcome.found[name]}
                if canary is None:
                    canary = race_with_itself(before, tolerance=tolerance)
            except WorkerError as error:
                outcome.failed[name] = str(error)
                continue
            rows.append(row)
    return document(
        "compare",
        {},
        format=FORMAT,
        machine=machine(),
        against={"revision": revision, "commit": commit},
        tolerance=tolerance,
        block_s=BLOCK_S,
        verdict=outcome.verdict(canary),
        canary=canary,
        rows=rows,
        absent=outcome.absent,
        failed=outcome.failed,
    )


def _checkout(root: Path) -> Path:
    found = _git(root, "rev-parse", "--show-toplevel")
    top = Path(found.stdout.strip())
    if found.returncode != 0 or not (top / "src" / "halfstep" / "__init__.py").is_file():
        raise InputError(f"--against: {root} is not within a git checkout of halfstep; run it in one")
    return top


@contextmanager
def _worktree(top: Path, revision: str) -> Iterator[tuple[str, Path]]:
    """The commit of a revision, and a folder that holds it, which is gone after the block however that ends."""
    named = _git(top, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if named.returncode != 0:
        raise InputError(f"--against: got {revision!r}; expected a revision of {top}: a commit, a branch or a tag")
    commit = named.stdout.strip()
    with tempfile.TemporaryDirectory(prefix="halfstep-bench-") as scratch:
        folder = Path(scratch) / "tree"
        try:
            made = _git(top, "worktree", "add", "--detach", str(folder), commit)
            if made.returncode != 0:
                raise InputError(f"--against {revision}: git worktree: {(made.stderr.splitlines() or ['failed'])[-1]}")
            if not (folder / "src" / "halfstep" / "__init__.py").is_file():
                raise InputError(f"--against {revision}: has no src/halfstep; name a later revision")
            yield commit, folder
        finally:
            _git(top, "worktree", "remove", "--force", str(folder))


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise InputError("--against: git is not installed; it keeps the revisions") from None
