"""What a run trains on: items from a store, a `.pt` tree or pixels, in an order that resumes anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, default_collate

from halfstep.autoencoders import load_autoencoder
from halfstep.data.base import SourceError, digest
from halfstep.data.frames import FrameReader, latents_spec, open_frames
from halfstep.data.latents import (
    ClipLatents,
    Distance,
    ImageLatents,
    NavigationConfig,
    NavigationDatasetConfig,
    SeededDataset,
    SeededOrder,
    navigation_datasets,
)
from halfstep.data.navigation import METRIC_WAYPOINT_SPACING
from halfstep.errors import InputError, some
from halfstep.models.family import Items
from halfstep.precision import PrecisionPolicy
from halfstep.spec import LatentSpec
from halfstep.team import Team, own_cores
from halfstep.train.config import TrainConfig
from halfstep.train.encoder import PixelEncoder

_MOST_UNREADABLE = 64  # in a row: more are no odd files, the data is gone


class Batch(NamedTuple):
    """A process's items of one step; `unreadable`: why some that should have been there are others."""

    items: Items
    unreadable: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainingData:
    """Items of `datasets`, one after the other, and what the network sees of them: latents of `latent_shape`
    (C, (T,) H, W). A step has `items_per_step`, of all processes. An item of a walk has `goals` samples. `encoder`
    makes latents of items that are pixels."""

    datasets: tuple[SeededDataset, ...]
    spec: LatentSpec
    latent_shape: tuple[int, ...]
    items_per_step: int
    seed: int
    workers: int | None
    goals: int = 1
    classes: tuple[str, ...] = ()
    num_classes: int = 0
    spacing: float | None = None
    encoder: PixelEncoder | None = None

    def __len__(self) -> int:
        return sum(map(len, self.datasets))  # type: ignore[arg-type]

    @property
    def steps_per_epoch(self) -> int:
        """What does not fill a step at the end of an epoch is left out."""
        return len(self) // self.items_per_step

    @property
    def identity(self) -> str:
        """A digest of what the data is, wherever it lies: its sequences, by name, and how much is in each."""
        parts = (f"{key}\t{count}" for dataset in self.datasets for key, count in dataset.contents())
        return digest(*(part.encode(errors="surrogateescape") for part in parts)).hex()

    def prepared(self, device: torch.device, policy: PrecisionPolicy) -> TrainingData:
        """The same with its encoder, where there is one, on `device`, in the precision of the training."""
        return self if self.encoder is None else replace(self, encoder=self.encoder.moved(device, policy))

    def sequence(self, step: int, team: Team, number: int) -> str:
        """The sequence of item `number` of what this process gets in a step."""
        index = list(islice(self._order(step, team), number + 1))[-1]
        for dataset in self.datasets:
            if index < len(dataset):  # type: ignore[arg-type]
                return dataset.key(index)
            index -= len(dataset)  # type: ignore[arg-type]
        raise IndexError(number)

    def batches(self, step: int, team: Team, device: torch.device) -> Iterator[Batch]:
        """This process's share of the items of step `step` and all after it, epoch after epoch. An item is drawn by
        (seed, epoch, index) alone."""
        while True:
            epoch, within = divmod(step, self.steps_per_epoch)
            for dataset in self.datasets:
                dataset.set_epoch(epoch)
            loader: DataLoader[Any] = DataLoader(
                _Readable(self.datasets),
                batch_size=self.items_per_step // team.size,
                sampler=self._order(step, team),
                num_workers=self._workers(device),
                pin_memory=device.type == "cuda",
                collate_fn=_collate,
            )
            yield from islice(loader, self.steps_per_epoch - within)
            step += self.steps_per_epoch - within

    def latents(self, items: Items) -> Items:
        """The same items, with latents in place of pixels."""
        return items if self.encoder is None else (self.encoder(items[0]), *items[1:])

    def _order(self, step: int, team: Team) -> SeededOrder:
        """Indices of a process's items from `step` to the end of its epoch."""
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self.items_per_step
        return SeededOrder(len(self), seed=self.seed, epoch=epoch, start=start, rank=team.rank, size=team.size)

    def _workers(self, device: torch.device) -> int:
        """Processes that read ahead. On a CPU none: the training needs all cores, and a store is read in no time."""
        if self.workers is not None:
            return self.workers
        return min(4, own_cores()) if device.type == "cuda" else 0


