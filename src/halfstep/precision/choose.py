"""Which policy work runs in: what was asked for, what its folder was made with, and what the device really has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from halfstep.errors import InputError
from halfstep.precision.policy import PRESETS, PrecisionPolicy
from halfstep.precision.probe import TASKS, probe

if TYPE_CHECKING:
    from halfstep.precision.trial import Trial

_WORTHWHILE = 1.1  # below this a half type costs accuracy and buys nothing that a rerun would still see


class Settled(NamedTuple):
    """The policy to use, and lines that the user should know of it."""

    policy: PrecisionPolicy
    notes: tuple[str, ...] = ()


def choose(device: str | torch.device, task: str) -> PrecisionPolicy:
    """What `auto` is on `device`: the fastest format that it really has, decided by `probe`.

    `task` is "encode", "sample" or "train". Inference holds the weights in the half type; training keeps fp32 weights
    and computes mixed. A half type that is not at least 1.1 times as fast as fp32 is not chosen. Latents go to fp16,
    which rounds eight times finer than bf16 in the same bytes; values that do not fit are caught when they are written.
    """
    if task not in TASKS:
        raise InputError(f"precision: got task {task!r}; expected one of {', '.join(TASKS)}")
    result = probe(device)
    speedups = {name: result.speedup(name, task) for name in result.types if name != "fp32"}
    told = ", ".join(
        f"{name} {speedup:.2f}x" + ("" if result.types[name].sound else " (unsound range or rounding)")
        for name, speedup in speedups.items()
    )
    usable = [name for name, speedup in speedups.items() if speedup >= _WORTHWHILE and result.types[name].sound]
    best = max(usable, key=speedups.__getitem__, default="fp32")
    reason = f"Measured on {result.device} for {task}, speed against fp32: {told}; {best} is the fastest sound type."
    if best in ("fp32", "tf32"):
        return PrecisionPolicy(compute=best, storage="fp16", reason=reason)
    if task == "train":
        loss_scale = "dynamic" if best == "fp16" else None
        return PrecisionPolicy(compute=best, storage="fp16", loss_scale=loss_scale, reason=reason)
    return PrecisionPolicy(params=best, compute=best, storage="fp16", reason=reason)


def resolve(policy: PrecisionPolicy, device: str | torch.device, task: str) -> PrecisionPolicy:
    """`policy`, or for `auto` what `choose` gives, with what was set beside `auto` kept."""
    return _with_settings_of(policy, choose(device, task)) if policy.is_auto else policy


def settle(
    asked: str | PrecisionPolicy,
    device: str | torch.device,
    task: str,
    kept: str | PrecisionPolicy | None = None,
    trial: Callable[[], Trial | None] | None = None,
) -> Settled:
    """The policy for `task` on `device`, decided in this one place for every verb.

    `asked`: as `PrecisionPolicy.parse` reads it. For `auto` that is `kept`, which earlier work in the same folder was
    done in, and without such the measured choice; a half type is taken back where it is not faster in the work's own
    `trial` either, which is made only then. The notes tell when a half type is slower than fp32 here, which means
    that it is emulated. Raises InputError when a type that was asked for by name is not there; where it was only kept,
    the policy is fp32 and a note says so.
    """
    wanted = PrecisionPolicy.parse(asked) if isinstance(asked, str) else asked
    if wanted.is_auto and kept is None:
        return Settled(_with_settings_of(wanted, _tried(choose(device, task), trial)))
    policy = wanted
    if wanted.is_auto and kept is not None:
        policy = _with_settings_of(wanted, PrecisionPolicy.parse(kept) if isinstance(kept, str) else kept)
    if policy.compute in ("fp32", "tf32"):
        return Settled(policy)
    result = probe(device)
    speedup = result.speedup(policy.compute, task)
    if speedup == 0 and not wanted.is_auto:
        raise InputError(f"precision: {result.device} cannot compute in {policy.compute}; use fp32 or auto")
    if speedup == 0:
        note = f"{result.device} cannot compute in {policy.compute}, as before; fp32 is used instead"
        return Settled(PrecisionPolicy(storage=policy.storage), (note,))
    if speedup < 1:
        note = f"{policy.compute} is {1 / speedup:.1f} times as slow as fp32 on {result.device}"
        return Settled(policy, (f"{note}: it is emulated, and auto would not choose it",))
    return Settled(policy)


def _tried(policy: PrecisionPolicy, trial: Callable[[], Trial | None] | None) -> PrecisionPolicy:
    """A measured choice, or fp32 where a trial says that it is as good."""
    if trial is None or policy.compute in ("fp32", "tf32") or (made := trial()) is None:
        return policy
    if (found := made.speedup(policy)) is None:
        return policy
    reason = f"{policy.reason} This network itself: {policy.compute} {found:.2f}x"
    if found >= _WORTHWHILE:
        return replace(policy, reason=f"{reason}.")
    return PrecisionPolicy(storage=policy.storage, reason=f"{reason}, so it stays in fp32.")


def _with_settings_of(auto: PrecisionPolicy, policy: PrecisionPolicy) -> PrecisionPolicy:
    """`policy`, with what was set beside `auto` in its place."""
    set_by_user = {
        f.name: getattr(auto, f.name)
        for f in fields(auto)
        if f.compare and getattr(auto, f.name) != getattr(PRESETS["auto"], f.name)
    }
    return replace(policy, **set_by_user)
