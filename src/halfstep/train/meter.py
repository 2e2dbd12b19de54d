"""How training goes, as numbers: a line of JSON every `log_every` steps, and the same to TensorBoard or W&B."""

from __future__ import annotations

import json
import math
import time
import uuid
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from halfstep.errors import InputError
from halfstep.files import file_errors, write_durably
from halfstep.machine import peak_memory_mb
from halfstep.models import About
from halfstep.precision import Movement, probe
from halfstep.train.data import Batch
from halfstep.train.state import TrainState
from halfstep.train.work import StepWork

_BACKWARD = 2  # as many operations again for the gradients of inputs, and of weights


class Meter:
    """Sums up, on the device, what happens between two lines of the log."""

    def __init__(self, about: About, state: TrainState, work: StepWork) -> None:
        self._state, self._work = state, work
        self._samples = work.data.items_per_step * work.data.goals
        self._operations = forward_operations(about) * (1 + _BACKWARD) * self._samples
        self._loss = torch.zeros((), device=state.device)
        self._norm = torch.zeros((), device=state.device)
        self._norms = torch.zeros((), device=state.device)
        self._steps = 0
        self._since = time.perf_counter()
        self._reasons: list[str] = []  # of what could not be read since the last line
        self._told: set[str] = set()
        self.unreadable = 0
        self.newest: dict[str, Any] | None = None

    def add(self, loss: torch.Tensor) -> None:
        """A micro-batch's part of a step's mean loss."""
        self._loss += loss.detach()

    def count(self, batch: Batch) -> None:
        """A step with the items of `batch` is done."""
        norm = self._state.scale.grad_norm
        finite = torch.isfinite(norm)  # it is not where an update was skipped
        self._norm += torch.where(finite, norm, 0)
        self._norms += finite
        self._steps += 1
        self._reasons += batch.unreadable

    def record(
        self, movement: Movement, against_fp32: dict[str, float] | None, effects: dict[str, float]
    ) -> tuple[dict[str, Any], list[str]]:
        """The line for the steps since the last one, which all processes make together, with what precision saves and
        what conditions do to the loss, and what the user should know of them. Waits for the device."""
        state, team = self._state, self._work.team
        loss = self._loss / self._steps
        if team.size > 1:
            dist.all_reduce(loss)
            loss /= team.size
        value, norms = float(loss), int(self._norms)
        seconds = (time.perf_counter() - self._since) / self._steps
        scale = state.scale
        stalled = None if int(scale.skipped_in_row) else movement.stalled(state.optimizer)
        compute = state.policy.compute
        rate = self._operations / team.size / seconds
        reasons = [line for part in team.gather(lambda: self._reasons) for line in part]
        self.unreadable += len(reasons)
        self.newest = {
            "step": state.step,
            "epoch": state.step // self._work.data.steps_per_epoch,
            "loss": value if math.isfinite(value) else None,
            "grad_norm": float(self._norm) / norms if norms else None,
            "lr": state.optimizer.param_groups[0]["lr"],
            "policy": str(state.policy),
            "against_fp32": against_fp32,
            "effects": effects,
            "loss_scale": scale.factor,
            "skipped": int(scale.skipped),
            "switched_at": scale.switched_at,
            "unreadable": self.unreadable,
            "stalled_weights": stalled.weights if stalled else None,
            "stalled_ema": stalled.average if stalled else None,
            "seconds_per_step": round(seconds, 5),
            "samples_per_second": round(self._samples / seconds, 2),
            "memory_mb": round(peak_memory_mb(state.device), 1),
            # Against the rate of products that was measured here, not one from a data sheet.
            "mfu": round(rate / probe(state.device).products_per_second(compute), 3),
        }
        notes = [f"{line}; another item stands in for it" for line in dict.fromkeys(reasons) if line not in self._told]
        self._told.update(reasons)
        notes += [f"step {state.step}: {line}" for line in (stalled.lines() if stalled else [])]
        self._loss.zero_()
        self._norm.zero_()
        self._norms.zero_()
        self._reasons = []
        self._steps, self._since = 0, time.perf_counter()
        return self.newest, notes


def told(record: dict[str, Any]) -> str:
    """A line of the log, for people."""
    loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
    return (
        f"step {record['step']}: loss {loss}  {record['samples_per_second']:.1f} samples/s  "
        f"{record['memory_mb']:.0f} MB  {record['mfu']:.0%} of peak"
    )


class Logs:
    """log.jsonl in the folder of a run, and the services that were asked for. A run that goes on from an earlier step
    loses the lines after it, and any that cannot be read."""

    def __init__(self, run: Path, *, tensorboard: bool = False, wandb: bool = False) -> None:
        self._run, self._path = run, run / "log.jsonl"
        self._tensorboard, self._wandb = tensorboard, wandb
        self._services: list[_TensorBoard | _WandB] = []

    def open(self, step: int, network: str, settings: dict[str, Any]) -> None:
        """Begin after step `step` of a run with `settings`. Raises InputError when a service is not installed."""
        if self._tensorboard:
            self._services.append(_TensorBoard(self._run, step))
        if self._wandb:
            self._services.append(_WandB(self._run, {**settings, "network": network}))
        with file_errors(self._path):
            content = self._path.read_text(errors="replace") if self._path.exists() else ""
        kept = [line for line in content.splitlines() if (number := _step_of(line)) is not None and number <= step]
        write_durably(self._path, "".join(f"{line}\n" for line in kept).encode())

    def write(self, record: dict[str, Any]) -> None:
        with file_errors(self._path), self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        for service in self._services:
            service.write(record)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        for service in self._services:
            service.close()


def _step_of(line: str) -> int | None:
    """The step of a line of the log; None of one that whatever ended the process cut off."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


class _TensorBoard:
    def __init__(self, run: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError("tensorboard: is not installed; pip install 'halfstep[tensorboard]'") from error
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, (int, float)) and name != "step":
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, run: Path, settings: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise InputError("wandb: is not installed; pip install 'halfstep[wandb]'") from error
        identity = run / "wandb-id"  # names of runs repeat in other folders
        if not identity.exists():
            write_durably(identity, uuid.uuid4().hex.encode())
        self._run = wandb.init(
            project="halfstep",
            name=run.name,
            id=identity.read_text(),
            resume="allow",
            dir=str(run),
            config=settings,
        )

    def write(self, record: dict[str, Any]) -> None:
        self._run.log({k: v for k, v in record.items() if isinstance(v, (int, float))}, step=record["step"])

    def close(self) -> None:
        self._run.finish()


def forward_operations(about: About) -> int:
    """Floating-point operations of one sample through the network, counted on tensors without storage; twice as many
    where the field is a gradient."""
    gradient = about.config.get("energy", "none") != "none"
    about = replace(about, config={**about.config, "energy": "none"}) if gradient else about
    with torch.device("meta"):
        network = about.build().to("meta")
        arguments = about.family.example(network)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network.eval()(*arguments)
    return int(counter.get_total_flops()) * (2 if gradient else 1)
