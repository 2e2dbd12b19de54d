"""train(config): the one loop."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfstep.engine import stop_request
from halfstep.errors import HalfstepError, InputError
from halfstep.files import alone, claim, write_durably
from halfstep.machine import open_device
from halfstep.models import About
from halfstep.precision import COLLAPSE, Movement
from halfstep.progress import SILENT, Progress
from halfstep.team import Team
from halfstep.train.checkpoint import remove_unfinished, save
from halfstep.train.conditions import Conditions
from halfstep.train.config import TrainConfig
from halfstep.train.data import open_data
from halfstep.train.health import require_finite
from halfstep.train.measured import NAME as MEASURED_NAME
from halfstep.train.measured import against_fp32, conditions, read_measured
from halfstep.train.memory import fitted
from halfstep.train.meter import Logs, Meter, told
from halfstep.train.resume import begin, facts_of
from halfstep.train.state import TrainState
from halfstep.train.work import StepWork

MARKS = ("config.json", MEASURED_NAME)  # files that tell the folder of a run


@dataclass(frozen=True)
class TrainReport:
    """Where a run stands. `loss` is the mean since the last line of the log; None when there was nothing to do.
    `unreadable`: items that others stood in for, because they could not be read. `against_fp32`: how many times as fast
    as fp32 the policy is ("speedup") and its share of the "memory", where `measure` found that out for such a run here.
    """

    run: str
    network: str
    step: int
    loss: float | None
    policy: str
    skipped: int
    samples_per_second: float | None
    checkpoint: str
    unreadable: int = 0
    against_fp32: dict[str, float] | None = None


def train(config: TrainConfig, progress: Progress = SILENT) -> TrainReport:
    """Train, from where an earlier call with the same config stopped, to `config.steps` or `config.epochs`.

    On a CPU, stopping and going on gives the same bits as never having stopped. Under torchrun the processes share each
    step; a script of one's own then ends with `halfstep.team.leave`. Ctrl-C and SIGTERM end it after a step, with a
    checkpoint, by KeyboardInterrupt. Raises InputError for data or a checkpoint that do not fit, NumericsError when a
    loss is not finite, naming step, layer and type. The caller's random generators are as they were.
    """
    with Team.join() as team, ExitStack() as stack:
        device = open_device(team.device(config.device))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        progress = progress if team.leads else SILENT
        team.on_leader(lambda: _claim(config.folder))
        team.on_leader(lambda: stack.enter_context(alone(config.folder)))
        team.on_leader(lambda: remove_unfinished(config.folder))
        data = open_data(config, team.size)
        if config.memory is not None:
            config, line = fitted(config, data, device, team.size)
            progress.note(line)
        state, about = begin(config, data, device, team, progress)
        if data.encoder is not None:
            progress.note(
                f"{config.data_path or 'datasets'}: pixels, encoded by {config.autoencoder} again in every step; "
                f"`{config.encode_command(variational=data.encoder.autoencoder.variational)}` once and training on "
                "LATENTS is faster"
            )
        if config.fsdp and team.size == 1:
            progress.note("--fsdp has no effect in one process; run under torchrun")
        team.on_leader(
            lambda: write_durably(config.folder / "config.json", json.dumps(config.document(), indent=1).encode())
        )
        objective = config.family.objective(config.own_settings)
        parts = config.gradient_accumulation_steps
        work = StepWork(data.prepared(device, state.policy), objective, team, device, config.global_seed, parts)
        logs = Logs(config.folder, tensorboard=config.tensorboard, wandb=config.wandb)
        team.on_leader(lambda: stack.enter_context(logs).open(state.step, about.name, config.document()))
        measured = team.on_leader(lambda: read_measured(config.folder))
        return _run(config, state, about, work, progress, logs, measured)


def _claim(folder: Path) -> None:
    """Raise InputError when `folder` holds something else, or when its weights could not be read again."""
    if os.fsencode(folder) != str(folder).encode(errors="replace"):
        raise InputError(f"{folder}: is not UTF-8, and safetensors reads no such name; name another folder for the run")
    claim(folder, "training run", MARKS)


def _run(
    config: TrainConfig,
    state: TrainState,
    about: About,
    work: StepWork,
    progress: Progress,
    logs: Logs,
    measured: dict[str, Any] | None,
) -> TrainReport:
    run, team = config.folder, work.team

    def saved_by_precision() -> dict[str, float] | None:
        now = conditions(config, about, work.data, state.policy, state.device, team.size)
        return against_fp32(measured, now)

    last = config.steps or config.epochs * work.data.steps_per_epoch
    facts = facts_of(config.document(), work.data, team)
    meter = Meter(about, state, work)
    heard = Conditions(about.family.items, work)
    batches = work.batches(state.step)
    progress.start(last, state.step)
    with stop_request() as stop:
        while state.step < last and not stop:
            try:
                batch = next(batches)  # before the noise: a new epoch's loader draws from the generator
            except HalfstepError:
                if team.size == 1:  # several processes are not at one point here, as saving needs them to be
                    require_finite(state, work, run)
                    save(state, about, run, team, facts)
                raise
            microbatches = work.begin(state.step, batch.items)
            logging = (state.step + 1) % config.log_every == 0 or state.step + 1 == last
            movement = Movement(state.weights, state.ema) if logging else None
            for number, microbatch in enumerate(microbatches):
                with state.microbatch(last=number + 1 == len(microbatches)):
                    loss = work.losses(state.model, microbatch).mean() / len(microbatches)
                    state.backward(loss)
                meter.add(loss)
            state.update()
            meter.count(batch)
            progress.advance()
            if state.scale.may_overflow and state.step % COLLAPSE == 0 and state.scale.collapsed:
                require_finite(state, work, run)
                state.switch_to_bf16()
                progress.note(
                    f"step {state.step}: the loss scale collapsed (fp16 overflowed in {COLLAPSE} steps in a row); "
                    f"training goes on in {state.policy}"
                )
            if movement is not None:  # only here, and in fp16 there, does the host wait for the device
                require_finite(state, work, run)
                effects, ignored = heard.look(state.step, state.model, microbatches[0])
                record, notes = meter.record(movement, saved_by_precision(), effects)
                if team.leads:
                    logs.write(record)
                progress.show(told(record))
                for line in (*notes, *ignored):
                    progress.note(line)
            stop.agree()
            if state.step % config.ckpt_every == 0 and state.step < last:
                require_finite(state, work, run)
                save(state, about, run, team, facts)
    stop.hear()
    require_finite(state, work, run)
    checkpoint = save(state, about, run, team, facts)
    if stop and state.step < last:
        progress.note(f"stopped after step {state.step}; the same command goes on from {checkpoint}")
        raise KeyboardInterrupt
    newest: dict[str, Any] = meter.newest or {}
    return TrainReport(
        run=str(run),
        network=about.name,
        step=state.step,
        loss=newest.get("loss"),
        policy=str(state.policy),
        skipped=int(state.scale.skipped),
        samples_per_second=newest.get("samples_per_second"),
        checkpoint=str(checkpoint),
        unreadable=meter.unreadable,
        against_fp32=saved_by_precision(),
    )
