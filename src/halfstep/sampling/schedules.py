"""The noise levels that a diffusers scheduler leads a sample through: timestep and sigma of every state.

Sigma is in the scheduler's own unit: of flow matching the share of noise, x = (1 - sigma) x0 + sigma noise; of all
others noise over signal, x / a = x0 + sigma noise. A scheduler that is not named here is refused: its levels would be a
guess.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from halfstep.errors import InputError

Level = tuple[float, float]  # timestep, sigma
Rule = Callable[[Any, float], list[Level]]

# Pure noise has no finite noise over signal. This is the signal that diffusers' own Euler scheduler leaves it.
_LEAST_SIGNAL = 2.0**-24

# Arguments by which a pipeline takes the step, or parts of the sample, to a level that is not on the schedule.
OWN_LEVELS = ("per_token_timesteps", "r_timestep")

# What the states of a noise level are made of.
FLOW = "(1 - sigma) x0 + sigma noise"
EXPLODING = "x0 + sigma noise"
PRESERVING = "(x0 + sigma noise) / sqrt(1 + sigma^2)"

_LATE = "record: {} that begins at a later timestep (image-to-image) is not where its timesteps say; use {}"


def rule_of(scheduler: Any) -> Rule:
    """The rule by which `scheduler`'s levels are found. Raises InputError when there is none."""
    rule = next((_RULES[cls.__name__] for cls in type(scheduler).__mro__ if cls.__name__ in _RULES), None)
    if rule is None:
        raise InputError(
            f"record: how noisy the states of {type(scheduler).__name__} are is not known; use another scheduler, such "
            "as DDIMScheduler, EulerDiscreteScheduler or FlowMatchEulerDiscreteScheduler"
        )
    return rule


def states_of(scheduler: Any) -> str:
    """How the states of `scheduler` are made of data and noise: FLOW, EXPLODING or PRESERVING."""
    config = scheduler.config
    if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        return FLOW
    names = {cls.__name__ for cls in type(scheduler).__mro__}
    if names & _FLOWS:
        return FLOW
    return EXPLODING if names & _EXPLODING else PRESERVING


