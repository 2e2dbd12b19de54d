"""Recorders: what becomes of a sampler's steps. Recording never changes a sample, bit for bit."""

from __future__ import annotations

import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch

import halfstep
from halfstep.engine import HostCopy, Ring
from halfstep.errors import HalfstepError, InputError, NumericsError
from halfstep.store import RunWriter, TrajectoryFormat, TrajectoryStore

Ticket = Future[None]

_MOST_WAITING = 4  # steps between the sampler and the disk; a sampler that is faster waits


@dataclass(frozen=True)
class Step:
    """A state of a sampler: `latent` [C, (T,) H, W] of any floating type on any device, at noise level `sigma` (in the
    sampler's unit) and `timestep` (the scheduler's). `index` 0 is the initial noise."""

    index: int
    timestep: float
    sigma: float
    latent: torch.Tensor


class Recorder(Protocol):
    """Takes the steps of one run. A ticket is done when its step is safe; `finish` ends a run that came to its end,
    `close` one that did not."""

    def record(self, step: Step) -> Ticket: ...

    def finish(self) -> None: ...

    def close(self) -> None: ...


class NullRecorder:
    """Keeps nothing."""

    def record(self, step: Step) -> Ticket:
        return _done()

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


class MemoryRecorder:
    """Keeps all steps as float32 on the CPU, in `steps`."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def record(self, step: Step) -> Ticket:
        kept = step.latent.detach().to("cpu", torch.float32, copy=True)
        self.steps.append(replace(step, latent=kept))
        return _done()

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


class StoreRecorder:
    """Records into a TrajectoryStore, off the sampler's path.

    `record` copies the latent (from a GPU into pinned memory, without waiting for it) and returns; a thread writes it
    to the run's journal. `finish` encodes the steps: earlier, that would take a sampler's cores, or the interpreter's
    lock from one that launches kernels. At most a few steps wait in memory: a sampler that is faster than the disk
    waits.
    `interval` keeps every n-th step, and always the first and the last; the tickets of others are done at once, and the
    last, when it falls between, is written by `finish` or `close`. When the store cannot take a step (a full disk),
    sampling goes on: one warning is given, that ticket and all after it hold the error, and the run stays incomplete.
    Besides `attributes` the run keeps its date, the versions, the device and the type of its latents. As a context
    manager it finishes on a clean exit. Of a run without any step nothing is left. Raises InputError when
    the run's name is taken, the shape changes, the index does not grow, or a latent is empty or no floating numbers.
    """

    def __init__(
        self,
        store: TrajectoryStore,
        key: str,
        *,
        format: TrajectoryFormat | None = None,
        interval: int = 1,
        **attributes: Any,
    ) -> None:
        if interval < 1:
            raise InputError(f"storage interval: got {interval}; expected 1 or more steps")
        self.key = key
        self._interval = interval
        self._where = f"{store.root}/{key}"
        versions = {"halfstep": halfstep.__version__, "torch": torch.__version__, **attributes.pop("versions", {})}
        noted = {"recorded": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions, **attributes}
        self._writer: RunWriter = store.record(key, format, **noted)
        self._shape: torch.Size | None = None
        self._last_index = -1
        self._held: _Copy | None = None  # a step that is kept only if it turns out to be the last
        self._ended = False
        self._source: dict[str, str] | None = None  # device and type of the first latent
        self._failure: BaseException | None = None
        self._warned = False
        self._ring: Ring | None = None
        self._thread = ThreadPoolExecutor(1, f"record {key}")

    def record(self, step: Step) -> Ticket:
        if self._ended:
            raise InputError(f"{self._where}: got step {step.index} after the recording was finished or closed")
        if not step.latent.is_floating_point() or step.latent.numel() == 0:
            raise InputError(
                f"{self._where}: step {step.index} is {str(step.latent.dtype).removeprefix('torch.')} "
                f"{list(step.latent.shape)}; expected floating numbers, and some of them"
            )
        if self._shape is not None and step.latent.shape != self._shape:
            raise InputError(
                f"{self._where}: step {step.index} has the shape {list(step.latent.shape)}, the steps before "
                f"{list(self._shape)}; record another shape as another run"
            )
        if step.index <= self._last_index:
            raise InputError(f"{self._where}: got step {step.index} after step {self._last_index}; steps must grow")
        if not all(isinstance(label, (int, float)) and np.isfinite(label) for label in (step.timestep, step.sigma)):
            raise InputError(
                f"{self._where}: step {step.index}: got timestep {step.timestep}, sigma {step.sigma}; expected numbers"
            )
        first = self._shape is None
        self._shape, self._last_index = step.latent.shape, step.index
        self._warn_once()
        if self._ring is None:
            self._ring = Ring(_MOST_WAITING, step.latent.device)
        ticket: Ticket = Future()
        copy = _Copy(step, self._ring.download(step.latent.detach()))
        if self._held is not None:
            self._held.host.release()  # it was not the last, so it is not kept
            self._held = None
        if first or step.index % self._interval == 0:
            self._submit(copy, ticket)
        else:
            self._held = copy
            ticket.set_result(None)
        return ticket

    def finish(self) -> None:
        """Wait until all is on disk and mark the run complete; after a failure it stays incomplete. A second call does
        nothing."""
        if not self._drain():
            return
        try:
            if self._failure is None:
                self._writer.finish()
            else:
                self._writer.note_problem(f"recording stopped: {self._failure}")
        except HalfstepError as error:
            self._failure = self._failure or error
        finally:
            self._writer.close()
        self._warn_once()

    def close(self) -> None:
        """Wait until all that was recorded is on disk, and leave the run incomplete. Does nothing after `finish`."""
        if not self._drain():
            return
        self._writer.close()
        self._warn_once()

    def discard(self) -> None:
        """Wait until the store is at rest, and leave nothing of the run."""
        if self._drain():
            self._writer.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        else:
            self.close()

    def _submit(self, copy: _Copy, ticket: Ticket) -> None:
        def settle(written: Future[None]) -> None:
            copy.host.release()
            self._note_failure(written)
            error = written.exception()
            ticket.set_result(None) if error is None else ticket.set_exception(error)

        self._thread.submit(self._append, copy).add_done_callback(settle)

    def _append(self, copy: _Copy) -> None:
        if self._failure is not None:
            raise self._failure
        self._writer.append(copy.index, copy.timestep, copy.sigma, copy.values())
        if self._source is None:
            self._source = copy.source
            self._writer.note(**copy.source)

    def _note_failure(self, written: Future[None]) -> None:
        self._failure = self._failure or written.exception()

    def _drain(self) -> bool:
        """Write what waits and take no more; False when that was done before."""
        if self._ended:
            return False
        self._ended = True
        if self._held is not None:
            self._submit(self._held, Future())
            self._held = None
        self._thread.shutdown()
        return True

    def _warn_once(self) -> None:
        """In the sampler's thread, so that the warning points at its caller."""
        if self._failure is not None and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self._where}: recording stopped, sampling goes on: {self._failure}", RuntimeWarning, stacklevel=3
            )


class _Copy:
    """A step whose latent is on its way to the host. The copy from a GPU runs behind the sampler's own work."""

    def __init__(self, step: Step, host: HostCopy) -> None:
        latent = step.latent
        name = torch.cuda.get_device_name(latent.device) if latent.is_cuda else str(latent.device)
        self.source = {"device": name, "dtype": str(latent.dtype).removeprefix("torch.")}
        self.index, self.timestep, self.sigma, self.host = step.index, step.timestep, step.sigma, host

    def values(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """float32, once the copy has arrived; to be used before `host` is released. Raises NumericsError for finite
        float64 that float32 has no room for."""
        host = self.host.wait()
        values = host.float()
        if host.dtype == torch.float64 and (lost := int((values.isinf() & host.isfinite()).sum())):
            raise NumericsError(
                f"step {self.index}: {lost} of its float64 values are beyond float32's range; scale them down, or "
                "record it without them"
            )
        return values.contiguous().numpy()


def _done() -> Ticket:
    ticket: Ticket = Future()
    ticket.set_result(None)
    return ticket
