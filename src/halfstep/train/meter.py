"""How training goes, as numbers: a line of JSON every `log_every` steps, and the same to TensorBoard or W&B."""

from __future__ import annotations

import json
import math
import resource
import time
import uuid
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from halfstep.errors import InputError
from halfstep.files import file_errors, write_durably
from halfstep.models import About
from halfstep.precision import probe
from halfstep.team import Team
from halfstep.train.config import TrainConfig
from halfstep.train.data import TrainingData
from halfstep.train.health import Movement
from halfstep.train.state import TrainState

_BACKWARD = 2  # as many operations again for the gradients of inputs, and of weights


class Meter:
    """Sums up, on the device, what happens between two lines of the log."""

    def __init__(self, about: About, state: TrainState, items_per_step: int, samples_per_item: int) -> None:
        self._state = state
        self._items, self._samples = items_per_step, items_per_step * samples_per_item
        self._operations = forward_operations(about) * (1 + _BACKWARD) * self._samples
        self._loss = torch.zeros((), device=state.device)
        self._norm = torch.zeros((), device=state.device)
        self._norms = torch.zeros((), device=state.device)
        self._steps = 0
        self._since = time.perf_counter()
        self.newest: dict[str, Any] | None = None

    def add(self, loss: torch.Tensor) -> None:
        """A micro-batch's part of a step's mean loss."""
        self._loss += loss.detach()

    def count(self) -> None:
        """A step is done."""
        norm = self._state.grad_norm
        finite = torch.isfinite(norm)  # it is not where an update was skipped
        self._norm += torch.where(finite, norm, 0)
        self._norms += finite
        self._steps += 1

    def record(self, data: TrainingData, movement: Movement, team: Team) -> dict[str, Any]:
        """The line for the steps since the last one, which all processes make together. Waits for the device."""
        state = self._state
        loss = self._loss / self._steps
        if team.size > 1:
            dist.all_reduce(loss)
            loss /= team.size
        value, norms = float(loss), int(self._norms)
        seconds = (time.perf_counter() - self._since) / self._steps
        stalled_weights, stalled_ema = movement.stalled(state)
        compute = state.policy.compute
        rate = self._operations / team.size / seconds
        self.newest = {
            "step": state.step,
            "epoch": state.step // (len(data) // self._items),
            "loss": value if math.isfinite(value) else None,
            "grad_norm": float(self._norm) / norms if norms else None,
            "lr": state.optimizer.param_groups[0]["lr"],
            "policy": str(state.policy),
            "loss_scale": state.scaler.get_scale() if state.scaler.is_enabled() else None,
            "skipped": int(state.skipped),
            "switched_at": state.switched_at,
            "stalled_weights": stalled_weights,
            "stalled_ema": stalled_ema,
            "seconds_per_step": round(seconds, 5),
            "samples_per_second": round(self._samples / seconds, 2),
            "memory_mb": round(_peak_memory(state.device) / 1e6, 1),
            # Against the rate of products that was measured here, not one from a data sheet.
            "mfu": round(rate / probe(state.device).products_per_second(compute), 3),
        }
        self._loss.zero_()
        self._norm.zero_()
        self._norms.zero_()
        self._steps, self._since = 0, time.perf_counter()
        return self.newest


class Logs:
    """log.jsonl in the run's folder, and the services that were asked for. A run that goes on from an earlier step
    loses the lines after it, and any that cannot be read."""

    def __init__(self, config: TrainConfig) -> None:
        self._config, self._path = config, config.folder / "log.jsonl"
        self._services: list[_TensorBoard | _WandB] = []

    def open(self, step: int, name: str) -> None:
        """Begin after step `step` of the network `name`. Raises InputError when a service is not installed."""
        if self._config.tensorboard:
            self._services.append(_TensorBoard(self._config, step))
        if self._config.wandb:
            self._services.append(_WandB(self._config, name))
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
    def __init__(self, config: TrainConfig, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError("tensorboard: is not installed; pip install 'halfstep[tensorboard]'") from error
        self._writer = SummaryWriter(str(config.folder / "tensorboard"), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, (int, float)) and name != "step":
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, config: TrainConfig, name: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise InputError("wandb: is not installed; pip install 'halfstep[wandb]'") from error
        identity = config.folder / "wandb-id"  # names of runs repeat in other folders
        if not identity.exists():
            write_durably(identity, uuid.uuid4().hex.encode())
        self._run = wandb.init(
            project="halfstep",
            name=config.folder.name,
            id=identity.read_text(),
            resume="allow",
            dir=str(config.folder),
            config={**json.loads(config.model_dump_json()), "network": name},
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
        x, t = torch.empty(1, *network.latent_shape), torch.empty(1)
        if about.network == "EqM":
            arguments: tuple[torch.Tensor, ...] = (x, t, torch.zeros(1, dtype=torch.int64))
        else:
            context = torch.empty(1, about.config["context_size"], *network.latent_shape)
            arguments = (x, t, torch.empty(1, 3), context, t)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network.eval()(*arguments)
    return int(counter.get_total_flops()) * (2 if gradient else 1)


def _peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, else the most that the process ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