def settings_of(scheduler: Any) -> dict[str, Any]:
    """The settings of `scheduler` that are not its class's defaults, as JSON."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(type(scheduler)).parameters.items()}
    changed = {name: value for name, value in scheduler.config.items() if name in defaults and value != defaults[name]}
    return {name: value if _is_json(value) else str(value) for name, value in changed.items()}


def _is_json(value: Any) -> bool:
    """Whether `value` is one that JSON has; infinite numbers are none."""
    return isinstance(value, (str, int, type(None))) or (isinstance(value, float) and math.isfinite(value))


def levels(scheduler: Any, timestep: float) -> list[Level]:
    """Level of the state that the coming step at `timestep` is given, and of the state after it and each further step.

    Called before the first step, which need not be the schedule's first (image-to-image starts late). Where a state
    ends the schedule, its timestep is 0, or the largest of an inverse one. Raises InputError when the levels cannot be
    told.
    """
    return rule_of(scheduler)(scheduler, timestep)


def _from_sigmas(scheduler: Any, timestep: float) -> list[Level]:
    """Of schedulers that list one sigma a timestep, and the last."""
    return _listed(scheduler, timestep, [float(sigma) for sigma in scheduler.sigmas], 0.0)


def _from_lms_sigmas(scheduler: Any, timestep: float) -> list[Level]:
    if _index(scheduler, timestep) > 0:  # it counts on steps that were not made
        raise InputError(_LATE.format("LMSDiscreteScheduler", "EulerDiscreteScheduler"))
    return _from_sigmas(scheduler, timestep)


def _from_inverse_sigmas(scheduler: Any, timestep: float) -> list[Level]:
    sigmas = [float(sigma) for sigma in scheduler.sigmas]
    return _listed(scheduler, timestep, sigmas, float(scheduler.noisiest_timestep))


def _from_flow_sigmas(scheduler: Any, timestep: float) -> list[Level]:
    if not scheduler.config.get("invert_sigmas"):
        return _from_sigmas(scheduler, timestep)
    picture = [float(sigma) for sigma in scheduler.sigmas]  # its sigmas are the share of the picture
    end = float(scheduler.config.num_train_timesteps)
    return _listed(scheduler, timestep, [1 - share for share in picture], end)


def _from_lcm_flow_sigmas(scheduler: Any, timestep: float) -> list[Level]:
    for option in ("scale_factors", "invert_sigmas"):  # another size on the way; noise of the wrong share
        if scheduler.config.get(option):
            raise InputError(f"record: FlowMatchLCMScheduler with {option} cannot be recorded; leave that out")
    return _from_sigmas(scheduler, timestep)


def _from_halves(scheduler: Any, timestep: float, *, shift: int) -> list[Level]:
    """Of the second-order schedulers that go halfway, call the model there and then make the whole step: the states
    between are at `sigmas_interpol`, which begins `shift` places before the odd states."""
    sigmas = [float(sigma) for sigma in scheduler.sigmas[: len(scheduler.timesteps) + 1]]
    for odd in range(1, len(scheduler.timesteps), 2):
        sigmas[odd] = float(scheduler.sigmas_interpol[odd - shift])
    return _listed(scheduler, timestep, sigmas, 0.0)


def _listed(scheduler: Any, timestep: float, sigmas: list[float], end: float) -> list[Level]:
    timesteps = [float(t) for t in scheduler.timesteps]
    if len(sigmas) != len(timesteps) + 1:
        raise InputError(
            f"record: {type(scheduler).__name__} has {len(sigmas)} sigmas for {len(timesteps)} timesteps; expected one "
            "more sigma than timesteps"
        )
    return list(zip([*timesteps, end], sigmas, strict=True))[_index(scheduler, timestep) :]


def _from_alphas(scheduler: Any, timestep: float, *, final_alpha: Callable[[Any], float]) -> list[Level]:
    """Of schedulers that go from one listed timestep to the next."""
    timesteps = [int(t) for t in scheduler.timesteps][_index(scheduler, timestep) :]
    return [_level(scheduler, t) for t in timesteps] + [(0.0, _sigma(final_alpha(scheduler)))]


def _from_strides(scheduler: Any, timestep: float) -> list[Level]:
    """Of schedulers that go back by a fixed stride, whatever the next timestep is."""
    timesteps = [int(t) for t in scheduler.timesteps][_index(scheduler, timestep) :]
    reached = [t - _stride(scheduler) for t in timesteps]
    _require_joined(scheduler, reached, timesteps)
    return [_level(scheduler, t) for t in [timesteps[0], *reached]]


def _from_inverse_strides(scheduler: Any, timestep: float) -> list[Level]:
    """Of DDIM backwards, which calls the model at the timestep that the step leads to."""
    reached = [int(t) for t in scheduler.timesteps][_index(scheduler, timestep) :]
    left = [t - _stride(scheduler) for t in reached]
    _require_joined(scheduler, reached, left)
    first = _level(scheduler, left[0]) if left[0] >= 0 else (0.0, _sigma(float(scheduler.initial_alpha_cumprod)))
    return [first, *(_level(scheduler, t) for t in reached)]


def _from_betas(scheduler: Any, timestep: float) -> list[Level]:
    """Of IPNDM, which lists the share of noise. Its very first step, from pure noise, makes no part of the data yet."""
    shares = [float(beta) for beta in scheduler.betas]
    return _listed(scheduler, timestep, [_sigma(1 - share**2) for share in shares], 0.0)


def _from_pndm(scheduler: Any, timestep: float) -> list[Level]:
    """Of PNDM, whose first steps are made of several calls: by Runge and Kutta's method (four calls, two of them
    halfway), or twice to the same timestep."""
    timesteps = [int(t) for t in scheduler.timesteps]
    if timestep != timesteps[0]:
        raise InputError(_LATE.format("PNDMScheduler", "DDIMScheduler"))
    fourfold, stride = len(scheduler.prk_timesteps), _stride(scheduler)
    reached = []
    for call, t in enumerate(timesteps):
        if call < fourfold:
            reached.append(t if call % 2 else t - stride // 2)
        else:
            reached.append(t if call == 1 else t - stride)
    _require_joined(scheduler, reached, timesteps)
    return [_level(scheduler, t) for t in [timesteps[0], *reached]]


def _require_joined(scheduler: Any, reached: list[int], taken: list[int]) -> None:
    """Raise InputError when a step ends elsewhere than the next begins: the sample is then at neither level. Rounded
    timesteps may lie one apart."""
    for end, begin in zip(reached[:-1], taken[1:], strict=True):
        if abs(end - begin) > 1:
            raise InputError(
                f"record: a step of this {type(scheduler).__name__} ends at {end}, the next begins at {begin}, so "
                "the level between is not known; use timestep_spacing='leading' or 'trailing'"
            )


def _stride(scheduler: Any) -> int:
    return int(scheduler.config.num_train_timesteps // scheduler.num_inference_steps)


def _index(scheduler: Any, timestep: float) -> int:
    """Where in its schedule the coming step is. Two places may have one timestep, so what the scheduler itself knows
    comes first."""
    for known in ("step_index", "begin_index"):
        if getattr(scheduler, known, None) is not None:
            return int(getattr(scheduler, known))
    if hasattr(scheduler, "index_for_timestep"):
        return int(scheduler.index_for_timestep(timestep))
    return [float(t) for t in scheduler.timesteps].index(timestep)


def _level(scheduler: Any, timestep: int) -> Level:
    if timestep < 0:
        return 0.0, _sigma(float(scheduler.final_alpha_cumprod))
    return float(timestep), _sigma(float(scheduler.alphas_cumprod[timestep]))


def _sigma(alpha: float) -> float:
    """Noise over signal of a variance-preserving state: Karras et al. 2022 (EDM), table 1."""
    signal = max(alpha, _LEAST_SIGNAL)
    return float(((1 - signal) / signal) ** 0.5)


_FLOWS = {
    "FlowMapEulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "LTXEulerAncestralRFScheduler",
}
_EXPLODING = {
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
}

_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "DEISMultistepScheduler",
            "DPMSolverMultistepScheduler",
            "DPMSolverSinglestepScheduler",
            "EDMDPMSolverMultistepScheduler",
            "EDMEulerScheduler",
            "EulerAncestralDiscreteScheduler",
            "EulerDiscreteScheduler",
            "FlowMapEulerDiscreteScheduler",
            "FlowMatchHeunDiscreteScheduler",
            "HeunDiscreteScheduler",
            "LTXEulerAncestralRFScheduler",
            "SASolverScheduler",
            "UniPCMultistepScheduler",
        ),
        _from_sigmas,
    ),
    "FlowMatchEulerDiscreteScheduler": _from_flow_sigmas,
    "FlowMatchLCMScheduler": _from_lcm_flow_sigmas,
    "LMSDiscreteScheduler": _from_lms_sigmas,
    "DPMSolverMultistepInverseScheduler": _from_inverse_sigmas,
    "KDPM2DiscreteScheduler": partial(_from_halves, shift=0),
    "KDPM2AncestralDiscreteScheduler": partial(_from_halves, shift=1),
    "DDIMScheduler": _from_strides,
    "DDIMParallelScheduler": _from_strides,
    "CogVideoXDDIMScheduler": _from_strides,
    "CogVideoXDPMScheduler": _from_strides,
    "DDIMInverseScheduler": _from_inverse_strides,
    "IPNDMScheduler": _from_betas,
    "PNDMScheduler": _from_pndm,
    "DDPMScheduler": partial(_from_alphas, final_alpha=lambda _: 1.0),
    "DDPMParallelScheduler": partial(_from_alphas, final_alpha=lambda _: 1.0),
    "LCMScheduler": partial(_from_alphas, final_alpha=lambda _: 1.0),
    "TCDScheduler": partial(_from_alphas, final_alpha=lambda scheduler: float(scheduler.alphas_cumprod[0])),
}
