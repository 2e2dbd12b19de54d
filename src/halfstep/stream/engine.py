"""StreamEngine: every event that comes from a source through the network and into files, and the books of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch

from halfstep.engine import Flow, Lanes, Ledger, lane_count, remote_functions, stop_request
from halfstep.engine.ledger import Balance
from halfstep.engine.meter import Meter
from halfstep.engine.remote import cluster
from halfstep.errors import FileError, InputError
from halfstep.files import alone, claim, file_errors, write_durably
from halfstep.machine import device_name, open_device, peak_memory_mb
from halfstep.precision import PrecisionPolicy, Trial, settle
from halfstep.progress import SILENT, Progress
from halfstep.stream.dead_letters import DeadLetters, Loss
from halfstep.stream.model import Computed, Inference, ModelSpec, lane_trial, multiple_of, network_name, sample_type
from halfstep.stream.parts import EVENTS, Outputs, Parts
from halfstep.stream.prepare import Preparation
from halfstep.stream.seen import Seen
from halfstep.stream.sources.base import Source
from halfstep.stream.stages import Admit, Books, Commit, Consumer, Ends, FindPeaks, Gather, failure_line, read

RUN_FILE = "run.json"
ENDS_FILE = "ends.json"
SOURCES_ENDED = "end of its sources"
_LONGEST_WAIT_S = 0.2  # of the receiving thread, until it looks whether it shall stop
_MOST_NAMED = 1000  # gaps and losses in run.json; the rest is counted


@dataclass(frozen=True)
class StreamOptions:
    """How a run goes. `batch_size` samples at once, a partial batch after `max_wait_ms`; events of `queue_bytes` wait
    between receiving and computing, then the source waits, or with `drop_oldest` the oldest make room. The run ends
    when `sources` producers have ended, after `total_events`, or when asked. `part_events` go into a file. `lanes`:
    None for as many as suit the device; `ray` puts each into an actor."""

    model: ModelSpec
    precision: str = "auto"
    device: str = "auto"
    preparation: Preparation = field(default_factory=Preparation)
    batch_size: int = 1
    max_wait_ms: float = 100.0
    queue_bytes: int = 512 << 20
    drop_oldest: bool = False
    sources: int = 1
    total_events: int | None = None
    part_events: int = 100
    patience_s: float = 60.0
    workers: int = 2
    lanes: int | None = None
    ray: bool = False
    dead_letter_bytes: int = 1 << 30


@dataclass(frozen=True)
class StreamReport:
    """What a run did; run.json has the same. `guarantee` is what the source allows, `held` whether it held, and `why`
    not. `balance` counts events, and messages that could not be read as one each. `latency_ms`: by stage, of the
    latest. `sessions` are all runs into the folder, this one last."""

    guarantee: str
    held: bool
    why: list[str]
    ended_by: str
    balance: dict[str, int]
    messages: int
    repeats: int
    gaps: list[dict[str, Any]]
    missing: int
    peaks: int
    parts: int
    bytes_in: int
    bytes_per_frame: float
    written_bytes: int
    seconds: float
    events_per_second: float
    frames_per_second: float
    latency_ms: dict[str, dict[str, float]]
    device: str
    device_busy: float
    lanes: int
    network: str
    policy: str
    notes: list[str]
    weight_bytes: int
    peak_memory_mb: float
    started: str
    sessions: list[dict[str, Any]] = field(default_factory=list)


class StreamEngine:
    """One run: `source` through the network into `outputs` and to `consumers`, which are called with every result in
    its order, at least once. Without `outputs` an event counts as committed when all consumers have taken it.

    The source stays open, whoever opened it closes it. `run` does it; `snapshot` says how it goes, from any thread.
    """

    def __init__(
        self,
        source: Source,
        options: StreamOptions,
        outputs: Outputs | None = None,
        *,
        consumers: Sequence[Consumer] = (),
        progress: Progress = SILENT,
    ) -> None:
        if options.drop_oldest and source.guarantee == "acknowledged":
            raise InputError(
                "runtime.overflow: got drop_oldest; what is dropped of an acknowledged source would be sent again: "
                "use block"
            )
        self._source, self._outputs, self._consumers, self._progress = source, outputs, consumers, progress
        device = open_device(options.device)
        size, multiple = options.preparation.size, multiple_of(options.model)
        if size is not None and any(side % multiple for side in size):
            raise InputError(f"data.shape: got {list(size)}; PeakNet needs multiples of {multiple}")
        settled = settle(options.precision, device, "sample", trial=lambda: _trial(options, device))
        self.policy: PrecisionPolicy = settled.policy
        self._notes = [*settled.notes]
        if self.policy.compute == "fp32" and options.precision == "auto":
            self._notes.append(self.policy.reason)
        self._device = device
        preparation = replace(options.preparation, dtype=sample_type(self.policy), multiple=multiple)
        self._options = replace(options, preparation=preparation)
        self._inference: Inference | None = None
        self._meter = Meter()
        self._ledger: Ledger[Loss] = Ledger(self._note_loss)
        self._letters: DeadLetters | None = None
        self._flow: Flow | None = None
        self._bytes_in = 0
        self._admit: Admit | None = None

    def run(self) -> StreamReport:
        """Until the source has ended, enough events came, or SIGINT or SIGTERM asks: then what is under way is
        finished.

        Raises InputError when the network or the folder cannot be used, BusyError when another run holds the folder,
        FileError when a part could not be written for as long as `patience_s`: then nothing of it was acknowledged, and
        run.json says so.
        """
        with ExitStack() as stack:
            stack.callback(self._source.tell)
            sessions = stack.enter_context(self._folder()) if self._outputs is not None else []
            parts = Parts(self._outputs) if self._outputs is not None else None
            seen = parts.seen() if parts is not None else Seen()
            if self._outputs is not None:
                self._letters = DeadLetters(self._outputs.folder, self._options.dead_letter_bytes)
            lanes = stack.enter_context(self._lanes())
            books = Books(self._ledger, seen, self._source, self._meter)
            return self._go(books, parts, lanes, sessions)

    def snapshot(self) -> dict[str, float]:
        """Numbers of this moment, for a panel or a monitor."""
        balance = self._ledger.balance
        waiting = self._flow.waiting() if self._flow is not None else {}
        return {
            **{name: float(value) for name, value in asdict(balance).items()},
            "events_per_second": self._meter.rate(),
            "peaks": self._meter.total("peaks"),
            "queue_bytes": float(waiting.get("batch", 0)),
            "latency_ms": self._meter.latency().get("whole", {}).get("p50", 0.0),
            "repeats": float(self._admit.repeats if self._admit is not None else 0),
            "seconds": self._meter.seconds,
        }

    def _go(
        self, books: Books, parts: Parts | None, lanes: Lanes[torch.Tensor, Computed], sessions: list[dict[str, Any]]
    ) -> StreamReport:
        options, meter = self._options, self._meter
        started = datetime.now(UTC).isoformat(timespec="seconds")
        ends = Ends(self._outputs.folder / ENDS_FILE if self._outputs is not None else None)
        admit = Admit(books, options.workers, options.sources, options.total_events, ends)
        self._admit = admit
        room = options.queue_bytes
        gather = Gather(books, lanes.submit, options.batch_size, options.max_wait_ms / 1e3, room, options.drop_oldest)
        masks = self._outputs.masks if self._outputs is not None else bool(self._consumers)
        find = FindPeaks(books, lanes.submit, options.preparation, options.batch_size, lanes.count, masks)
        ended_by, error = "", None
        with stop_request() as stop:
            commit = Commit(
                books,
                parts,
                self._consumers,
                self._progress,
                lambda: bool(stop),
                f"{network_name(options.model)} in {self.policy}",
                events=options.part_events,
                patience_s=options.patience_s,
            )
            meter.started = time.monotonic()
            self._progress.start(options.total_events)
            self._record(sessions, started, None)
            try:
                with Flow(admit, gather, find, commit) as flow:
                    self._flow = flow
                    ended_by = self._receive(flow, admit, lambda: bool(stop))
            except KeyboardInterrupt:
                ended_by = "interrupted"
            except Exception as raised:  # noqa: BLE001 - raised again once it is on record
                ended_by, error = f"failed: {failure_line(raised)}", raised
            self._flow = None
        report = self._report(books, admit, commit, lanes.count, ended_by, started, sessions)
        self._record(sessions, started, report)
        if ended_by == SOURCES_ENDED:
            ends.clear()
        if error is not None:
            raise error
        return report

    def _receive(self, flow: Flow, admit: Admit, stopping: Callable[[], bool]) -> str:
        """Receive until there is a reason to end; returns it."""
        options, source = self._options, self._source
        read_it = partial(read, prepare=options.preparation, meter=self._meter)
        messages = 0
        with ThreadPoolExecutor(options.workers, "decode", lambda: torch.set_num_threads(1)) as pool:
            while True:
                if stopping():
                    return "signal"
                if admit.finished:
                    done = options.total_events is not None and admit.admitted >= options.total_events
                    return "total_samples" if done else SOURCES_ENDED
                if source.exhausted:
                    return SOURCES_ENDED
                under_way = messages - admit.messages
                if options.total_events is not None and admit.admitted + under_way >= options.total_events:
                    flow.check()
                    source.tell()
                    time.sleep(0.001)  # what was received may be the last
                    continue
                incoming = source.receive(_LONGEST_WAIT_S)
                if incoming is None:
                    flow.check()
                    continue
                self._bytes_in += incoming.size
                messages += 1
                item = incoming, pool.submit(read_it, incoming), time.monotonic()
                while not flow.put(item, _LONGEST_WAIT_S):
                    source.tell()

    @contextmanager
    def _lanes(self) -> Iterator[Lanes[torch.Tensor, Computed]]:
        options = self._options
        inference = Inference(options.model, self.policy, str(self._device))
        self._inference = inference
        with ExitStack() as stack:
            if options.ray:
                resources = stack.enter_context(cluster())
                count = options.lanes or max(1, resources.gpus or resources.cpus)
                functions = stack.enter_context(remote_functions(inference, count, gpus=resources.gpus > 0))
                lanes = stack.enter_context(Lanes.open(functions, "actor"))
            else:
                count = options.lanes or lane_count(self._device, shared=True)
                lanes = stack.enter_context(Lanes.open([inference] * count, "compute"))
            self._warm_up(lanes)
            yield lanes

    def _warm_up(self, lanes: Lanes[torch.Tensor, Computed]) -> None:
        options, preparation = self._options, self._options.preparation
        if preparation.size is None:
            return
        samples = torch.zeros((options.batch_size, preparation.channels, *preparation.size), dtype=preparation.dtype)
        for future in [lanes.submit(samples) for _ in range(options.model.warmup * lanes.count)]:
            future.result()

    @contextmanager
    def _folder(self) -> Iterator[list[dict[str, Any]]]:
        """The folder of the run, held alone, and the sessions that were there before."""
        assert self._outputs is not None
        folder = self._outputs.folder
        claim(folder, "streamed run", (RUN_FILE, EVENTS))
        with alone(folder, ".stream.lock"):
            path = folder / RUN_FILE
            sessions: list[dict[str, Any]] = []
            if path.exists():
                try:
                    sessions = json.loads(path.read_text())["sessions"]
                except (ValueError, KeyError, TypeError) as error:
                    raise FileError(f"{path}: is damaged ({error}); move it away, and run again") from error
            yield sessions

    def _record(self, sessions: list[dict[str, Any]], started: str, report: StreamReport | None) -> None:
        if self._outputs is None:
            return
        session = {"started": started, "ended_by": None}
        content = {"sessions": [*sessions, session]} if report is None else asdict(report)
        with file_errors(self._outputs.folder):
            write_durably(self._outputs.folder / RUN_FILE, json.dumps(content, indent=1).encode())

    def _note_loss(self, loss: Loss) -> None:
        if self._letters is not None:
            self._letters.add(loss)
        if self._meter.total(loss.kind) < 5:
            self._progress.note(f"{loss.kind}: {loss.reason}")
        self._meter.add(loss.kind)

    def _report(
        self,
        books: Books,
        admit: Admit,
        commit: Commit,
        lanes: int,
        ended_by: str,
        started: str,
        sessions: list[dict[str, Any]],
    ) -> StreamReport:
        balance, meter, inference = self._ledger.balance, self._meter, self._inference
        notes = [*self._notes]
        if inference is not None and inference.problem is not None:
            notes.append(f"computed without CUDA graphs: {inference.problem}")
        ranges = [
            (run, name, first, last)
            for run, name in sorted({*books.seen.producers(), *admit.expected, *admit.ends})
            for first, last in books.seen.gaps(run, name, {**admit.expected, **admit.ends}.get((run, name)))
        ]
        gaps = [{"run": run, "source": name, "first": first, "last": last} for run, name, first, last in ranges]
        missing = sum(last - first + 1 for _, _, first, last in ranges)
        why = _why_not(balance, missing, self._source.guarantee, ended_by)
        seconds, samples = meter.seconds, meter.total("samples")
        ended = {"started": started, "ended_by": ended_by, "seconds": round(seconds, 3), **asdict(balance)}
        return StreamReport(
            guarantee=self._source.guarantee,
            held=not why,
            why=why,
            ended_by=ended_by,
            balance=asdict(balance),
            messages=admit.messages,
            repeats=admit.repeats,
            gaps=gaps[:_MOST_NAMED],
            missing=missing,
            peaks=int(meter.total("peaks")),
            parts=commit.parts,
            bytes_in=self._bytes_in,
            bytes_per_frame=round(self._bytes_in / samples, 1) if samples else 0.0,
            written_bytes=int(meter.total("written_bytes")),
            seconds=round(seconds, 3),
            events_per_second=round(balance.out / seconds, 3),
            frames_per_second=round(samples / seconds, 3),
            latency_ms=meter.latency(),
            device=device_name(self._device),
            device_busy=round(meter.total("busy_s") / (seconds * lanes), 4),
            lanes=lanes,
            network=network_name(self._options.model),
            policy=str(self.policy),
            notes=notes,
            weight_bytes=inference.weight_bytes if inference is not None else 0,
            peak_memory_mb=round(peak_memory_mb(self._device), 1),
            started=started,
            sessions=[*sessions, ended],
        )


def _why_not(balance: Balance, missing: int, guarantee: str, ended_by: str) -> list[str]:
    """Why the guarantee did not hold; nothing where it did."""
    why = []
    if balance.refused:
        why.append(f"{balance.refused} could not be used: dead_letters.jsonl names them")
    if balance.dropped:
        why.append(f"{balance.dropped} made room for newer ones: dead_letters.jsonl names them")
    if balance.leased:
        why.append(f"{balance.leased} were under way when the run ended, and are not on disk")
    if missing and guarantee == "numbered":
        why.append(f"{missing} did not reach us: gaps names them")
    if ended_by.startswith(("failed", "interrupted")):
        why.append(f"the run ended before its time ({ended_by})")
    return why


def _trial(options: StreamOptions, device: torch.device) -> Trial | None:
    """None where only the events will tell the size of samples."""
    preparation = options.preparation
    if preparation.size is None:
        return None
    return lane_trial(options.model, (options.batch_size, preparation.channels, *preparation.size), device)
