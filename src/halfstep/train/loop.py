"""train(config): the one loop."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from halfstep.autoencoders import Autoencoder
from halfstep.errors import InputError, NumericsError, some
from halfstep.files import alone, claim, write_durably
from halfstep.models import About, Checkpoint, read_checkpoint
from halfstep.models.weights import load_exactly, require_fitting
from halfstep.precision import PrecisionPolicy, open_device, usable
from halfstep.team import Team
from halfstep.train.checkpoint import Saved, newest, remove_unfinished, restore, save
from halfstep.train.config import MAY_CHANGE, TrainConfig
from halfstep.train.data import Items, TrainingData, open_data, prepared_encoder
from halfstep.train.health import Movement, find_failure, not_finite_item
from halfstep.train.meter import Logs, Meter
from halfstep.train.state import COLLAPSE, TrainState


class Progress:
    """Told how training goes; the base class keeps silent."""

    def start(self, step: int, steps: int) -> None:
        """Training begins at `step` and ends at `steps`."""

    def step(self, step: int) -> None:
        """One more step is done."""

    def log(self, record: dict[str, Any]) -> None:
        """The newest line of the log."""

    def note(self, line: str) -> None:
        """Something the user should know."""


@dataclass(frozen=True)
class TrainReport:
    """Where a run stands. `loss` is the mean since the last line of the log; None when there was nothing to do."""

    run: str
    network: str
    step: int
    loss: float | None
    policy: str
    skipped: int
    samples_per_second: float | None
    checkpoint: str


def train(config: TrainConfig, progress: Progress | None = None) -> TrainReport:
    """Train, from where an earlier call with the same config stopped, to `config.steps` or `config.epochs`.

    On a CPU, stopping and going on gives the same bits as never having stopped. Under torchrun the processes share each
    step; a script of one's own then ends with `halfstep.team.leave`. Ctrl-C and SIGTERM end it after a step, with a
    checkpoint, by KeyboardInterrupt. Raises InputError for data or a checkpoint that do not fit, NumericsError when a
    loss is not finite, naming step, layer and type.
    """
    progress = progress or Progress()
    with Team.join() as team, ExitStack() as stack:
        device = open_device(team.device(config.device))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        team.on_leader(lambda: claim(config.folder, "training run", ("config.json",)))
        team.on_leader(lambda: stack.enter_context(alone(config.folder)))
        team.on_leader(lambda: remove_unfinished(config.folder))
        data = open_data(config)
        state, about = _begin(config, data, device, team, progress if team.leads else Progress())
        data = prepared_encoder(data, device, state.policy)
        logs = Logs(config)
        team.on_leader(lambda: stack.enter_context(logs).open(state.step, about.name))
        return _run(config, data, state, about, team, progress, logs)


def _run(
    config: TrainConfig,
    data: TrainingData,
    state: TrainState,
    about: About,
    team: Team,
    progress: Progress,
    logs: Logs,
) -> TrainReport:
    run = config.folder
    per_step = data.items_per_step(team.size)
    last = config.steps or config.epochs * (len(data) // per_step)
    facts = _facts(config, data, per_step, team)
    meter = Meter(about, state, per_step, data.goals)
    batches = data.batches(state.step, team.rank, team.size, state.device)
    progress.start(state.step, last)
    with _stop_request() as stop:
        while state.step < last and not stop:
            items = next(batches)  # before the seed: a new epoch's loader draws from the generator
            torch.manual_seed(_seed(config, state.step, team))
            logging = (state.step + 1) % config.log_every == 0 or state.step + 1 == last
            movement = Movement(state) if logging else None
            microbatches = _microbatches(items, config, state.device)
            for number, microbatch in enumerate(microbatches):
                with state.microbatch(last=number + 1 == len(microbatches)):
                    loss = data.losses(state.model, microbatch).mean() / len(microbatches)
                    state.backward(loss)
                meter.add(loss)
            state.update()
            meter.count()
            progress.step(state.step)
            if state.may_overflow and state.step % COLLAPSE == 0 and state.collapsed:
                _require_finite(config, data, state, team)
                state.switch_to_bf16()
                progress.note(
                    f"step {state.step}: the loss scale collapsed (fp16 overflowed in {COLLAPSE} steps in a row); "
                    f"training goes on in {state.policy}"
                )
            if movement is not None:  # only here, and in fp16 there, does the host wait for the device
                _require_finite(config, data, state, team)
                record = meter.record(data, movement, team)
                if team.leads:
                    logs.write(record)
                    progress.log(record)
            stop.agree()
            if state.step % config.ckpt_every == 0 and state.step < last:
                _require_finite(config, data, state, team)
                save(state, about, run, team, facts)
    stop.hear()
    _require_finite(config, data, state, team)
    checkpoint = save(state, about, run, team, facts)
    if stop and state.step < last:
        progress.note(f"stopped after step {state.step}; the same command goes on from {checkpoint}")
        raise KeyboardInterrupt
    newest_record = meter.newest or {}
    return TrainReport(
        run=str(run),
        network=about.name,
        step=state.step,
        loss=newest_record.get("loss"),
        policy=str(state.policy),
        skipped=int(state.skipped),
        samples_per_second=newest_record.get("samples_per_second"),
        checkpoint=str(checkpoint),
    )


def _begin(
    config: TrainConfig, data: TrainingData, device: torch.device, team: Team, progress: Progress
) -> tuple[TrainState, About]:
    """The state to go on from: the run's newest checkpoint, the weights that `ckpt` names, or a new network."""
    data.items_per_step(team.size)  # refuse before anything is written
    saved = newest(config.folder)
    about = _about(config, data)
    start: Checkpoint | None = None
    if saved is not None:
        _require_same_run(config, data, saved, team, progress)
        start = saved.checkpoint
    elif config.ckpt is not None:
        start = read_checkpoint(config.ckpt, assumed=about.config)
        _require_fitting(start, about, data)
    policy = _policy(config, saved, device, team, progress)
    torch.manual_seed(config.global_seed)
    network = about.build()
    if start is not None:
        load_exactly(network, start.weights, start.path)
        if start.ema is not None:
            require_fitting(network, start.ema, start.path)
    if data.encoder is not None:
        progress.note(_hint(config, data, data.encoder))
    if config.fsdp and team.size == 1:
        progress.note("fsdp: has no effect in one process; run under torchrun")
    state = TrainState(network, policy, config, device)
    if saved is not None:
        restore(state, saved)
    elif start is not None:
        state.restore(start.ema or start.weights, start.moments, start.updates, start.path)
    team.on_leader(lambda: _write_config(config))
    return state, about


