"""Every scheduler of diffusers is recorded with the noise levels its states have, or refused by name; never changed.

The oracle: a model that knows the picture x0, and predicts exactly the noise that is in a state of the level that its
label says. With right labels, every state is `a x0 + s noise`; with wrong ones the model misleads the scheduler.
"""

import inspect
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from halfstep.errors import InputError
from halfstep.sampling import record, schedules
from halfstep.sampling.schedules import levels
from halfstep.store import TrajectoryFormat, TrajectoryStore

SHAPE = (1, 4, 48, 48)
NAMES = [name for name in dir(diffusers) if name.endswith("Scheduler")]
FLOW = {
    "FlowMapEulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "LTXEulerAncestralRFScheduler",
}
EXPLODING = {  # their states are x0 + sigma noise, all others' but flow's are scaled to a variance of one
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
}
PRESERVING = {
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "IPNDMScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
}
RECORDED = FLOW | EXPLODING | PRESERVING


def pattern(seed: int) -> torch.Tensor:
    """Of mean square one; two of them are orthogonal but for chance."""
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values / values.square().mean().sqrt()


X0, NOISE = pattern(1), pattern(2)


# From pure noise, IPNDM's first step drops the data that its model sees.
SHARES = {"trained_betas": [0.97, 0.9, 0.8, 0.7, 0.5, 0.3, 0.1, 0.0]}


def make(name: str, **config: Any) -> Any:
    config = (SHARES if name == "IPNDMScheduler" else {}) | config
    cls = getattr(diffusers, name)
    stable_diffusion = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    common = {**stable_diffusion, "clip_sample": False, "prediction_type": "epsilon"}
    known = inspect.signature(cls.__init__).parameters
    return cls(**{key: value for key, value in common.items() if key in known} | config)


class Loop:
    """A pipeline's sampling loop with the oracle as its model, from step `begin` of the schedule on."""

    def __init__(self, scheduler: Any, steps: int = 7, begin: int = 0) -> None:
        self.scheduler, self.steps, self.begin = scheduler, steps, begin
        self.levels: list[tuple[float, float]] = []
        self.states: list[torch.Tensor] = []

    def parts(self, sigma: float) -> tuple[float, float]:
        """The factors of x0 and of the noise at a level."""
        name, config = type(self.scheduler).__name__, self.scheduler.config
        if name in FLOW or config.get("use_flow_sigmas"):
            return 1 - sigma, sigma
        if name in EXPLODING:
            return 1.0, sigma
        return 1 / (1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5

    def model(self, x: torch.Tensor, index: int) -> torch.Tensor:
        signal, share = self.parts(self.levels[index][1])
        noise = (x - signal * X0) / share if share > 0 else NOISE
        scheduler = self.scheduler
        if hasattr(scheduler, "precondition_outputs"):  # the output that it turns into x0
            sigma = scheduler.sigmas[self.begin + index]
            zero, one = (scheduler.precondition_outputs(x, torch.full_like(x, v), sigma) for v in (0.0, 1.0))
            return (X0 - zero) / (one - zero)
        if type(scheduler).__name__ == "IPNDMScheduler":
            return (noise - share * x) / signal
        if type(scheduler).__name__ in FLOW or scheduler.config.get("use_flow_sigmas"):
            return (X0 - noise) if scheduler.config.get("invert_sigmas") else (noise - X0)
        if scheduler.config.prediction_type == "v_prediction":
            return (signal * noise - share * X0) / (signal**2 + share**2) ** 0.5
        return noise

    def __call__(self, callback_on_step_end: Any = None) -> torch.Tensor:
        torch.manual_seed(3)
        scheduler = self.scheduler
        scheduler.set_timesteps(self.steps)
        if self.begin and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(self.begin)
        timesteps = scheduler.timesteps[self.begin :]
        self.levels = levels(scheduler, float(timesteps[0]))
        signal, share = self.parts(self.levels[0][1])
        x = signal * X0 + share * NOISE
        self.states = [x]
        known: Any = None
        for i, t in enumerate(timesteps):
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            if type(scheduler).__name__ == "CogVideoXDPMScheduler":
                x, known = scheduler.step(self.model(x, i), known, t, timesteps[i - 1] if i else None, x)
            else:
                x = scheduler.step(self.model(x, i), t, x, return_dict=False)[0]
            self.states.append(x)
            if callback_on_step_end:
                x = callback_on_step_end(self, i, t, {"latents": x})["latents"]
        return x

    def require_right(self, labels: Any, states: Any) -> None:
        assert len(labels) == len(states)
        for sigma, state in zip(labels, states, strict=True):
            signal, share = self.parts(float(sigma))
            noise = torch.as_tensor(state, dtype=torch.float64).reshape(SHAPE) - signal * X0
            # Chance, some four deviations of it: 1 / sqrt(2 N) of a noise's strength, 1 / sqrt(N) of its product with
            # x0. And what timesteps that are rounded to whole numbers leave.
            assert float(noise.square().mean().sqrt()) == pytest.approx(share, rel=0.03, abs=0.006)
            assert abs(float((noise * X0).mean())) < 0.04 * share + 0.006


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_a_recorded_scheduler_has_right_labels_and_the_same_sample(name: str, tmp_path: Path) -> None:
    loop = Loop(make(name))
    plain = loop()
    with record(loop, tmp_path / "s", run="a", format=TrajectoryFormat(storage="fp32")) as recording:
        recorded = loop(callback_on_step_end=recording)
    assert torch.equal(plain, recorded)
    assert type(loop.scheduler) is getattr(diffusers, name)
    run = TrajectoryStore.open(tmp_path / "s")["a"]
    assert run.problems == ()
    assert np.array_equal(run.latents[-1], plain[0].float().numpy())
    loop.require_right(run.sigmas, run.latents)
    signal, share = loop.parts(2.0)
    kind = {(-1.0, 2.0): schedules.FLOW, (1.0, 2.0): schedules.EXPLODING}.get((signal, share), schedules.PRESERVING)
    facts = {name: run.attributes[name] for name in ("scheduler", "states", "steps", "dtype", "device")}
    assert facts == {"scheduler": name, "states": kind, "steps": 7, "dtype": "float64", "device": "cpu"}
    assert set(run.attributes["versions"]) == {"halfstep", "torch", "diffusers"}
    inverse = "Inverse" in name
    assert (np.diff(run.sigmas) >= 0).all() if inverse else (np.diff(run.sigmas) <= 0).all()
    assert run.timesteps[0 if not inverse else -1] == max(run.timesteps)


@pytest.mark.parametrize("name", sorted(set(NAMES) - RECORDED))
def test_any_other_scheduler_is_refused_by_name_before_anything(name: str, tmp_path: Path) -> None:
    cls = getattr(diffusers, name)
    loop = Loop(cls.__new__(cls))  # some cannot be made without packages that are not there
    with (
        pytest.raises(InputError, match=rf"states of {name} are is not known; use another"),
        record(loop, tmp_path / "s", run="a"),
    ):
        pytest.fail("the block was entered")
    assert not (tmp_path / "s").exists()


SPACED = ["DDIMScheduler", "CogVideoXDDIMScheduler", "DDIMInverseScheduler", "DDPMScheduler", "LCMScheduler"]
LISTED = ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "KDPM2DiscreteScheduler"]

