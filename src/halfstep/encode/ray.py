"""Encode on a Ray cluster: Ray Data over the sequences, actors that hold one autoencoder each."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from halfstep.data.base import FrameSequence
from halfstep.data.sources import SourceConfig
from halfstep.encode.counts import Counts, StoppedError, merge_counts
from halfstep.encode.job import EncodeJob, EncodeOptions
from halfstep.encode.runner import (
    EncodeReport,
    encode_share,
    finish_run,
    missing_keys,
    open_store,
    prepare_run,
    reserved,
    warnings_before,
    write_failures,
)
from halfstep.errors import HalfstepError, InputError
from halfstep.progress import SILENT, Progress
from halfstep.store.index import Index
from halfstep.team import Team

_BLOCKS_PER_ACTOR = 8  # enough to even out the load, few enough that a block is worth a commit
_LARGEST_BLOCK = 1024
_WORKERS_PER_ACTOR = 2


class _Actor:
    """Encodes blocks of sequences into shards of its own."""

    def __init__(self, job: EncodeJob, sequences: Any, existing: Any) -> None:
        import ray

        self._job = replace(job, workers=_WORKERS_PER_ACTOR)
        self._sequences: list[FrameSequence] = ray.get(sequences)
        self._existing: Index = ray.get(existing)
        self._autoencoder = None if job.imports_latents else job.load_autoencoder()

    def __call__(self, block: dict[str, Any]) -> dict[str, list[Counts | HalfstepError]]:
        share = [self._sequences[index] for index in block["index"]]
        try:
            return {"outcome": [encode_share(self._job, self._autoencoder, share, self._existing, lane_count=1)]}
        except HalfstepError as error:  # carried as a value: raised, it would arrive wrapped in a traceback
            return {"outcome": [error]}


def encode_on_ray(sources: list[SourceConfig], options: EncodeOptions, progress: Progress = SILENT) -> EncodeReport:
    """`encode`, with the sequences spread over a Ray cluster (the one RAY_ADDRESS names, or one started here).

    The store's folder and the sources must be reachable under the same path from every node.
    """
    try:
        import ray
    except ImportError:
        raise InputError("--ray: ray is not installed; pip install 'halfstep[ray]'") from None
    team = Team()
    with reserved(options.output):
        job, autoencoder, listed, existing = prepare_run(sources, options, team, progress)
        missing = missing_keys(options, listed, existing)
        for line in warnings_before(job, existing, options):
            progress.note(line)
        job = open_store(job, autoencoder)
        progress.start(sum(sequence.expected for sequence in listed) or None)
        started = time.monotonic()
        own_cluster = not ray.is_initialized()
        if own_cluster:
            ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
        try:
            totals = merge_counts(_map(ray, job, listed, existing, progress))
        except StoppedError as stopped:
            write_failures(options.output, stopped.failures)
            raise
        finally:
            if own_cluster:
                ray.shutdown()
        drop = [] if options.keep_missing else missing
        return finish_run(job, listed, totals, drop, missing, time.monotonic() - started)


def _map(ray: Any, job: EncodeJob, sequences: list[FrameSequence], existing: Index, progress: Progress) -> list[Counts]:
    resources = ray.cluster_resources()
    on_gpu = job.device.startswith("cuda")
    # One core stays for Ray Data's own tasks, or the actors would wait for each other.
    actors = max(1, int(resources.get("GPU", 0)) if on_gpu else int(resources.get("CPU", 1)) - 1)
    block = max(1, min(_LARGEST_BLOCK, len(sequences) // (actors * _BLOCKS_PER_ACTOR)))
    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.from_items([{"index": index} for index in range(len(sequences))]).map_batches(
        _Actor,
        fn_constructor_args=(replace(job, device="cuda:0" if on_gpu else "cpu"), ray.put(sequences), ray.put(existing)),
        batch_size=block,
        concurrency=actors,
        num_cpus=1,
        num_gpus=1 if on_gpu else 0,
    )
    parts = []
    for row in dataset.iter_rows():
        outcome: Counts | HalfstepError = row["outcome"]
        if isinstance(outcome, HalfstepError):
            raise outcome
        parts.append(outcome)
        progress.advance(outcome.encoded + outcome.skipped)
    return parts