def _hint(config: TrainConfig, data: TrainingData, encoder: Autoencoder) -> str:
    """How pixels become latents once and for all."""
    assert data.spec.pixels is not None
    size = f"{data.spec.pixels.width}x{data.spec.pixels.height}"
    moments = " --moments" if encoder.variational else ""
    flips = " --mirror" if config.network == "EqM" else ""
    return (
        f"{config.data_path or 'datasets'}: pixels, encoded by {config.autoencoder} again in every step; "
        f"`halfstep encode -i {config.data_path or 'PIXELS'} -o LATENTS --autoencoder {config.autoencoder} "
        f"--size {size}{moments}{flips}` once and training on LATENTS is faster"
    )


def _write_config(config: TrainConfig) -> None:
    write_durably(config.folder / "config.json", config.model_dump_json(indent=1).encode())


def _about(config: TrainConfig, data: TrainingData) -> About:
    about = config.about(data.latent_shape, data.num_classes if config.network == "EqM" else 0)
    return replace(about, latents=data.spec, classes=data.classes, spacing=data.spacing)


def _policy(
    config: TrainConfig, saved: Saved | None, device: torch.device, team: Team, progress: Progress
) -> PrecisionPolicy:
    """That of the config, resolved by process 0 for all; a run goes on in what it was trained in."""
    wanted = PrecisionPolicy.parse(config.precision)
    if config.fsdp and wanted.islands:
        raise InputError("fsdp: sharded layers have weights of one type; leave the policy's islands out")
    if wanted.params == "fp16":
        raise InputError("precision: fp16 weights cannot be trained; use 16-mixed (--use-amp), bf16-mixed or bf16-true")
    if saved is not None:
        now = PrecisionPolicy.parse(saved.facts["policy"])
        if wanted.is_auto or wanted == PrecisionPolicy.parse(saved.facts["config"]["precision"]):
            wanted = now
        elif replace(wanted, storage=now.storage) != now:
            progress.note(f"goes on in {wanted}; up to step {saved.facts['step']} it was {now}")
    policy, line = team.on_leader(lambda: usable(wanted.resolve(device, "train"), device, "train"))
    if line is not None and not wanted.is_auto:
        progress.note(line)
    return policy


def _require_same_run(config: TrainConfig, data: TrainingData, saved: Saved, team: Team, progress: Progress) -> None:
    """Raise InputError when the run in this folder is another one; say what is allowed to differ and does."""
    before, now = saved.facts["config"], json.loads(config.model_dump_json())
    # The checkpoint that a run started from need not be named again.
    kept = MAY_CHANGE if config.ckpt is not None else MAY_CHANGE | {"ckpt"}
    changed = [n for n in now if n not in kept and before.get(n) != now[n]]
    if changed:
        told = "; ".join(f"{name} was {before.get(name)}, not {now[name]}" for name in changed)
        raise InputError(
            f"{config.folder}: holds a run with other settings ({told}); give the same, or another run_name"
        )
    then = saved.checkpoint.about
    if then.latents is not None and (differences := data.spec.differences(then.latents)):
        raise InputError(
            f"{config.folder}: was trained on other latents: {'; '.join(differences)}; give a new run_name"
        )
    if then.classes != data.classes:
        raise InputError(
            f"{config.folder}: was trained with the classes {some(then.classes)}, the data has {some(data.classes)}: "
            "labels would mean something else; give a new run_name"
        )
    batch = data.items_per_step(team.size)
    if saved.facts["items_per_step"] != batch:
        raise InputError(
            f"{config.folder}: its steps have {saved.facts['items_per_step']} items, not {batch}; with {team.size} "
            f"processes give a global batch of {saved.facts['items_per_step']}, or another run_name"
        )
    if saved.facts["processes"] != team.size:
        progress.note(
            f"goes on with {team.size} processes, before with {saved.facts['processes']}: the same items in each step, "
            "but other noise"
        )
    if saved.facts["items"] != len(data):
        progress.note(f"the data has {len(data)} items now, {saved.facts['items']} before: epochs are other ones")


