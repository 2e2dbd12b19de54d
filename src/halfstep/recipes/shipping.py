"""From a training run to a folder that is shipped."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from halfstep.machine import device_name
from halfstep.models import Checkpoint, read_checkpoint
from halfstep.models.weights import newest_checkpoint


def write_weights(run: Path, output: Path) -> Checkpoint:
    """The run's moving average in fp16, without what is left in it of the random weights that it began with, as
    OUTPUT/model.safetensors; returns what is read from there."""
    checkpoint = read_checkpoint(run)
    assert checkpoint.ema is not None and checkpoint.ema_start is not None
    output.mkdir(parents=True, exist_ok=True)
    seed = json.loads((run / "config.json").read_text())["global_seed"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = checkpoint.about.build().state_dict()
    # An average of n steps has the share decay^n of what it began with (Kingma and Ba 2015, section 3).
    share = checkpoint.ema_start
    half = {
        name: ((value - share * first[name]) / (1 - share)).half().contiguous()
        for name, value in checkpoint.ema.items()
    }
    save_file(half, output / "model.safetensors", checkpoint.about.to_metadata())
    return read_checkpoint(output)


def nearest(some: torch.Tensor, known: torch.Tensor) -> npt.NDArray[np.float64]:
    """The root mean square distance of each of `some` [n, ...] to the nearest one of `known` [m, ...]."""
    found = torch.cdist(some.flatten(1), known.flatten(1)).min(dim=1).values / some[0].numel() ** 0.5
    distances: npt.NDArray[np.float64] = found.double().numpy()
    return distances


def write_facts(run: Path, output: Path, checkpoint: Checkpoint, judged: dict[str, Any]) -> None:
    """OUTPUT/facts.json: how good it is, and what the run took."""
    newest = newest_checkpoint(run)
    assert newest is not None
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    counts = np.diff([0, *(record["step"] for record in records)]).tolist()
    facts = {
        **judged,
        "steps": json.loads((newest / "state.json").read_text())["step"],
        "seconds": round(sum(n * record["seconds_per_step"] for n, record in zip(counts, records, strict=True))),
        "loss": round(records[-1]["loss"], 4),
        "effects": records[-1]["effects"],
        "device": device_name(torch.device("cpu")),
        "parameters": sum(value.numel() for value in checkpoint.best.values()),
    }
    (output / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    sys.stderr.write(f"{output}: {facts}\n")
