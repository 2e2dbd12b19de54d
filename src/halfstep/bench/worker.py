"""A process that measures one case, block by block when it is told to: lines of JSON in and out.

This file is also what runs in it, with the package of any revision on its path. That package's `halfstep.bench` is
replaced by the one beside this file, so that two revisions are measured by the same code.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import halfstep
from halfstep.errors import HalfstepError

if TYPE_CHECKING:
    from halfstep.bench.cases import Case
    from halfstep.bench.memory import Peak
    from halfstep.bench.timing import Block

OURS = Path(__file__).parents[2]  # the folder of the package that runs here
# Threads that wait for each other spin where the cores are taken, which is the processor's time and not the work's.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


class WorkerError(HalfstepError):
    """A case could not be measured: its code raised, or its process ended."""


class AbsentError(WorkerError):
    """The code that a case is made from is not there."""


class Worker:
    """The process of one case, while the block lasts.

    `source`: the folder that holds the package halfstep. Its methods raise AbsentError when that package lacks what the
    case is made from, and WorkerError for what else goes wrong, both with `name` before what they say.
    """

    def __init__(
        self, case: Case, source: Path = OURS, environment: Mapping[str, str] | None = None, *, name: str = ""
    ) -> None:
        self._case = case
        self._name = name or case.name
        self._source = source
        self._environment = environment or {}

    def __enter__(self) -> Self:
        self._scratch = tempfile.TemporaryDirectory(prefix="halfstep-bench-")
        self._errors = Path(self._scratch.name) / "stderr"
        path = os.pathsep.join(filter(None, [str(self._source), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, **_ONE_THREAD, **self._environment, "PYTHONPATH": path}
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, json.dumps(asdict(self._case)), self._scratch.name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=env,
                start_new_session=True,  # Ctrl-C is ours; we end it
            )
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()
        self._scratch.cleanup()

    def ready(self) -> None:
        """Wait until the case's call is made; to be asked first."""
        package = Path(self._answer())
        if package != self._source / "halfstep":
            raise WorkerError(f"{self._name}: its process imported {package}; expected {self._source / 'halfstep'}")

    def switches(self) -> dict[str, Any]:
        """Call once, and tell what was switched how meanwhile."""
        found: dict[str, Any] = self._ask("switches")
        return found

    def calibrate(self, block_s: float) -> int:
        """Find the number of calls that takes so long, and let a block have it."""
        return int(self._ask("calibrate", block_s=block_s))

    def take(self, count: int) -> None:
        """Call once, and let a block have so many calls."""
        self._ask("take", count=count)

    def block(self) -> Block:
        """Run a block."""
        from halfstep.bench.timing import Block

        return Block(**self._ask("block"))

    def energy_missing(self) -> str | None:
        """Why nobody tells the energy of a block."""
        found: str | None = self._ask("energy_missing")
        return found

    def peak(self) -> Peak:
        """The memory of a second call, in a process that does nothing else."""
        from halfstep.bench.memory import Peak

        return Peak(**self._ask("peak"))

    def _ask(self, what: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(f"{self._name}: {self._death()}") from None
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"{self._name}: {self._death()}")
        reply = json.loads(line)
        if "absent" in reply:
            raise AbsentError(f"{self._name}: {reply['absent']}")
        if "error" in reply:
            raise WorkerError(f"{self._name}: {reply['error']}")
        return reply["result"]

    def _death(self) -> str:
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        said = self._errors.read_text(errors="replace").splitlines()
        return f"its process {how} ({said[-1]})" if said else f"its process {how}"


class _Measured:
    """In the worker: a case and its call."""

    def __init__(self, case: Case, scratch: Path) -> None:
        from halfstep.bench.energy import energy_meter

        if case.device.startswith("cuda"):
            import torch

            torch.cuda.set_device(case.device)
        self._case = case
        self._call = case.make(scratch)
        self._energy = energy_meter(case.device)

    def switches(self) -> dict[str, Any]:
        from halfstep.bench.facts import switches

        return switches(self._call)

    def calibrate(self, block_s: float) -> int:
        from halfstep.bench.timing import calibrate

        self._count = calibrate(self._call, self._case.device, block_s)
        return self._count

    def take(self, count: int) -> None:
        self._call()
        self._count = count

    def block(self) -> dict[str, Any]:
        from halfstep.bench.timing import run_block

        if isinstance(self._energy, str):
            return asdict(run_block(self._call, self._count, self._case.device))
        before = self._energy()
        block = run_block(self._call, self._count, self._case.device)
        return asdict(replace(block, energy_j=self._energy() - before))

    def energy_missing(self) -> str | None:
        return self._energy if isinstance(self._energy, str) else None

    def peak(self) -> dict[str, float]:
        from halfstep.bench.memory import peak_of
        from halfstep.machine import open_device

        self._call()
        return asdict(peak_of(self._call, open_device(self._case.device)))


def _serve(case: str, scratch: str) -> None:
    """Make the case, and answer until nobody asks any more."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    measured: _Measured | None = None
    requests = map(json.loads, sys.stdin)
    while True:
        try:
            if measured is None:
                from halfstep.bench.cases import Case

                measured = _Measured(Case(**json.loads(case)), Path(scratch))
                result: Any = str(Path(halfstep.__file__).parent)
            elif (request := next(requests, None)) is None:
                return
            else:
                result = getattr(measured, request.pop("do"))(**request)
            reply = {"result": result}
        except ImportError as error:
            reply = {"absent": str(error)}
        except Exception as error:  # noqa: BLE001 - told to whoever asked, who names the case
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
        if measured is None:
            return


if __name__ == "__main__":
    beside = types.ModuleType("halfstep.bench")
    beside.__path__ = [str(Path(__file__).parent)]
    sys.modules["halfstep.bench"] = beside
    _serve(*sys.argv[1:])
