"""The command `halfstep`: in this process, in one of its own, or in several."""

import io
import os
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from halfstep.cli import main

HALFSTEP = [sys.executable, "-m", "halfstep"]
REPOSITORY = Path(__file__).parents[2]

Result = subprocess.CompletedProcess[str]


def run_cli(*arguments: object, check: int = 0, cwd: Path | None = None) -> Result:
    """Run the command in this process and hold its exit code against `check`."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patched, redirect_stdout(stdout), redirect_stderr(stderr):
        patched.setattr(sys, "argv", ["halfstep", *map(str, arguments)])
        patched.setenv("HALFSTEP_DEBUG", "")  # which --debug sets
        if cwd is not None:
            patched.chdir(cwd)
        with warnings.catch_warnings(), pytest.raises(SystemExit) as left:
            _warn_as_a_process_does()
            main()
    assert isinstance(left.value.code, int)
    return _checked(Result(sys.argv, left.value.code, stdout.getvalue(), stderr.getvalue()), check)


def _warn_as_a_process_does() -> None:
    """Print warnings on stderr, where pytest would keep them to itself."""
    warnings.resetwarnings()
    for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", kind)

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))

    warnings.showwarning = show


def run_process(*arguments: object, check: int = 0, unprivileged: bool = False, **options: Any) -> Result:
    """Run the command in a process of its own, with `options` of subprocess.run. An `unprivileged` one is bound by the
    permissions of files even where root runs the tests."""
    command = [*HALFSTEP, *arguments]
    if unprivileged and os.geteuid() == 0:
        powers = "-dac_override,-dac_read_search"
        command = ["setpriv", f"--bounding-set={powers}", f"--inh-caps={powers}", *command]
    return _checked(_run(command, **options), check)


def run_script(script: str, *arguments: object, check: int = 0, **options: Any) -> Result:
    """Run Python code that can import the tests in a process of its own."""
    return _checked(_run([sys.executable, "-c", script, *arguments], **{"cwd": REPOSITORY, **options}), check)


def torchrun(processes: int, *arguments: object, check: int | None = 0) -> Result:
    """Run the command, or the script that a path names, in `processes` processes of one thread each."""
    module = [] if isinstance(arguments[0], Path) else ["-m", "halfstep"]
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    result = _run([*launcher, *module, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"})
    return result if check is None else _checked(result, check)


def _run(command: list[Any], **options: Any) -> Result:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)


def _checked(result: Result, code: int) -> Result:
    assert result.returncode == code, f"exit {result.returncode}: {result.stderr}"
    return result
