"""The noise of a seed, made without PyTorch, against PyTorch's own; and what a recorded run is spared by it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from halfstep.sampling import record
from halfstep.sampling.toy_flow import ToyFlow, smooth_field
from halfstep.store import TrajectoryFormat, TrajectoryStore, repair_trajectories
from halfstep.store.predictive import Noise, Promise, decode_states, decode_trajectory, encode_trajectory
from halfstep.store.trajectory_writer import RunWriter

SHAPE = (4, 16, 24)


def drawn(seed: int, states: int = 3) -> np.ndarray:
    return torch.randn((states, *SHAPE), generator=torch.Generator().manual_seed(seed)).numpy()


def trajectory(seed: int, scale: float = 1.0) -> np.ndarray:
    flow = ToyFlow(torch.stack([smooth_field(SHAPE, torch.Generator().manual_seed(5)) for _ in range(2)]))
    return np.float32(scale) * np.stack([state.latents[0].numpy() for state in flow.sample(seed, steps=20)])


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**33 + 5, 2**63 + 11])
def test_it_is_what_pytorch_draws_but_for_the_last_digits(seed: int) -> None:
    expected = drawn(seed)
    for index in range(3):
        found = Noise(seed, index).state(SHAPE)
        apart = np.abs(found.view(np.int32).astype(np.int64) - expected[index].view(np.int32))
        assert apart.max() <= 8
        assert (apart == 0).mean() > 0.5


def test_its_bits_are_the_same_everywhere() -> None:
    """A digest of what this was on one machine, in numpy alone: stores depend on it for ever."""
    values = np.concatenate([Noise(seed, 1).state((2, 4096)).reshape(-1) for seed in (1, 2**40)])
    assert int(np.bitwise_xor.reduce(values.view(np.uint32))) == 4245596332
    assert int(values.view(np.uint32).astype(np.uint64).sum()) == 35198811380030


@pytest.mark.parametrize("promise", [Promise(), Promise(strict=True), Promise(fidelity="bf16"), Promise(1e-3),
                                     Promise(fidelity=None)])  # fmt: skip
def test_a_first_state_that_a_seed_makes_takes_next_to_nothing(promise: Promise) -> None:
    states = trajectory(7, scale=14.6)
    plain = encode_trajectory(states, promise)
    spared = encode_trajectory(states, promise, noise=Noise(7))
    assert len(spared) < 0.9 * len(plain)
    first = len(encode_trajectory(states[:1], promise)), len(encode_trajectory(states[:1], promise, noise=Noise(7)))
    assert first[1] < (0.3 if promise.fidelity is None and promise.max_error is None else 0.08) * first[0]
    errors = [np.abs(decode_trajectory(blob) - states).max() for blob in (plain, spared)]
    assert errors[1] <= max(1.1 * errors[0], promise.max_error or 0)
    for k in (0, 3, 20):
        assert np.array_equal(decode_states(spared, [k])[0], decode_trajectory(spared)[k])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_noise_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    states = torch.from_numpy(trajectory(7)).to(dtype).float().numpy()
    spared = encode_trajectory(states, noise=Noise(7))
    assert len(spared) < 0.95 * len(encode_trajectory(states))
    assert np.array_equal(decode_trajectory(spared), states)


def test_what_no_seed_is() -> None:
    assert Noise.of({"seed": 7}) == Noise(7)
    assert Noise.of({"seed": 7, "noise_seed": 9, "noise_index": 2}) == Noise(9, 2)
    for attributes in ({}, {"seed": -1}, {"seed": 2**64}, {"seed": "7"}, {"seed": 7, "noise_index": 10**9}):
        assert Noise.of(attributes) is None


@pytest.mark.parametrize("noise", [Noise(8), Noise(7, 1)])
def test_another_seed_changes_nothing(noise: Noise) -> None:
    states = trajectory(7)
    assert encode_trajectory(states, noise=noise) == encode_trajectory(states)


def test_channels_may_lie_anywhere() -> None:
    moved = np.ascontiguousarray(np.moveaxis(trajectory(7), 1, 3))  # the noise was drawn before
    assert len(encode_trajectory(moved, channel_axis=2, noise=Noise(7))) == len(
        encode_trajectory(moved, channel_axis=2)
    )
    states = np.concatenate([drawn(3, 1), trajectory(7)[1:]]).reshape(21, 16, 24, 4)
    spared = encode_trajectory(states, channel_axis=2, noise=Noise(3))
    assert len(spared) < len(encode_trajectory(states, channel_axis=2))
    assert np.abs(decode_trajectory(spared) - states).max() < 4e-3


def test_a_run_is_spared_its_noise_also_when_it_is_repaired(tmp_path: Path) -> None:
    store, states = TrajectoryStore.create(tmp_path / "s"), trajectory(7)
    sigmas = np.linspace(1, 0, len(states))
    store.add("plain", states, sigmas=sigmas)
    store.add("seed", states, sigmas=sigmas, seed=7)
    third = np.concatenate([drawn(9)[2:], states[1:]])
    store.add("third", third, sigmas=sigmas)
    store.add("index", third, sigmas=sigmas, seed=9, noise_index=2)
    sizes = {key: store[key].attributes["latents_bytes"] for key in store}
    assert sizes["seed"] < 0.8 * sizes["plain"]
    assert sizes["index"] < 0.9 * sizes["third"]
    writer: RunWriter = store.record("killed", seed=7)
    for k, state in enumerate(states):
        writer.append(k, float(k), float(sigmas[k]), state)
    writer.close()  # all in the journal, as a kill leaves it
    assert repair_trajectories(store.root).recovered == {"killed": 21}
    chunk = "latents/c.0.0.0.0"
    assert (store.root / "killed" / chunk).read_bytes() == (store.root / "seed" / chunk).read_bytes()
    assert np.abs(store["seed"].latents[0] - states[0]).max() < 2e-3


def test_several_samples_of_one_generator(tmp_path: Path) -> None:
    """Each run is told which of the states that the generator drew is its own."""
    import diffusers

    class Loop:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()

        def __call__(self, callback: object) -> None:
            self.scheduler.set_timesteps(4)
            x = torch.randn((2, *SHAPE), generator=torch.Generator().manual_seed(11))
            for i, t in enumerate(self.scheduler.timesteps):
                x = self.scheduler.step(-x / 2, t, x, return_dict=False)[0]
                callback(self, i, t, {"latents": x})

    exact = TrajectoryFormat(storage="fp32")
    for seed in (11, 12):
        loop = Loop()
        with record(loop, tmp_path / str(seed), run=["a", "b"], seed=seed, format=exact) as recording:
            loop(recording)
    right, wrong = (TrajectoryStore(tmp_path / str(seed)) for seed in (11, 12))
    for key in ("a", "b"):
        assert right[key].attributes["latents_bytes"] < wrong[key].attributes["latents_bytes"]
        assert np.array_equal(right[key].latents[:], wrong[key].latents[:])