def open_data(config: TrainConfig, processes: int) -> TrainingData:
    """Find what there is to train on, by so many processes. Raises InputError when it is not there, does not fill a
    step or does not suit the network."""
    if config.family.items == "walks":
        walks = navigation_datasets(_navigation(config), seed=config.global_seed, pixels=config.pixels)
        goals = {walk.goals_per_obs for walk in walks.values()}
        if len(goals) > 1:
            raise InputError(f"goals_per_obs: the datasets have {sorted(goals)}; expected one number for all")
        spacings = {walk.spacing for walk in walks.values()}
        spacing = spacings.pop() if len(spacings) == 1 else None
        data = _describe(config, processes, tuple(walks.values()), [walk.reader for walk in walks.values()])
        return replace(data, goals=goals.pop(), spacing=spacing)
    assert config.data_path is not None
    reader = open_frames(config.data_path, config.pixels)
    seed = config.global_seed
    over_time = config.clip_len > 1
    if over_time and _holds_clips(reader):
        raise InputError("clip_len: the stored items are clips already; leave it out")
    dataset = ClipLatents(reader, config.clip_len, seed=seed) if over_time else ImageLatents(reader, seed=seed)
    data = _describe(config, processes, (dataset,), [reader])
    return replace(data, classes=tuple(dataset.classes), num_classes=_num_classes(dataset.classes, config.num_classes))


def _describe(
    config: TrainConfig, processes: int, datasets: tuple[SeededDataset, ...], readers: list[FrameReader]
) -> TrainingData:
    specs = [latents_spec(reader) for reader in readers]
    items = sum(map(len, datasets))  # type: ignore[arg-type]
    walks = config.family.items == "walks"
    if items == 0:
        needed = "use a shorter context or horizon" if walks else "encode something into it first"
        raise InputError(f"data: no sequence is long enough for a sample; {needed}")
    encoder = None
    if None in specs:
        autoencoder = load_autoencoder(config.autoencoder, config.revision)
        encoder = PixelEncoder.on(autoencoder, clips=config.clip_len > 1)
        specs = [spec or replace(autoencoder.spec, pixels=config.pixels) for spec in specs]
    known = [spec for spec in specs if spec is not None]
    for spec in known[1:]:
        if differences := known[0].differences(spec):
            raise InputError(f"data: the datasets do not hold the same kind of latents: {'; '.join(differences)}")
    per_step = config.items_per_step(processes)
    if items < per_step:
        smallest = processes * config.gradient_accumulation_steps
        most = items // smallest * smallest
        raise InputError(
            f"data: got {items} items ({'sequences long enough' if config.clip_len > 1 else 'frames'}); a batch has "
            f"{per_step}: use {f'a batch of {most} or less' if most else 'fewer processes, or more data'}"
        )
    data = TrainingData(datasets, known[0], (), per_step, config.global_seed, config.num_workers, encoder=encoder)
    first, _ = _Readable(datasets)[0]
    shape = tuple(data.latents((first[0].unsqueeze(0),))[0].shape[1:])
    return replace(data, latent_shape=shape[1:] if walks else shape)


def _num_classes(found: list[str], wanted: int | None) -> int:
    """Those of the data, or as many as the config says. Raises InputError when that is fewer."""
    least = max(1, len(found))
    if wanted is not None and wanted < least:
        raise InputError(
            f"num_classes: got {wanted}; the data has {least} classes ({some(found)}), give {least} or more"
        )
    return wanted or least


def _navigation(config: TrainConfig) -> NavigationConfig:
    datasets, next_frame = config.datasets, config.family.next_frame
    if not datasets:
        path = config.data_path
        assert path is not None
        name = str(path).rstrip("/").rpartition("/")[2]
        spacing = config.metric_waypoint_spacing or METRIC_WAYPOINT_SPACING.get(name)
        if spacing is None:
            raise InputError("metric_waypoint_spacing: not given; it is the meters of one waypoint, 0.25 for instance")
        pixels = latents_spec(open_frames(path, config.pixels)) is None
        entry = NavigationDatasetConfig(
            latent_folder=None if pixels else path,
            data_folder=path if pixels else None,
            goals_per_obs=1 if next_frame else config.goals_per_obs,
            metric_waypoint_spacing=spacing,
        )
        datasets = {name: entry}
    return NavigationConfig(
        context_size=config.context_size,
        len_traj_pred=1 if next_frame else config.len_traj_pred,
        distance=Distance(min_dist_cat=1, max_dist_cat=1) if next_frame else config.distance,
        image_size=config.pixels.width,
        datasets=datasets,
    )


def _holds_clips(reader: FrameReader) -> bool:
    """Whether each item is a clip already, of an autoencoder over time."""
    spec = latents_spec(reader)
    return spec is not None and spec.temporal_factor > 1


class _Readable(Dataset[tuple[Any, str | None]]):
    """The items of datasets, one after the other; in place of one whose picture or video cannot be read the next one,
    with the reason. Raises SourceError where nothing can be read."""

    def __init__(self, datasets: tuple[SeededDataset, ...]) -> None:
        self._items: ConcatDataset[Any] = ConcatDataset(datasets)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> tuple[Any, str | None]:
        reason: str | None = None
        for tried in range(min(_MOST_UNREADABLE, len(self._items))):
            try:
                return self._items[(index + tried) % len(self._items)], reason
            except SourceError as error:
                reason = reason or str(error)
        raise SourceError(f"{reason}; nor can the {tried} items after it be read")


def _collate(read: list[tuple[Any, str | None]]) -> Batch:
    items = tuple(default_collate([item for item, _ in read]))
    return Batch(items, tuple(reason for _, reason in read if reason is not None))