def _require_fitting(start: Checkpoint, about: About, data: TrainingData) -> None:
    """Raise InputError when weights to start from are of other latents or of another network."""
    theirs, ours = start.about.config, about.config
    if start.about.network != about.network:
        raise InputError(f"{start.path}: holds {start.about.name}; {about.name} was asked for")
    if theirs["in_channels"] != ours["in_channels"]:
        raise InputError(
            f"{start.path}: is of latents with {theirs['in_channels']} channels; the data has {ours['in_channels']} "
            f"({data.spec.autoencoder})"
        )
    if start.about.latents is not None and (differences := data.spec.differences(start.about.latents)):
        raise InputError(f"{start.path}: was trained on other latents than the data's: {'; '.join(differences)}")
    if start.about.name != about.name:
        raise InputError(f"{start.path}: holds {start.about.name}; {about.name} was asked for")
    for name in ("uncond", "energy"):
        if theirs.get(name) != ours.get(name):
            raise InputError(f"{start.path}: was trained with {name} {theirs[name]}, not {ours[name]}; give the same")


def _facts(config: TrainConfig, data: TrainingData, per_step: int, team: Team) -> dict[str, Any]:
    """What state.json says beside the state."""
    return {
        "config": json.loads(config.model_dump_json()),
        "items": len(data),
        "items_per_step": per_step,
        "processes": team.size,
    }


def _require_finite(config: TrainConfig, data: TrainingData, state: TrainState, team: Team) -> None:
    """Raise NumericsError when a step since the last look was not finite and the range of fp16 does not explain it. All
    processes find it at the same step."""
    if state.collapsed and not state.may_overflow:
        raise NumericsError(
            f"step {state.step}: the gradients of {COLLAPSE} steps in a row are not finite, in {state.policy}, though "
            "the loss is; lower the loss scale or the learning rate, and go on from the last checkpoint"
        )
    bad = int(state.first_bad_step)
    if bad < 0:
        return
    items = next(data.batches(bad, team.rank, team.size, state.device))
    number = not_finite_item(items)
    where = None if number is None else f"an item of {data.sequence(bad, team.rank, team.size, number)!r} in the data"
    found = team.gather(lambda: where)
    if not any(found):
        if state.may_overflow:
            state.first_bad_step.fill_(-1)
            return
        torch.manual_seed(_seed(config, bad, team))
        microbatches = _microbatches(items, config, state.device)
        failure = find_failure(state, [partial(_losses_of, data, microbatch) for microbatch in microbatches])
        found = team.gather(lambda: failure)
    told = next((line for line in found if line), "something, not found again,")
    kept = newest(config.folder)
    advice = f"the last good checkpoint is {kept.checkpoint.path}" if kept else "there is no checkpoint yet"
    raise NumericsError(
        f"step {bad + 1}: {told} is not finite, in {state.policy}; training stopped before anything was moved by it, "
        f"{advice}"
    )


def _losses_of(data: TrainingData, microbatch: Items, network: Any) -> torch.Tensor:
    return data.losses(network, microbatch)


def _microbatches(items: Items, config: TrainConfig, device: torch.device) -> list[Items]:
    """A step's items on the device, in the parts that go through the network one after the other."""
    moved = [item.to(device, non_blocking=True) for item in items]
    return list(zip(*(item.chunk(config.gradient_accumulation_steps) for item in moved), strict=True))


def _seed(config: TrainConfig, step: int, team: Team) -> int:
    """Noise depends on (seed, step, process) alone: any step can be computed again."""
    return int(np.random.SeedSequence((config.global_seed, step, team.rank)).generate_state(1, np.uint64)[0] >> 1)


class _StopRequest:
    """True once this process was asked to stop. Several processes agree on it, one step later, so that none waits for
    the others' word."""

    def __init__(self) -> None:
        self._asked = False
        self._agreed = False
        self._told: tuple[torch.Tensor, Any] | None = None

    def ask(self, number: int, _: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: at once
        self._asked = True

    def agree(self) -> None:
        """Tell the others, and hear what they told a step ago."""
        if not dist.is_initialized():
            return
        self.hear()
        asked = torch.tensor(int(self._asked))
        self._told = asked, dist.all_reduce(asked, dist.ReduceOp.MAX, async_op=True)

    def hear(self) -> None:
        """Wait for what was told last."""
        if self._told is not None:
            heard, work = self._told
            work.wait()
            self._agreed, self._told = bool(heard), None

    def __bool__(self) -> bool:
        return self._agreed or (self._asked and not dist.is_initialized())


@contextmanager
def _stop_request() -> Iterator[_StopRequest]:
    """Take SIGINT and SIGTERM as requests to stop after a step."""
    stop = _StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
