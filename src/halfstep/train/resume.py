"""Where a run begins, and whether it may: at its newest checkpoint, at weights that are given, or anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from halfstep.errors import InputError, some
from halfstep.models import About, Checkpoint, read_checkpoint
from halfstep.models.weights import load_exactly, require_fitting
from halfstep.precision import PrecisionPolicy, Settled, Trial, settle
from halfstep.progress import Progress
from halfstep.settings import differences, require_same
from halfstep.team import Team
from halfstep.train.checkpoint import Saved, newest, restore
from halfstep.train.config import MAY_CHANGE, TrainConfig
from halfstep.train.data import TrainingData
from halfstep.train.state import TrainState
from halfstep.train.trial import step_trial


def begin(
    config: TrainConfig, data: TrainingData, device: torch.device, team: Team, progress: Progress
) -> tuple[TrainState, About]:
    """The state to go on from. Raises InputError when the folder holds another run, or weights do not fit."""
    about, saved, start, lines = _look(config, data, team)
    for line in lines:
        progress.note(line)
    trial = partial(step_trial, config, about, data, device, team.size)
    policy, notes = team.on_leader(lambda: _policy(config.precision, saved, device, trial, sharded=config.fsdp))
    for line in notes:
        progress.note(line)
    torch.manual_seed(config.global_seed)
    network = about.build()
    if start is not None:
        load_exactly(network, start.weights, start.path)
        if start.ema is not None:
            require_fitting(network, start.ema, start.path)
    state = TrainState(network, policy, config.updates, device)
    if saved is not None:
        restore(state, saved)
    elif start is not None:
        state.restore(start.ema or start.weights, start.moments, start.updates, start.path)
    return state, about


def would_begin(config: TrainConfig, data: TrainingData, device: torch.device) -> tuple[About, Settled]:
    """The network that a run of one process would train, and in what. Raises InputError where `begin` would."""
    about, saved, _, _ = _look(config, data, Team())
    trial = partial(step_trial, config, about, data, device)
    settled = _policy(config.precision, saved, device, trial, sharded=config.fsdp)
    with torch.device("meta"):
        about.build()
    return about, settled


def _look(
    config: TrainConfig, data: TrainingData, team: Team
) -> tuple[About, Saved | None, Checkpoint | None, list[str]]:
    """The network, what is in the folder, the weights to begin with, and lines on what may differ and does."""
    about = replace(
        config.about(data.latent_shape, data.num_classes),
        latents=data.spec,
        classes=data.classes,
        spacing=data.spacing,
    )
    saved = newest(config.folder)
    if saved is not None:
        return about, saved, saved.checkpoint, _require_same_run(config, data, saved, team)
    if config.ckpt is None:
        return about, None, None, []
    start = read_checkpoint(config.ckpt, assumed=about.config)
    _require_fitting(start, about, data)
    return about, None, start, []


def facts_of(settings: dict[str, Any], data: TrainingData, team: Team) -> dict[str, Any]:
    """What a checkpoint notes of its run, so that this module can tell whether another call is the same run."""
    return {
        "config": settings,
        "data": data.identity,
        "items": len(data),
        "items_per_step": data.items_per_step,
        "processes": team.size,
    }


def _policy(
    precision: str,
    saved: Saved | None,
    device: torch.device,
    trial: Callable[[], Trial | None],
    *,
    sharded: bool,
) -> Settled:
    """That which is asked for; a run goes on in what it was trained in."""
    wanted = PrecisionPolicy.parse(precision)
    if sharded and wanted.islands:
        raise InputError("--fsdp: sharded layers have weights of one type; leave the policy's islands out")
    if wanted.params == "fp16":
        raise InputError("precision: fp16 weights cannot be trained; use 16-mixed (--use-amp), bf16-mixed or bf16-true")
    if saved is None:
        return settle(wanted, device, "train", trial=trial)
    before = PrecisionPolicy.parse(saved.facts["policy"])
    if wanted == PrecisionPolicy.parse(saved.facts["config"]["precision"]):
        wanted = PrecisionPolicy.parse("auto")  # the run may have left what was asked for since: see switch_to_bf16
    policy, notes = settle(wanted, device, "train", kept=before)
    if replace(policy, storage=before.storage) != before:
        notes = (*notes, f"goes on in {policy}; up to step {saved.facts['step']} it was {before}")
    return Settled(policy, notes)


def _require_same_run(config: TrainConfig, data: TrainingData, saved: Saved, team: Team) -> list[str]:
    """Raise InputError when the run in the config's folder is another one; lines on what may differ and does."""
    folder, facts, now = config.folder, saved.facts, config.document()
    # Settings that are younger than the checkpoint had their defaults then.
    silent = {name: field.get_default(call_default_factory=True) for name, field in type(config).model_fields.items()}
    before = {**{name: value for name, value in silent.items() if name in now}, **facts["config"]}
    # The checkpoint that a run started from need not be named again.
    kept = MAY_CHANGE if config.ckpt is not None else MAY_CHANGE | {"ckpt"}
    advice = "give the same, or another run_name"
    require_same(folder, "run", before, now, may_differ=kept | config.places.keys(), advice=advice)
    then = saved.checkpoint.about
    if then.latents is not None and (other := data.spec.differences(then.latents)):
        raise InputError(f"{folder}: was trained on other latents: {'; '.join(other)}; give a new run_name")
    if then.classes != data.classes:
        raise InputError(
            f"{folder}: was trained with the classes {some(then.classes)}, the data has {some(data.classes)}: labels "
            "would mean something else; give a new run_name"
        )
    if facts["items_per_step"] != data.items_per_step:
        raise InputError(
            f"{folder}: its steps have {facts['items_per_step']} items, not {data.items_per_step}; with {team.size} "
            f"processes give a global batch of {facts['items_per_step']}, or another run_name"
        )
    lines = _on_moved_data(folder, config.places, data, facts)
    if facts["processes"] != team.size:
        lines.append(
            f"goes on with {team.size} processes, before with {facts['processes']}: the same items in each step, but "
            "other noise"
        )
    return lines


