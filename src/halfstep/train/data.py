"""What a run trains on: items from a store, a `.pt` tree or pixels, and their way into a loss.

Axes: B items, K context frames, G goals, C channels, T frames, H W latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch.utils.data import ConcatDataset, DataLoader, default_collate

from halfstep.autoencoders import Autoencoder, load_autoencoder
from halfstep.data.frames import FrameReader, latents_spec, open_frames
from halfstep.data.latents import (
    ClipLatents,
    ImageLatents,
    NavigationConfig,
    NavigationDatasetConfig,
    SeededDataset,
    SeededOrder,
    navigation_datasets,
)
from halfstep.data.navigation import METRIC_WAYPOINT_SPACING
from halfstep.errors import InputError, some
from halfstep.precision import PrecisionPolicy
from halfstep.spec import LatentSpec, PixelSpec
from halfstep.train.config import TrainConfig
from halfstep.train.objectives import diffusion_loss, eqm_loss

Items = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class TrainingData:
    """Items of `datasets`, one after the other, and what the network sees of them: latents of `latent_shape`
    (C, (T,) H, W). An item of a walk has `goals` samples. `encoder` makes latents of items that are pixels."""

    config: TrainConfig
    datasets: tuple[SeededDataset, ...]
    spec: LatentSpec
    latent_shape: tuple[int, ...]
    goals: int = 1
    classes: tuple[str, ...] = ()
    spacing: float | None = None
    encoder: Autoencoder | None = None

    def __len__(self) -> int:
        return sum(map(len, self.datasets))  # type: ignore[arg-type]

    @property
    def num_classes(self) -> int:
        """Those of the data, or as many as the config says. Raises InputError when that is fewer."""
        found = max(1, len(self.classes))
        wanted = self.config.num_classes or found
        if wanted < found:
            raise InputError(
                f"num_classes: got {wanted}; the data has {found} classes ({some(self.classes)}), give {found} or more"
            )
        return wanted

    def items_per_step(self, processes: int) -> int:
        """All processes' items of one step. Raises InputError when the data does not fill one."""
        total = self.config.local_batch(processes) * processes
        if len(self) < total:
            smallest = processes * self.config.gradient_accumulation_steps
            most = len(self) // smallest * smallest
            raise InputError(
                f"data: got {len(self)} items ({'sequences long enough' if self.config.clip_len > 1 else 'frames'}); "
                f"a batch has {total}: use {f'a batch of {most} or less' if most else 'fewer processes, or more data'}"
            )
        return total

    def sequence(self, step: int, rank: int, processes: int, number: int) -> str:
        """The sequence of item `number` of what process `rank` gets in a step."""
        index = list(islice(self._order(step, rank, processes), number + 1))[-1]
        for dataset in self.datasets:
            if index < len(dataset):  # type: ignore[arg-type]
                return dataset.key(index)
            index -= len(dataset)  # type: ignore[arg-type]
        raise IndexError(number)

    def batches(self, step: int, rank: int, processes: int, device: torch.device) -> Iterator[Items]:
        """This process's share of the items of step `step` and all after it, epoch after epoch; what does not fill a
        step at the end of an epoch is left out. An item is drawn by (seed, epoch, index) alone."""
        total = self.items_per_step(processes)
        per_epoch = len(self) // total
        while True:
            epoch, within = divmod(step, per_epoch)
            for dataset in self.datasets:
                dataset.set_epoch(epoch)
            loader: DataLoader[Items] = DataLoader(
                ConcatDataset(self.datasets),
                batch_size=total // processes,
                sampler=self._order(step, rank, processes),
                num_workers=self.config.workers(device.type),
                pin_memory=device.type == "cuda",
                collate_fn=_collate,
            )
            yield from islice(loader, per_epoch - within)
            step += per_epoch - within

    def _order(self, step: int, rank: int, processes: int) -> SeededOrder:
        """Indices of a process's items from `step` to the end of its epoch."""
        total = self.items_per_step(processes)
        epoch, within = divmod(step, len(self) // total)
        seed = self.config.global_seed
        return SeededOrder(len(self), seed=seed, epoch=epoch, start=within * total, rank=rank, size=processes)

    def losses(self, network: Any, items: Items) -> torch.Tensor:
        """The loss of each sample, fp32: [B] for EqM, [B G] for CDiT."""
        if self.config.network == "EqM":
            latents, labels = items
            weight = self.config.dispersive_weight
            return eqm_loss(network, self.latents(latents), labels, dispersive_weight=weight)
        frames, actions, rel_t = items
        context, goals = self.latents(frames).tensor_split([self.config.context_size], dim=1)
        context = context.repeat_interleave(goals.shape[1], dim=0)
        return diffusion_loss(network, goals.flatten(0, 1), actions.flatten(0, 1), context, rel_t.flatten())

    def latents(self, items: torch.Tensor) -> torch.Tensor:
        """Items [B, C, H, W], clips [B, C, T, H, W] or frames of a walk [B, K + G, C, H, W] as model-ready latents; a
        fresh sample of the posterior where they are pixels."""
        if self.encoder is None:
            return items
        if self.spec.temporal_factor > 1:
            return self._encoded(items)
        if self.config.clip_len > 1:
            pictures = self._encoded(items.transpose(1, 2).flatten(0, 1))
            return pictures.reshape(len(items), -1, *pictures.shape[1:]).transpose(1, 2)
        if items.dim() == 5:
            frames = self._encoded(items.flatten(0, 1))
            return frames.reshape(*items.shape[:2], *frames.shape[1:])
        return self._encoded(items)

    @torch.no_grad()
    def _encoded(self, pixels: torch.Tensor) -> torch.Tensor:
        assert self.encoder is not None
        mean, logvar = (None if value is None else value.float() for value in self.encoder.encode(pixels))
        assert mean is not None
        drawn = mean if logvar is None else mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        # A tensor of inference mode cannot take part in a gradient, a clone of it can.
        return self.encoder.scaled(drawn).clone()


def open_data(config: TrainConfig) -> TrainingData:
    """Find what there is to train on. Raises InputError when it is not there or does not suit the network."""
    readers: list[FrameReader]
    datasets: tuple[SeededDataset, ...]
    if config.network == "CDiT":
        walks = navigation_datasets(_navigation(config), seed=config.global_seed)
        datasets, readers = tuple(walks.values()), [walk.reader for walk in walks.values()]
        spacings = {walk.spacing for walk in walks.values()}
        data = _describe(config, datasets, readers)
        goals = {walk.goals_per_obs for walk in walks.values()}
        if len(goals) > 1:
            raise InputError(f"goals_per_obs: the datasets have {sorted(goals)}; expected one number for all")
        return replace(data, goals=goals.pop(), spacing=spacings.pop() if len(spacings) == 1 else None)
    assert config.data_path is not None
    reader = open_frames(config.data_path, _pixels(config))
    seed = config.global_seed
    over_time = config.clip_len > 1
    if over_time and _holds_clips(reader):
        raise InputError("clip_len: the stored items are clips already; leave it out")
    dataset = ClipLatents(reader, config.clip_len, seed=seed) if over_time else ImageLatents(reader, seed=seed)
    return replace(_describe(config, (dataset,), [reader]), classes=tuple(dataset.classes))


def _describe(config: TrainConfig, datasets: tuple[SeededDataset, ...], readers: list[FrameReader]) -> TrainingData:
    specs = [latents_spec(reader) for reader in readers]
    if sum(map(len, datasets)) == 0:  # type: ignore[arg-type]
        needed = "use a shorter context or horizon" if config.network == "CDiT" else "encode something into it first"
        raise InputError(f"data: no sequence is long enough for a sample; {needed}")
    encoder = load_autoencoder(config.autoencoder, config.revision) if None in specs else None
    if encoder is not None:
        specs = [spec or replace(encoder.spec, pixels=_pixels(config)) for spec in specs]
    known = [spec for spec in specs if spec is not None]
    for spec in known[1:]:
        if differences := known[0].differences(spec):
            raise InputError(f"data: the datasets do not hold the same kind of latents: {'; '.join(differences)}")
    first = next(dataset for dataset in datasets if len(dataset))  # type: ignore[arg-type]
    data = TrainingData(config, datasets, known[0], (), encoder=encoder)
    shape = tuple(data.latents(first[0][0].unsqueeze(0)).shape[1:])
    return replace(data, latent_shape=shape[1:] if config.network == "CDiT" else shape)


def prepared_encoder(data: TrainingData, device: torch.device, policy: PrecisionPolicy) -> TrainingData:
    """The same data with its autoencoder, where there is one, on `device`: in bf16 when the training computes in it,
    else in fp32, because autoencoders overflow fp16."""
    if data.encoder is None:
        return data
    half = PrecisionPolicy.parse("bf16-true" if policy.compute == "bf16" else "fp32")
    return replace(data, encoder=data.encoder.prepared(device, half))


def _navigation(config: TrainConfig) -> NavigationConfig:
    datasets = config.datasets
    if not datasets:
        path = config.data_path
        assert path is not None
        spacing = config.metric_waypoint_spacing or METRIC_WAYPOINT_SPACING.get(path.name)
        if spacing is None:
            raise InputError("metric_waypoint_spacing: not given; it is the metres of one waypoint, 0.25 for instance")
        pixels = latents_spec(open_frames(path, _pixels(config))) is None
        entry = NavigationDatasetConfig(
            latent_folder=None if pixels else path,
            data_folder=path if pixels else None,
            goals_per_obs=config.goals_per_obs,
            metric_waypoint_spacing=spacing,
        )
        datasets = {path.name: entry}
    return NavigationConfig(
        context_size=config.context_size,
        len_traj_pred=config.len_traj_pred,
        distance=config.distance,
        image_size=_pixels(config).width,
        datasets=datasets,
    )


def _pixels(config: TrainConfig) -> PixelSpec:
    if config.network == "CDiT":
        return PixelSpec(config.image_size or 224, config.image_size or 224, "4:3")
    return PixelSpec(config.image_size or 256, config.image_size or 256)


def _holds_clips(reader: FrameReader) -> bool:
    """Whether each item is a clip already, of an autoencoder over time."""
    spec = latents_spec(reader)
    return spec is not None and spec.temporal_factor > 1


def _collate(items: list[Any]) -> Items:
    return tuple(default_collate(items))
