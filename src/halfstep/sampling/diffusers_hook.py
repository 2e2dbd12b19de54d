"""record(pipe, store, run=...): capture every state of a diffusers pipeline by its own callback.

with record(pipe, "runs", run="cat-0") as recording:
    pipe("a cat", callback_on_step_end=recording)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from halfstep.errors import InputError
from halfstep.sampling.recorder import Step, StoreRecorder
from halfstep.store import TrajectoryFormat, TrajectoryStore


class Recording:
    """The callback of a pipeline's call, for `callback_on_step_end`. It changes nothing."""

    def __init__(self, store: TrajectoryStore, runs: Sequence[str], options: dict[str, Any]) -> None:
        self._store, self._runs, self._options = store, runs, options
        self._recorders: list[StoreRecorder] = []
        self._schedule: _Schedule | None = None
        self._recorded = 0

    def __call__(self, pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if "latents" not in tensors:
            raise InputError(
                "record: the pipeline gives its callback no latents; add 'latents' to its "
                "callback_on_step_end_tensor_inputs"
            )
        if self._schedule is None:
            raise InputError(f"record: {type(pipe).__name__} does not sample through its scheduler's step")
        if self._recorded != i + 1:
            raise InputError(
                f"record: got scheduler step {i} after {self._recorded} states; give each call of a pipeline a `with "
                "record(...)` of its own"
            )
        self._record(self._schedule.level_after(i), tensors["latents"])
        return tensors

    def start(self, scheduler: Any, timestep: Any, latents: torch.Tensor) -> None:
        """Record the initial noise, as the scheduler's first step was given it."""
        self._schedule = _Schedule(scheduler, float(timestep))
        if len(latents) != len(self._runs):
            raise InputError(
                f"record: the pipeline samples {len(latents)} at once; got {len(self._runs)} names, give "
                "run=[...] one each"
            )
        self._recorders = [StoreRecorder(self._store, run, **self._options) for run in self._runs]
        self._record(self._schedule.level_after(-1), latents)

    @property
    def started(self) -> bool:
        return self._schedule is not None

    def finish(self) -> None:
        """Mark the runs complete when the sampler came to the end of its schedule. Raises InputError when there was
        nothing to record."""
        complete = self._schedule is not None and self._recorded == self._schedule.steps + 1
        for recorder in self._recorders:
            recorder.finish() if complete else recorder.close()
        if self._schedule is None:
            raise InputError("record: nothing was sampled; call the pipeline inside the `with` block")
        if self._recorded == 1:
            for run in self._runs:
                self._store.remove(run)
            raise InputError(
                "record: the callback was not called; give the pipeline callback_on_step_end=recording (what "
                "`with record(...) as recording` names)"
            )

    def close(self) -> None:
        for recorder in self._recorders:
            recorder.close()

    def _record(self, level: tuple[float, float], latents: torch.Tensor) -> None:
        timestep, sigma = level
        for recorder, latent in zip(self._recorders, latents, strict=True):
            recorder.record(Step(self._recorded, timestep, sigma, latent))
        self._recorded += 1


@contextmanager
def record(
    pipe: Any,
    store: TrajectoryStore | Path | str,
    *,
    run: str | Sequence[str],
    format: TrajectoryFormat | None = None,
    interval: int = 1,
    **attributes: Any,
) -> Iterator[Recording]:
    """Record one call of the diffusers pipeline `pipe` into `store`, which is made when it is not there.

    Yields the callback to give to the call as `callback_on_step_end`. `run` names the run, or one run a sample when the
    call makes several; `interval`, `format` and `attributes` (prompt=, seed=, ...) are as in `StoreRecorder`. The
    initial noise is step 0, the state after the i-th scheduler step is step i + 1, labelled with the noise level that
    the scheduler has reached. A run whose sampling stopped early stays incomplete. Raises InputError when a name is
    taken or the callback was never called.
    """
    opened = store if isinstance(store, TrajectoryStore) else TrajectoryStore.create(store)
    runs = [run] if isinstance(run, str) else list(run)
    for name in runs:
        if name in opened:
            raise InputError(f"{opened.root}: has a run {name!r} already; choose another name, or delete that folder")
    recording = Recording(
        opened, runs, {"format": format, "interval": interval, "model": _model_name(pipe), **attributes}
    )
    scheduler = pipe.scheduler
    original = scheduler.step

    @functools.wraps(original)  # pipelines look at its signature
    def step(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        initial = None if recording.started else sample.detach().clone()
        result = original(model_output, timestep, sample, *args, **kwargs)
        if initial is not None:
            recording.start(scheduler, timestep, initial)
        return result

    scheduler.step = step
    try:
        yield recording
    except BaseException:
        recording.close()
        raise
    finally:
        del scheduler.step
    recording.finish()


class _Schedule:
    """The timesteps and noise levels of a diffusers scheduler, beginning where this call began (image-to-image starts
    late)."""

    def __init__(self, scheduler: Any, first_timestep: float) -> None:
        timesteps = [float(t) for t in scheduler.timesteps]
        if hasattr(scheduler, "sigmas") and getattr(scheduler, "step_index", None) is not None:
            sigmas = [float(sigma) for sigma in scheduler.sigmas]
            begin = scheduler.step_index - 1  # it has made its first step
        elif hasattr(scheduler, "alphas_cumprod"):
            alphas = scheduler.alphas_cumprod
            last = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
            # Variance-exploding noise level of a variance-preserving state: Karras et al. 2022 (EDM), table 1.
            sigmas = [((1 - a) / a) ** 0.5 for a in [*(float(alphas[int(t)]) for t in timesteps), last]]
            begin = timesteps.index(first_timestep)
        else:
            raise InputError(
                f"record: {type(scheduler).__name__} has neither sigmas nor alphas_cumprod; use a scheduler whose "
                "noise levels are known"
            )
        if len(sigmas) != len(timesteps) + 1:
            raise InputError(
                f"record: {type(scheduler).__name__} has {len(sigmas)} sigmas for {len(timesteps)} timesteps; expected "
                "one more sigma than timesteps"
            )
        self._levels = list(zip([*timesteps, 0.0], sigmas, strict=True))[begin:]

    @property
    def steps(self) -> int:
        """The number of scheduler steps."""
        return len(self._levels) - 1

    def level_after(self, i: int) -> tuple[float, float]:
        """Timestep and sigma of the state after scheduler step `i`; -1 for the initial noise."""
        return self._levels[i + 1]


def _model_name(pipe: Any) -> str:
    return str(getattr(pipe, "name_or_path", "") or type(pipe).__name__)