def _on_moved_data(folder: Path, places: dict[str, str], data: TrainingData, facts: dict[str, Any]) -> list[str]:
    """Data may lie in another place, and may have grown where it lay; not both, because nobody could tell it from other
    data then."""
    moved = _moved(facts["config"], places)
    # Older checkpoints do not tell the sequences; they tell how many items there were.
    same = facts["data"] == data.identity if "data" in facts else facts["items"] == len(data)
    if moved and not same:
        raise InputError(
            f"{folder}: was trained on other data ({'; '.join(moved)}, and other sequences are there: "
            f"{facts['items']} items then, {len(data)} now); name the same data, or another run_name"
        )
    if not same:
        return [
            f"the data has changed since ({facts['items']} items then, {len(data)} now): the steps to come are of the "
            "new one"
        ]
    return [f"{line}; it holds the same sequences" for line in moved]


def _moved(before: dict[str, Any], places: dict[str, str]) -> list[str]:
    """The places that are others now, not only other spellings."""
    then: dict[str, str] = {}
    for name in places:
        value: Any = before
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        then[name] = str(value)
    return differences(
        *({n: p if "://" in p else str(Path(p).resolve()) for n, p in d.items()} for d in (then, places))
    )


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
    if start.about.latents is not None and (other := data.spec.differences(start.about.latents)):
        raise InputError(f"{start.path}: was trained on other latents than the data's: {'; '.join(other)}")
    if start.about.name != about.name:
        raise InputError(f"{start.path}: holds {start.about.name}; {about.name} was asked for")
    for name in about.family.silent:
        if name in ("uncond", "energy") and theirs[name] != ours[name]:
            raise InputError(f"{start.path}: was trained with {name} {theirs[name]}, not {ours[name]}; give the same")
