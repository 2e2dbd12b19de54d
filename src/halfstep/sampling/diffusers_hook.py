"""record(pipe, store, run=...): capture every state of a diffusers pipeline by its own callback.

with record(pipe, "runs", run="cat-0") as recording:
    pipe("a cat", callback_on_step_end=recording)
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from halfstep.errors import InputError
from halfstep.sampling.recorder import Step, StoreRecorder
from halfstep.sampling.schedules import OWN_LEVELS, Level, levels, rule_of, settings_of, states_of
from halfstep.store import TrajectoryFormat, TrajectoryStore

# Pipelines whose latents are [N, T, C, H, W], by how their names begin.
_FRAMES_FIRST = ("CogVideoX", "ConsisID", "StableVideoDiffusion")


class Recording:
    """The callback of a pipeline's call, for `callback_on_step_end`. It changes nothing. `refused`: why what the
    pipeline does cannot be recorded, once that is known; sampling goes on, and nothing is left of the runs."""

    def __init__(self, store: TrajectoryStore, runs: Sequence[str], attributes: Sequence[dict[str, Any]]) -> None:
        self._store, self._runs, self._attributes = store, runs, attributes
        self._recorders: list[StoreRecorder] = []
        self._levels: list[Level] = []
        self._facts: dict[str, Any] = {}
        self._initial: torch.Tensor | None = None
        self._made = 0  # scheduler steps
        self._recorded = 0
        self.refused: str | None = None

    def __call__(self, pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if self.refused is None:
            try:
                self._take(pipe, i, tensors)
            except InputError as error:
                self._refuse(error)
        return tensors

    def before_step(self, scheduler: Any, timestep: Any, sample: torch.Tensor, options: dict[str, Any]) -> None:
        """Take note of a scheduler's step."""
        if self.refused is None:
            try:
                self._expect(scheduler, timestep, sample, options)
            except InputError as error:
                self._refuse(error)

    def _take(self, pipe: Any, i: int, tensors: dict[str, Any]) -> None:
        """Record the state after step `i`. Raises InputError when it is not the one that was expected."""
        if "latents" not in tensors:
            raise InputError(
                "record: the pipeline gives its callback no latents; add 'latents' to its "
                "callback_on_step_end_tensor_inputs"
            )
        if self._made == 0:
            raise InputError(
                f"record: {type(pipe).__name__} does not sample through the step of its own scheduler, but through a "
                "copy's or none; such a pipeline cannot be recorded"
            )
        latents = tensors["latents"]
        if self._initial is not None:
            self._begin(pipe, self._initial, latents)
        if self._recorded != i + 1:
            raise InputError(
                f"record: got scheduler step {i} after {self._recorded} states; give each call of a pipeline a `with "
                "record(...)` of its own"
            )
        if self._made != i + 1:
            raise InputError(
                f"record: {type(pipe).__name__} made {self._made} scheduler steps until it called back for step {i}; "
                "expected one a call"
            )
        self._record(latents)

    def _expect(self, scheduler: Any, timestep: Any, sample: torch.Tensor, options: dict[str, Any]) -> None:
        """Raises InputError when the states cannot be labeled, before the first step where it can be known there."""
        own = next((name for name in OWN_LEVELS if options.get(name) is not None), None)
        if own is not None:
            raise InputError(f"record: the pipeline gives its scheduler {own}, so its states have no one noise level")
        if self._made == 0:
            if len(sample) != len(self._runs):
                raise InputError(
                    f"record: the pipeline samples {len(sample)} at once; got {len(self._runs)} names, give "
                    "run=[...] one each"
                )
            self._levels = levels(scheduler, float(timestep))
            self._facts = _facts_of(scheduler)
            self._initial = sample.detach().clone()
        self._made += 1

    def _refuse(self, error: InputError) -> None:
        self.refused = str(error)
        for recorder in self._recorders:
            recorder.discard()
        warnings.warn(f"{error}; it is not recorded, sampling goes on", RuntimeWarning, stacklevel=4)

    def finish(self) -> None:
        """Mark the runs complete when the sampler came to the end of its schedule. Raises InputError when there was
        nothing to record."""
        if self.refused is not None:
            return
        complete = self._recorded == len(self._levels)
        for recorder in self._recorders:
            recorder.finish() if complete else recorder.close()
        if self._made == 0:
            raise InputError("record: nothing was sampled; call the pipeline inside the `with` block")
        if self._recorded == 0:
            raise InputError(
                "record: the callback was not called; give the pipeline callback_on_step_end=recording (what "
                "`with record(...) as recording` names)"
            )

    def close(self) -> None:
        for recorder in self._recorders if self.refused is None else []:
            recorder.close()

    def _begin(self, pipe: Any, initial: torch.Tensor, latents: torch.Tensor) -> None:
        """Make the runs and record the initial noise, as the scheduler's first step was given it."""
        if initial.shape != latents.shape:
            raise InputError(
                f"record: {type(pipe).__name__} steps a sample of shape {list(initial.shape)} and calls back with "
                f"{list(latents.shape)}; a pipeline that steps a part of its latents cannot be recorded"
            )
        known = {"guidance": guidance} if (guidance := _guidance(pipe)) is not None else {}
        self._recorders = [
            StoreRecorder(self._store, run, **known | self._facts | attributes)
            for run, attributes in zip(self._runs, self._attributes, strict=True)
        ]
        self._initial = None
        self._record(initial)

    def _record(self, latents: torch.Tensor) -> None:
        timestep, sigma = self._levels[self._recorded]
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
    call makes several; `interval`, `format` and `attributes` (prompt=, seed=, ..., of these two also a list, one a run)
    are as in `StoreRecorder`; model, pipeline, scheduler with its settings, steps, guidance and versions are noted by
    themselves, what else decides a run (negative_prompt=, width=, ...) is yours to note. The initial noise is step 0,
    the state after the i-th scheduler step is step i + 1, labeled with the noise level that the scheduler has reached.
    A run whose sampling stopped early stays incomplete.
    What cannot be recorded rightly once the pipeline runs is refused with one RuntimeWarning: sampling goes on, and
    nothing is left under the name. Raises InputError when a name is taken, when the levels of this kind of scheduler
    are not known, or when the callback was never called.
    """
    rule_of(pipe.scheduler)
    opened = store if isinstance(store, TrajectoryStore) else TrajectoryStore.create(store)
    runs = [run] if isinstance(run, str) else list(run)
    for name in runs:
        if name in opened:
            raise InputError(f"{opened.root}: has a run {name!r} already; choose another name, or delete that folder")
    named = {"model": _model_name(pipe), "pipeline": type(pipe).__name__}
    form = format or TrajectoryFormat()
    if type(pipe).__name__.startswith(_FRAMES_FIRST) and form.channel_axis is None:
        form = replace(form, channel_axis=1)
    options = {"format": form, "interval": interval, **named, **attributes}
    recording = Recording(opened, runs, [_of_sample(options, index, len(runs)) for index in range(len(runs))])
    try:
        with _watched(pipe.scheduler, recording):
            yield recording
    except BaseException:
        recording.close()
        raise
    recording.finish()


@contextmanager
def _watched(scheduler: Any, recording: Recording) -> Iterator[None]:
    """Let `recording` see the steps of this one scheduler.

    Its class is changed, not the object: what a pipeline copies of it, by copy, deepcopy or pickle, is a plain
    scheduler that steps itself.
    """
    if "step" in vars(scheduler):
        raise InputError(f"record: the step of this {type(scheduler).__name__} was replaced; give it its own back")
    plain: Any = type(scheduler)
    signature = inspect.signature(plain.step)

    @functools.wraps(plain.step)  # pipelines look at its signature
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is scheduler:
            given = signature.bind(self, *args, **kwargs).arguments
            recording.before_step(self, given["timestep"], given["sample"], given)
        return plain.step(self, *args, **kwargs)

    def reduce(self: Any, _: Any) -> Any:
        # Of protocol 1, because pickle holds what protocol 2 and later say of the class against the object's own.
        function, made_of, *rest = plain.__reduce_ex__(self, 1)
        return function, tuple(plain if part is type(self) else part for part in made_of), *rest

    watched = {"step": step, "__reduce_ex__": reduce, "__module__": plain.__module__, "__doc__": plain.__doc__}
    scheduler.__class__ = type(plain.__name__, (plain,), watched)
    try:
        yield
    finally:
        scheduler.__class__ = plain


def _of_sample(options: dict[str, Any], index: int, samples: int) -> dict[str, Any]:
    """What is said of one of several samples, whose prompts and seeds may be lists as the pipeline takes them."""
    lists = {name: options[name] for name in ("prompt", "seed") if isinstance(options.get(name), (list, tuple))}
    for name, values in lists.items():
        if len(values) != samples:
            raise InputError(f"record: {name} is a list of {len(values)} for {samples} runs; expected one each")
    # One generator draws the noise of all samples, one after the other.
    drawn = {"noise_index": index} if index and isinstance(options.get("seed"), int) else {}
    return {**options, **drawn, **{name: values[index] for name, values in lists.items()}}


def _facts_of(scheduler: Any) -> dict[str, Any]:
    """What decides how comparable runs of `scheduler` are."""
    return {
        "scheduler": type(scheduler).__name__,
        "scheduler_settings": settings_of(scheduler),
        "states": states_of(scheduler),
        "steps": int(scheduler.num_inference_steps or len(scheduler.timesteps)),
        "versions": {"diffusers": importlib.metadata.version("diffusers")},
    }


def _guidance(pipe: Any) -> float | None:
    """The scale of the guidance of the pipeline's call, where it tells."""
    scale = getattr(pipe, "guidance_scale", None)
    return float(scale) if isinstance(scale, (int, float)) else None


def _model_name(pipe: Any) -> str:
    return str(getattr(pipe, "name_or_path", "") or type(pipe).__name__)
