"""encode(sources, options): bring a store up to date with its sources."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from halfstep.autoencoders import Autoencoder
from halfstep.data.base import FrameSequence, SourceError
from halfstep.data.guarded import Unusable
from halfstep.data.sources import SourceConfig, find_sources
from halfstep.encode.counts import Counts, Failure, StoppedError, merge_counts
from halfstep.encode.encoder import encoder_lanes, measure_batch_size
from halfstep.encode.flow import run
from halfstep.encode.job import EncodeJob, EncodeOptions, list_sequences, settle
from halfstep.encode.plan import plan_only
from halfstep.engine import Crew, TeamCrew
from halfstep.errors import InputError
from halfstep.files import alone, file_errors, write_durably
from halfstep.machine import open_device
from halfstep.progress import SILENT, Progress
from halfstep.settings import differences
from halfstep.store.dataset import DatasetStore
from halfstep.store.index import Index
from halfstep.store.maintenance import compact
from halfstep.store.manifest import NAME as MANIFEST_NAME
from halfstep.store.manifest import Manifest
from halfstep.store.writer import DatasetWriter, claim_store, create_store, read_manifest, require_same_spec
from halfstep.team import own_cores

FAILURES_FILE = "failures.jsonl"

_WORKERS_PER_ACTOR = 2


@dataclass(frozen=True)
class EncodeReport:
    """What a run did. `sequences`, `items`, `bytes` (of latents) and what these would be in fp32 are the store's
    afterwards, as is `source_bytes`, of the files that it was made of (None where some are not there any more, or not
    among this run's sources); the rest is this run's.

    `failures` says what could not be encoded and why; the same lines are in failures.jsonl. By sequence, `left_out`
    counts the frames that make no whole clip, and `unused` those beyond the first of animations encoded as pictures.
    """

    sequences: int
    items: int
    encoded: int
    skipped: int
    removed: int
    failed: int
    bytes: int
    fp32_bytes: int
    source_bytes: int | None
    items_per_second: float
    seconds: float
    retried_in_fp32: int
    policy: str
    store: str
    missing: list[str]
    failures: list[Failure]
    left_out: dict[str, int]
    unused: dict[str, int]
    dry_run: bool = False


class _Stored(NamedTuple):
    """What is in the store after a run."""

    sequences: int
    items: int
    bytes: int = 0
    fp32_bytes: int = 0
    source_bytes: int | None = None


def encode(
    sources: list[SourceConfig],
    options: EncodeOptions,
    *,
    dry_run: bool = False,
    progress: Progress = SILENT,
    crew: Crew | None = None,
) -> EncodeReport:
    """Encode all frames of `sources` into the store at `options.output`, or only what changed since the last run.

    Under torchrun the processes share the sequences; with `crew=RayCrew()` actors on a Ray cluster do, and the store's
    folder and the sources must be reachable under the same path from every node. With `dry_run` nothing is decoded or
    written. Asked to stop, by Ctrl-C or SIGTERM, it finishes what is under way and raises KeyboardInterrupt. Raises
    InputError when the sources or options cannot be used or the store holds latents of another kind, StoreError when it
    cannot be written, StoppedError at the first failure when `options.strict`.
    """
    with ExitStack() as stack:
        crew = crew or stack.enter_context(TeamCrew.join())
        if not dry_run:
            crew.on_leader(lambda: stack.enter_context(reserved(options.output)))
        job, autoencoder, sequences, existing = prepare_run(sources, options, crew, progress)
        missing = missing_keys(options, sequences, existing)
        if crew.leads:
            for line in warnings_before(job, existing, options):
                progress.note(line)
        mine = [sequences[place] for place in crew.own(len(sequences))]
        if dry_run:
            totals = merge_counts(crew.together(lambda: plan_only(job, mine, existing)))
            stored = _Stored(len(existing), existing.items_in(existing))
            removed = 0 if options.keep_missing else existing.items_in(missing)
            return _report(job, totals, removed, missing, 0.0, stored, dry_run=True)
        job = replace(crew.on_leader(lambda: open_store(job, autoencoder)), device=job.device)
        started = time.monotonic()
        progress.start(sum(sequence.expected for sequence in mine) or None)
        worker = _Worker(job, autoencoder, sequences, existing)
        try:
            totals = merge_counts(crew.share(len(sequences), worker, progress, _done))
        except StoppedError as stopped:
            write_failures(options.output, stopped.failures)
            raise
        seconds = time.monotonic() - started
        drop = [] if options.keep_missing else missing
        return crew.on_leader(lambda: finish_run(job, sequences, totals, drop, missing, seconds))


class _Worker:
    """Encodes some of the sequences into shards of its own. In an actor it has one core, loads the autoencoder itself,
    and sees the GPU that it was given as the first one."""

    def __init__(
        self, job: EncodeJob, autoencoder: Autoencoder | None, sequences: list[FrameSequence], existing: Index
    ) -> None:
        self._job, self._autoencoder, self._sequences, self._existing = job, autoencoder, sequences, existing
        self._lanes: int | None = None

    def __getstate__(self) -> tuple[EncodeJob, list[FrameSequence], Index]:
        device = "cuda:0" if self._job.device.startswith("cuda") else self._job.device
        return replace(self._job, device=device, workers=_WORKERS_PER_ACTOR), self._sequences, self._existing

    def __setstate__(self, state: tuple[EncodeJob, list[FrameSequence], Index]) -> None:
        self._job, self._sequences, self._existing = state
        self._autoencoder = None if self._job.imports_latents else self._job.load_autoencoder()
        self._lanes = 1

    def __call__(self, places: Sequence[int], progress: Progress) -> Counts:
        """Encode the sequences with these numbers."""
        sequences = [self._sequences[place] for place in places]
        with (
            encoder_lanes(self._job, self._autoencoder, self._lanes) as lanes,
            DatasetWriter(self._job.output, self._job.manifest) as writer,
        ):
            return run(self._job, sequences, self._existing, lanes, writer, progress)


def _done(counts: Counts) -> int:
    return counts.balance.out + counts.balance.skipped


def prepare_run(
    sources: list[SourceConfig], options: EncodeOptions, crew: Crew, progress: Progress | None = None
) -> tuple[EncodeJob, Autoencoder | None, list[FrameSequence], Index]:
    """Settle the job on the leader, the same for all, and list what there is to do; the leader tells what is left out.
    Reads the store, writes nothing."""
    found = find_sources(sources)
    if crew.leads and progress is not None:
        for line in (line for source in found for line in source.notes):
            progress.note(line)
    manifest = read_manifest(options.output) if (options.output / MANIFEST_NAME).exists() else None
    device = str(open_device(crew.device(options.device)))
    job, autoencoder = settle(options, found, manifest, device, options.workers or min(own_cores(), 16))
    settled = job
    job = replace(crew.on_leader(lambda: settled), device=device)
    if manifest is not None:
        require_same_spec(manifest.spec, job.spec, options.output)
    sequences = list_sequences(found, job.spec, options.limit)
    existing = Index.read(options.output)
    if existing and manifest is not None and _changes(manifest, job) and (options.limit or options.keep_missing):
        raise InputError(
            f"{options.output}: was made with other settings ({_changes(manifest, job)}); with --limit or "
            "--keep-missing a part of it would stay so: give the same settings, or encode all of it without these "
            "options"
        )
    return job, autoencoder, sequences, existing


def open_store(job: EncodeJob, autoencoder: Autoencoder | None) -> EncodeJob:
    """Settle the batch size and make the store ready; return the job that every process then carries out.

    One process decides on the size of a batch, because another size may round differently.
    """
    if job.batch_size == 0:
        with encoder_lanes(job, autoencoder) as lanes:
            job = replace(job, batch_size=measure_batch_size(job, lanes))
    with file_errors(job.output):
        create_store(job.output, job.manifest)
        _update_manifest(job)
    return job


def warnings_before(job: EncodeJob, existing: Index, options: EncodeOptions) -> list[str]:
    """What the user should know before it starts: an emulated type, or that all of the store will be made anew."""
    lines = list(job.notes)
    if existing and (changes := _changes(read_manifest(options.output), job)):
        lines.append(
            f"{options.output}: was made with other settings ({changes}); its {len(existing)} sequences are encoded "
            "again"
        )
    return lines


def _changes(manifest: Manifest, job: EncodeJob) -> str:
    """The settings of a store, besides the spec, that differ from the job's in a way that changes latents."""
    made_with, wanted = ({"last_clip": "drop", **recipe} for recipe in (manifest.recipe, job.manifest.recipe))
    names = ("policy", "tiled", "moments", "mirror", "last_clip")
    return "; ".join(differences(made_with, {name: wanted[name] for name in names}))


def finish_run(
    job: EncodeJob,
    sequences: list[FrameSequence],
    totals: Counts,
    drop: list[str],
    missing: list[str],
    seconds: float,
) -> EncodeReport:
    """Drop what is gone, merge small shards, note failures and numerics, and report."""
    removed = compact(job.output, drop)
    with file_errors(job.output):
        manifest = read_manifest(job.output)
        numerics = {
            "retried_in_fp32": manifest.numerics.get("retried_in_fp32", 0) + totals.balance.retried,
            "refused": manifest.numerics.get("refused", 0) + totals.not_finite,
        }
        if numerics != manifest.numerics:
            replace(manifest, numerics=numerics).write(job.output)
        write_failures(job.output, totals.failures)
    store = DatasetStore.open(job.output)
    keys = store.keys()
    sources = source_bytes(sequences, set(keys))
    stored = _Stored(len(keys), len(store), store.latent_bytes(), store.fp32_bytes(), sources)
    return _report(job, totals, removed, missing, seconds, stored)


def source_bytes(sequences: list[FrameSequence], stored: Collection[str]) -> int | None:
    """Bytes of the files that the sequences with the keys `stored` are in, each file once by whatever names; None where
    they cannot be told of all."""
    known = [sequence for sequence in sequences if sequence.key in stored]
    if len(known) < len(stored):
        return None
    sizes: dict[tuple[int, int], int] = {}
    try:
        for sequence in known:
            for path in sequence.files():
                found = path.stat()
                sizes[found.st_dev, found.st_ino] = found.st_size
    except (SourceError, OSError):
        return None
    return sum(sizes.values())


def write_failures(output: Path, failures: list[Failure]) -> None:
    """Replace failures.jsonl by the failures of this run; without any, there is no such file."""
    path = output / FAILURES_FILE
    if failures:
        write_durably(path, "".join(json.dumps(asdict(failure)) + "\n" for failure in failures).encode())
    else:
        path.unlink(missing_ok=True)


@contextmanager
def reserved(output: Path) -> Iterator[None]:
    """Keep other runs from encoding into the same store. Programs that use DatasetWriter themselves are not kept
    out."""
    claim_store(output)
    with alone(output, ".encode.lock"):
        yield


def missing_keys(options: EncodeOptions, sequences: list[FrameSequence], existing: Index) -> list[str]:
    """Keys of the store that the sources no longer have; nobody knows that of a folder that cannot be listed. Raises
    InputError when that is all of them."""
    if options.limit is not None:
        return []
    unknown = tuple(f"{s.key}/" for s in sequences if isinstance(s, Unusable) and s.folder)
    gone = existing.keys() - {sequence.key for sequence in sequences}
    missing = sorted(key for key in gone if not key.startswith(unknown))
    if missing and len(missing) == len(existing) and not options.keep_missing:
        raise InputError(
            f"{options.output}: holds {len(existing)} sequences and the sources have none of them; if only their names "
            "changed, set `name` in a YAML list of sources; --keep-missing adds, a new folder makes another store"
        )
    return missing


def _update_manifest(job: EncodeJob) -> None:
    """Note the types of this run in a store that was made with others; its counts stay."""
    manifest = read_manifest(job.output)
    updated = replace(job.manifest, numerics=manifest.numerics, created_with=manifest.created_with)
    if updated != manifest:
        updated.write(job.output)


def _report(
    job: EncodeJob,
    totals: Counts,
    removed: int,
    missing: list[str],
    seconds: float,
    stored: _Stored,
    *,
    dry_run: bool = False,
) -> EncodeReport:
    return EncodeReport(
        sequences=stored.sequences,
        items=stored.items,
        encoded=totals.balance.out,
        skipped=totals.balance.skipped,
        removed=removed,
        failed=len(totals.failures),
        bytes=stored.bytes,
        fp32_bytes=stored.fp32_bytes,
        source_bytes=stored.source_bytes,
        items_per_second=round(totals.balance.out / seconds, 3) if seconds > 0 else 0.0,
        seconds=round(seconds, 3),
        retried_in_fp32=totals.balance.retried,
        policy=str(job.policy),
        store=str(job.output),
        missing=missing,
        failures=totals.failures,
        left_out=totals.left_out,
        unused=totals.unused,
        dry_run=dry_run,
    )
