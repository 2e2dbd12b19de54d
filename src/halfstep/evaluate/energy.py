"""Out-of-distribution detection by the energy of an EqM (arXiv 2510.02300, section 4.3)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import roc_auc_score

from halfstep.data.latents import ClipLatents, ImageLatents
from halfstep.errors import InputError
from halfstep.models import EqM, read_checkpoint
from halfstep.precision import PrecisionPolicy, open_device, prepare
from halfstep.sampling import energy_score

_BATCH = 32


@dataclass(frozen=True)
class EnergyReport:
    """Mean and standard deviation of the energies of each set. `auroc`: how often something of the second has a higher
    energy than something of the first; 0.5 is chance."""

    items: int
    mean: float
    deviation: float
    other_items: int | None = None
    other_mean: float | None = None
    other_deviation: float | None = None
    auroc: float | None = None


def compare_energies(
    ckpt: Path, data: Path, against: Path | None = None, *, precision: str = "fp32", device: str = "cpu"
) -> EnergyReport:
    """Energies of the latents in store `data`, like those that the model was trained on, and of others in `against`.
    Raises InputError when the checkpoint is of a model without an energy, or the latents are of another shape."""
    network = read_checkpoint(ckpt).build()
    if not isinstance(network, EqM):
        raise InputError(f"{ckpt}: is of a CDiT; an EqM trained with an energy has one")
    place = open_device(device)
    prepare(network.to(place), PrecisionPolicy.parse(precision).resolve(place, "sample"))
    ours = _energies(network, data, place)
    report = EnergyReport(len(ours), float(ours.mean()), float(ours.std()))
    if against is None:
        return report
    others = _energies(network, against, place)
    known = np.concatenate([np.zeros(len(ours)), np.ones(len(others))])
    auroc = float(roc_auc_score(known, np.concatenate([ours, others])))
    return EnergyReport(
        report.items, report.mean, report.deviation, len(others), float(others.mean()), float(others.std()), auroc
    )


def _energies(network: EqM, path: Path, device: torch.device) -> npt.NDArray[np.float64]:
    frames = network.num_frames
    dataset = ImageLatents(path) if frames == 1 else ClipLatents(path, frames)
    found = []
    for first in range(0, len(dataset), _BATCH):
        latents = torch.stack([dataset[i][0] for i in range(first, min(first + _BATCH, len(dataset)))])
        found.append(energy_score(network, latents.to(device)).cpu().double().numpy())
    return np.concatenate(found)
