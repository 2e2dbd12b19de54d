"""Out-of-distribution detection by the energy of an EqM (arXiv 2510.02300, section 4.3)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import roc_auc_score

from halfstep.data.frames import FrameReader, open_latents, windows
from halfstep.errors import InputError, NumericsError
from halfstep.machine import open_device
from halfstep.models import EqM, read_checkpoint
from halfstep.precision import network_trial, prepare, settle
from halfstep.progress import SILENT, Progress
from halfstep.sampling import energy_score
from halfstep.spec import LatentSpec

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
    ckpt: Path,
    data: Path | str,
    against: Path | str | None = None,
    *,
    precision: str = "fp32",
    device: str = "auto",
    progress: Progress = SILENT,
) -> EnergyReport:
    """Energies of the latents in store `data`, like those that the model was trained on, and of others in `against`,
    of the same number of channels; of an autoencoder's posterior the means.

    Raises InputError when the checkpoint is of a model without an energy, or the latents do not fit it, NumericsError
    when an energy is not finite.
    """
    checkpoint = read_checkpoint(ckpt)
    network = checkpoint.build()
    if not isinstance(network, EqM):
        raise InputError(f"{ckpt}: is of a CDiT; an EqM trained with an energy has one")
    place = open_device(device)
    example = checkpoint.about.family.example(network)
    policy, notes = settle(precision, place, "sample", trial=lambda: network_trial(network, example, _BATCH, place))
    for line in notes:
        progress.note(line)
    prepare(network.to(place), policy)

    def energies(path: Path | str, known: LatentSpec | None) -> npt.NDArray[np.float64]:
        reader, spec = open_latents(path, network.in_channels, known)
        found = np.concatenate(
            [energy_score(network, batch.to(place)).cpu().double().numpy() for batch in _batches(network, reader, spec)]
        )
        if not np.isfinite(found).all():
            raise NumericsError(f"{ckpt}: energies of {path} are not finite in {policy}; try --precision fp32")
        return found

    ours = energies(data, checkpoint.about.latents)
    report = EnergyReport(len(ours), float(ours.mean()), float(ours.std()))
    if against is None:
        return report
    others = energies(against, None)
    known = np.concatenate([np.zeros(len(ours)), np.ones(len(others))])
    auroc = float(roc_auc_score(known, np.concatenate([ours, others])))
    return replace(
        report,
        other_items=len(others),
        other_mean=float(others.mean()),
        other_deviation=float(others.std()),
        auroc=auroc,
    )


def _batches(network: EqM, reader: FrameReader, spec: LatentSpec) -> Iterator[torch.Tensor]:
    """Everything that is stored, as the network takes it: [n, C, H, W], or clips [n, C, T, H, W], one after the
    other. Of a video autoencoder each stored item is a clip already."""
    frames = network.num_frames if spec.temporal_factor == 1 else 1
    places = windows(reader, frames, step=frames)
    for first in range(0, len(places), _BATCH):
        read = [torch.from_numpy(reader.read(key, n, n + frames)) for key, n in places[first : first + _BATCH]]
        items = torch.stack([item[0] if frames == 1 else item.transpose(0, 1) for item in read])
        if items.shape[1:] != network.latent_shape:
            raise InputError(f"latents: are {list(items.shape[1:])}; the model has {list(network.latent_shape)}")
        yield items
