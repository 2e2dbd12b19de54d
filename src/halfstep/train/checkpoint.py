"""A run's folder: checkpoints, each of them whole or not there, and what is needed to go on exactly.

RUN/config.json                      what is trained and how
RUN/log.jsonl                        a line every `log_every` steps
RUN/checkpoints/0000100/             after 100 steps:
    model.safetensors ema.safetensors    fp32, by the published names
    optimizer.safetensors                AdamW's moments
    state.json                           step, data position, policy, loss scale, settings
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from halfstep.errors import StoreError
from halfstep.models import About, Checkpoint, read_checkpoint
from halfstep.models.weights import newest_checkpoint
from halfstep.store.commit import fsync_path, rename_durably, store_errors
from halfstep.team import Team
from halfstep.train.state import TrainState

_FORMAT, _VERSION = "halfstep-training", 1


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
        "step": state.step,
        "updates": state.updates,
        "policy": str(state.policy),
        "scaler": state.scaler.state_dict(),
        "skipped": int(state.skipped),
        "skipped_in_row": int(state.skipped_in_row),
        **facts,
    }

    def write() -> None:
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        with store_errors(folder):
            temporary.mkdir(parents=True)
            try:
                try:
                    save_file(weights, temporary / "model.safetensors", about.to_metadata())
                    save_file(ema, temporary / "ema.safetensors", about.to_metadata())
                    save_file(moments, temporary / "optimizer.safetensors")
                except SafetensorError as error:  # as which it reports a full disk
                    raise StoreError(f"{folder}: cannot be written ({error}); older checkpoints are intact") from error
                (temporary / "state.json").write_text(json.dumps(values, indent=1))
                for path in [*temporary.iterdir(), temporary]:
                    fsync_path(path)
                rename_durably(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    team.on_leader(write)
    return folder


def newest(run: Path) -> Saved | None:
    """The run's newest checkpoint, or None. Raises StoreError when it is damaged."""
    folder = newest_checkpoint(run)
    if folder is None:
        return None
    try:
        facts = json.loads((folder / "state.json").read_text())
        if facts["format"] != _FORMAT or facts["version"] != _VERSION:
            raise ValueError(f"format {facts['format']!r}, version {facts['version']}")
        return Saved(read_checkpoint(folder), facts)
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(f"{folder}: damaged ({error}); remove it to go on from an older one") from error


def restore(state: TrainState, saved: Saved) -> None:
    """Put a state whose network has the saved weights back to where it was."""
    checkpoint, facts = saved.checkpoint, saved.facts
    try:
        moments = load_file(checkpoint.path / "optimizer.safetensors")
    except (SafetensorError, OSError) as error:
        raise StoreError(
            f"{checkpoint.path}: cannot be read ({error}); remove it to go on from an older one"
        ) from error
    state.restore(checkpoint.ema or checkpoint.weights, moments, facts["updates"])
    state.step = facts["step"]
    state.skipped.fill_(facts["skipped"])
    state.skipped_in_row.fill_(facts["skipped_in_row"])
    if state.scaler.is_enabled() and facts["scaler"]:
        state.scaler.load_state_dict(facts["scaler"])


def remove_unfinished(run: Path) -> None:
    """Delete what a process that was killed left half written."""
    for path in (run / "checkpoints").glob(".*.tmp"):
        shutil.rmtree(path)