ZERO_SIGNAL = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}


@pytest.mark.parametrize(
    ("name", "config", "steps", "begin"),
    [
        *((name, {"timestep_spacing": s, "steps_offset": 1}, 7, 0) for name in SPACED for s in ("leading", "trailing")),
        *((name, {}, 8, 3) for name in SPACED),
        *((name, {"use_karras_sigmas": True}, 7, 0) for name in LISTED),
        *((name, {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}, 6, 2) for name in LISTED),
        *((name, ZERO_SIGNAL, 7, 0) for name in ("DDIMScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")),
        ("EulerDiscreteScheduler", ZERO_SIGNAL, 7, 0),
        ("DDIMScheduler", {"set_alpha_to_one": False}, 7, 0),
        ("LCMScheduler", {"set_alpha_to_one": False}, 7, 0),
        ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}, 7, 0),
        ("PNDMScheduler", {"steps_offset": 1}, 12, 0),
        ("HeunDiscreteScheduler", {}, 6, 4),
        ("KDPM2AncestralDiscreteScheduler", {"use_karras_sigmas": True}, 6, 4),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, 7, 0),
        ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, 7, 0),
        ("DPMSolverMultistepInverseScheduler", {"timestep_spacing": "trailing"}, 7, 0),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, 7, 2),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 7, 2),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, 7, 0),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, 7, 0),
    ],
)  # fmt: skip
def test_labels_are_right_whatever_the_schedule(name: str, config: dict[str, Any], steps: int, begin: int) -> None:
    loop = Loop(make(name, **config), steps, begin)
    loop()
    loop.require_right([sigma for _, sigma in loop.levels], loop.states)
    assert np.isfinite(loop.levels).all()


@pytest.mark.parametrize(
    ("name", "config", "begin", "named"),
    [
        ("DDIMScheduler", {"timestep_spacing": "linspace"}, 0, "ends at 857, the next begins at 832"),
        ("PNDMScheduler", {"skip_prk_steps": True}, 2, "PNDMScheduler that begins at a later timestep"),
        ("LMSDiscreteScheduler", {}, 2, "LMSDiscreteScheduler that begins at a later timestep"),
        ("FlowMatchLCMScheduler", {"scale_factors": [0.5, 1.0], "upscale_mode": "nearest"}, 0, "with scale_factors"),
    ],
)
def test_schedules_whose_states_are_at_no_level_are_refused(
    name: str, config: dict[str, Any], begin: int, named: str
) -> None:
    with pytest.raises(InputError, match=named):
        Loop(make(name, **config), begin=begin)()


def test_the_noise_of_ipndm_from_its_very_beginning() -> None:
    loop = Loop(make("IPNDMScheduler", trained_betas=None))
    loop.model = lambda x, index: torch.zeros_like(x) if index == 0 else Loop.model(loop, x, index)  # type: ignore[method-assign]
    loop()
    share = loop.parts(loop.levels[1][1])[1]
    assert loop.states[1] == pytest.approx(share * loop.states[0], abs=1e-3)
    assert np.isfinite(loop.levels).all()


def test_settings_that_are_not_the_usual_ones_are_noted() -> None:
    scheduler = make("UniPCMultistepScheduler", use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    noted = schedules.settings_of(scheduler)
    assert noted["use_flow_sigmas"] is True
    assert (noted["flow_shift"], noted["prediction_type"]) == (3.0, "flow_prediction")
    assert "solver_order" not in noted
    odd = schedules.settings_of(
        make("DPMSolverMultistepScheduler", lambda_min_clipped=float("inf"), trained_betas=[0.1])
    )
    assert (odd["lambda_min_clipped"], odd["trained_betas"]) == ("inf", "[0.1]")  # as JSON can have them


def test_a_subclass_has_the_rule_of_its_class() -> None:
    class Own(diffusers.DDIMScheduler):
        pass

    own, plain = Own(), diffusers.DDIMScheduler()
    for scheduler in (own, plain):
        scheduler.set_timesteps(5)
    assert levels(own, float(own.timesteps[0])) == levels(plain, float(plain.timesteps[0]))
