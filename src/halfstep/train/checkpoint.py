"""A run's folder: checkpoints, each of them whole or not there, and what is needed to go on exactly.

RUN/config.json                      what is trained and how
RUN/log.jsonl                        a line every `log_every` steps
RUN/checkpoints/0000100/             after 100 steps:
    model.safetensors ema.safetensors    fp32, by the published names
    optimizer.safetensors                AdamW's moments
    state.json                           step (from which epoch, place in the data and noise follow), policy, loss
                                         scale, settings
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from halfstep.errors import FileError, InputError, NumericsError, StoreError, some
from halfstep.files import file_errors, is_unfinished, new_folder
from halfstep.models import About, Checkpoint, read_checkpoint
from halfstep.models.family import StateDict
from halfstep.models.weights import newest_checkpoint
from halfstep.team import Team
from halfstep.train.state import TrainState

_FORMAT, _VERSION = "halfstep-training", 1
_FACTS = frozenset(
    {"step", "updates", "policy", "scaler", "skipped", "skipped_in_row", "switched_at"}
    | {"config", "items", "items_per_step", "processes"}
)
_OLDER = "remove it to go on from an older one"


@dataclass(frozen=True)
class Saved:
    """A checkpoint of this package: the weights, and `facts`, the content of state.json."""

    checkpoint: Checkpoint
    facts: dict[str, Any]


def save(state: TrainState, about: About, run: Path, team: Team, facts: dict[str, Any]) -> Path:
    """Write the checkpoint of this step, or find it there. All processes call it, process 0 writes."""
    folder = run / "checkpoints" / f"{state.step:07d}"
    if team.on_leader(folder.exists):
        return folder
    weights, ema, moments = state.full_weights(), state.full_ema(), state.full_moments()
    values = {
        "format": _FORMAT,
        "version": _VERSION,
        "updates": state.updates,
        **state.scale.state_dict(),
        **facts,
    }

    def write() -> None:
        # A learning rate that is too high can leave numbers that no gradient has told of yet.
        bad = [name for name, weight in weights.items() if not torch.isfinite(weight).all()]
        if bad:
            raise NumericsError(f"{folder}: not written, {some(bad, 3)} are not finite; older checkpoints are intact")
        with new_folder(folder) as unfinished:
            (unfinished / "state.json").write_text(json.dumps(values, indent=1))
            _write(unfinished / "model.safetensors", weights, about)
            _write(unfinished / "ema.safetensors", ema, about)
            _write(unfinished / "optimizer.safetensors", moments, None)

    team.on_leader(write)
    return folder


def _write(path: Path, tensors: StateDict, about: About | None) -> None:
    try:
        save_file(tensors, path, None if about is None else about.to_metadata())
    except SafetensorError as error:  # as which it reports a full disk
        raise FileError(f"{path}: cannot be written ({error}); older checkpoints are intact") from error
    shutil.copymode(path.with_name("state.json"), path)  # the library makes files for their owner's eyes alone


def newest(run: Path) -> Saved | None:
    """The run's newest checkpoint, or None. Raises StoreError when it is damaged."""
    folder = newest_checkpoint(run)
    if folder is None:
        return None
    try:
        facts = json.loads((folder / "state.json").read_text())
        if not isinstance(facts, dict) or (facts.get("format"), facts.get("version")) != (_FORMAT, _VERSION):
            raise ValueError(f"state.json is not {_FORMAT} {_VERSION}")
        if absent := _FACTS - facts.keys():
            raise ValueError(f"state.json lacks {some(sorted(absent), 3)}")
        if not (folder / "ema.safetensors").exists():
            raise ValueError("ema.safetensors is not there")
        return Saved(read_checkpoint(folder), facts)
    except (OSError, ValueError) as error:
        raise StoreError(f"{folder}: damaged ({error}); {_OLDER}") from error


def restore(state: TrainState, saved: Saved) -> None:
    """Put a state whose network has the saved weights back to where it was. Raises StoreError when the checkpoint is
    damaged."""
    checkpoint, facts = saved.checkpoint, saved.facts
    assert checkpoint.ema is not None  # or it would not be one of a run
    try:
        moments = load_file(checkpoint.path / "optimizer.safetensors")
        if facts["updates"] and not moments:
            raise InputError(f"{checkpoint.path}: the optimizer's moments are missing")
        state.restore(checkpoint.ema, moments, facts["updates"], checkpoint.path)
    except (SafetensorError, OSError, InputError) as error:
        raise StoreError(f"{checkpoint.path}: damaged ({error}); {_OLDER}") from error
    state.scale.load_state_dict(facts)


def remove_unfinished(run: Path) -> None:
    """Delete what a process that was killed left half written."""
    with file_errors(run):
        for path in filter(is_unfinished, (run / "checkpoints").glob(".*")):
            shutil.rmtree(path)
