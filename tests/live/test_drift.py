"""A test that cannot fail shows nothing: subjects whose answers are known, controls, and statistics against oracles."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from halfstep.autoencoders import load_autoencoder
from halfstep.bench.drift import as_markdown, bench_drift
from halfstep.data.frames import open_frames
from halfstep.data.navigation import local_steps
from halfstep.data.sources import SourceConfig
from halfstep.data.toy_world import write_toy_world
from halfstep.encode import EncodeOptions, encode
from halfstep.errors import InputError, NumericsError
from halfstep.live.drift import (
    Course,
    Drift,
    Opened,
    Settings,
    Truth,
    measure_drift,
    opened,
    store_truth,
    toy_truth,
)
from halfstep.live.drift.admission import Admission, admit
from halfstep.live.drift.controls import GAINS, fp8_like, frozen, perturbed, rounded
from halfstep.live.drift.equivalence import p_beyond, p_within, ratio_bounds
from halfstep.live.drift.free_running import (
    FEATURES,
    Looked,
    compare,
    features,
    first_not_finite,
    frames_until_apart,
    judge,
    margins,
)
from halfstep.live.drift.one_step import OneStep, added_error
from halfstep.live.variants import Variants
from halfstep.train.loop import train
from tests.support.cli import run_cli
from tests.support.training import SMALL_CDIT, WALKS, config

CPU = torch.device("cpu")
OWN_ERROR = 0.3  # of the true frames, which no model can foresee
SETTINGS = Settings(frames=40, steps=1)


# --- a world that is known: an action turns each pair of values, and nobody foresees the rest ------------------------


class Turning(nn.Module):
    """Turns frames [N, 2, h, w] by angles, given as cosines and sines [N]: exactly what the world does."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(4, 2, 1, bias=False)
        with torch.no_grad():
            self.mix.weight.copy_(torch.tensor([[1.0, 0, 0, -1], [0, 1, 1, 0]])[..., None, None])

    def forward(self, last: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        parts = [last * cos.view(-1, 1, 1, 1), last * sin.view(-1, 1, 1, 1)]
        return self.mix(torch.cat(parts, dim=1))


class Turned:
    """A subject of it. `hears_context`, `hears_action`: or it makes up what it should hear."""

    def __init__(self, hears_context: bool = True, hears_action: bool = True) -> None:
        self.network = Turning()
        self._hears_context, self._hears_action = hears_context, hears_action
        self._dream = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(7))

    def frames(
        self, network: Any, context: torch.Tensor, moved: Any, generators: Sequence[torch.Generator], steps: int
    ) -> torch.Tensor:
        assert len(generators) == len(context) == len(moved)
        angles = torch.tensor(moved[:, 2] if self._hears_action else 0 * moved[:, 2], dtype=torch.float32)
        last = context[:, -1] if self._hears_context else self._dream.expand_as(context[:, -1])
        return network(last, angles.cos(), angles.sin()).float()

    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        return 0.3 * torch.cat([latents, latents.mean(dim=1, keepdim=True)], dim=1)


def turning_truth(walks: int = 8, places: int = 16) -> Truth:
    rng = np.random.default_rng(5)
    moved = np.zeros((walks, 60, 3))
    moved[..., 2] = rng.choice([-1, 1], (walks, 60)) * rng.uniform(0.6, 1.0, (walks, 60))
    frame = rng.normal(size=(walks, 2, 8, 8))
    frames = [frame]
    for number in range(places + 1):
        cos, sin = (f(moved[:, number, 2])[:, None, None] for f in (np.cos, np.sin))
        turned = np.stack([cos * frame[:, 0] - sin * frame[:, 1], cos * frame[:, 1] + sin * frame[:, 0]], axis=1)
        frame = (turned + OWN_ERROR * rng.normal(size=frame.shape)) / (1 + OWN_ERROR**2) ** 0.5
        frames.append(frame)
    latents = torch.tensor(np.stack(frames, axis=1)).float()
    shown = Turned().pixels(latents.flatten(0, 1)).clamp(-1, 1)
    return Truth(latents, shown.view(walks, places + 2, 3, 8, 8), moved, context_size=2)


def bf16(subject: Turned) -> Iterator[Opened]:
    return opened(Variants(subject.network, CPU), "bf16")


def worse_by(share: float, subject: Turned) -> Any:
    """A variant whose every frame is off by noise: that share of the model's own error."""
    generator = torch.Generator().manual_seed(3)

    def network(last: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        exact = subject.network(last, *given)
        return exact + share * OWN_ERROR * torch.randn(exact.shape, generator=generator)

    return nullcontext(Opened(network, simulated=False))


def measured(subject: Turned, others: Mapping[str, Any] | None = None) -> Drift:
    course = Course(subject, turning_truth(), SETTINGS.steps)
    openers = {"bf16": partial(bf16, subject), **(others or {})}
    return measure_drift(course, subject.network, openers, SETTINGS)


@pytest.fixture(scope="module")
def honest() -> Drift:
    subject = Turned()
    return measured(subject, {"noisy": partial(worse_by, 0.05, subject)})


def test_an_honest_model_is_admitted_and_bf16_passes(honest: Drift) -> None:
    assert honest.reasons == ()
    assert honest.admission.gain_db > 5
    assert honest.admission.context == pytest.approx(1, abs=0.1)
    one = honest.precisions["bf16"]
    assert one.verdict == honest.verdict_of("bf16") == "non-inferior"
    assert 0.001 < one.one_step.added < 0.02
    assert all(test.p_within < 0.05 for test in one.free_run.tests)


def test_a_variant_that_adds_five_percent_is_inferior(honest: Drift) -> None:
    one = honest.precisions["noisy"]
    assert one.one_step.added == pytest.approx(0.05, rel=0.1)
    assert one.one_step.verdict == one.verdict == honest.verdict == "inferior"


def test_each_control_is_rejected_by_its_own_test(honest: Drift) -> None:
    controls = honest.controls
    assert controls is not None
    assert controls.passed == ()
    assert controls.fp8.verdict == "inferior"
    assert controls.frozen.feature == "motion"
    assert controls.frozen.p_within > 0.5
    assert controls.gain == GAINS[0]  # nothing in this world takes a gain back
    assert controls.gained.verdict != "non-inferior"


def test_the_floor_is_of_fp32_itself(honest: Drift) -> None:
    assert len(honest.floor) == 4
    assert all(apart == (None,) * 8 for apart in honest.floor.values())  # a turn makes no difference larger
    assert all(one is None for one in honest.precisions["bf16"].free_run.apart)


@pytest.mark.parametrize(
    ("subject", "word"),
    [(Turned(hears_context=False), "context"), (Turned(hears_action=False), "opposite action")],
)
def test_a_model_that_does_not_hear_is_inconclusive(subject: Turned, word: str) -> None:
    found = measured(subject)
    assert found.verdict == "inconclusive"
    assert any(word in reason for reason in found.reasons)
    assert not found.precisions  # nothing more was computed


def test_admission_by_hand() -> None:
    course = Course(Turned(), turning_truth(), 1)
    truth, network = course.truth, course.subject.network
    with torch.no_grad():
        predicted = course.next_frames(network, range(truth.places))
        found = admit(course, network, predicted)
    squares: dict[str, list[float]] = {"model": [], "copy": [], "moved": [], "later": [], "opposite": []}
    for walk in range(truth.walks):
        for place in range(0, truth.places, 4):
            last, real = truth.latents[walk, place + 1], truth.latents[walk, place + 2]
            angle = truth.moved[walk, place + 1, 2]
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            model, later, opposite = (
                np.einsum("ab,bhw->ahw", matrix, frame.numpy())
                for matrix, frame in ((turn, last), (turn, real), (turn.T, last))
            )
            three = torch.stack([torch.from_numpy(model).float(), last, real])
            shown = Turned().pixels(three).clamp(-1, 1)
            squares["model"].append(float((shown[0] - shown[2]).square().mean()))
            squares["copy"].append(float((shown[1] - shown[2]).square().mean()))
            squares["moved"].append(float((real - last).square().mean()))
            squares["later"].append(float(np.square(later - model).mean()))
            squares["opposite"].append(float(np.square(opposite - model).mean()))
    mean = {name: np.mean(values) for name, values in squares.items()}
    assert found.gain_db == pytest.approx(10 * np.log10(mean["copy"] / mean["model"]), rel=1e-4)
    assert found.context == pytest.approx((mean["later"] / mean["moved"]) ** 0.5, rel=1e-4)
    assert found.action == pytest.approx((mean["opposite"] / mean["moved"]) ** 0.5, rel=1e-4)


def test_every_reason_is_told() -> None:
    assert Admission(2.0, 0.3, 0.21).reasons == ()
    assert len(Admission(1.9, 0.29, 0.2).reasons) == 3
    assert len(Admission(float("nan"), float("nan"), float("nan")).reasons) == 3


def test_frames_that_are_not_finite_are_inferior_and_of_fp32_an_error() -> None:
    subject = Turned()

    def broken(last: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        return subject.network(last, *given) / 0

    found = measured(subject, {"broken": lambda: nullcontext(Opened(broken, simulated=False))})
    one = found.precisions["broken"]
    assert (one.verdict, one.free_run.not_finite, one.free_run.apart) == ("inferior", 1, (1,) * 8)
    assert found.precisions["bf16"].verdict == "non-inferior"
    with pytest.raises(NumericsError, match="fp32"):
        measure_drift(Course(subject, turning_truth(), 1), broken, {}, SETTINGS)


def test_a_control_that_passes_makes_it_inconclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def harmless(network: nn.Module) -> Iterator[Any]:
        yield network

    monkeypatch.setattr("halfstep.live.drift.measure.fp8_like", harmless)
    monkeypatch.setattr("halfstep.live.drift.controls.GAINS", (1.0, 1.0))
    found = measured(Turned())
    assert found.controls is not None
    assert found.controls.passed == ("fp8-like noise", "a gain of 1")
    assert (found.precisions["bf16"].verdict, found.verdict) == ("non-inferior", "inconclusive")


def test_the_same_noise_and_steps_in_every_precision() -> None:
    asked = []

    class Listening(Turned):
        def frames(self, network: Any, context: Any, moved: Any, generators: Any, steps: int) -> torch.Tensor:
            asked.append((torch.stack([torch.randn(2, generator=g) for g in generators]), moved.copy()))
            return super().frames(network, context, moved, generators, steps)

    course = Course(Listening(), turning_truth(4), 1)
    for network in (course.subject.network, lambda *given: course.subject.network(*given)):
        course.walk(network, 3)
    for (noise, moved), (again, moved_again) in zip(asked[:3], asked[3:], strict=True):
        assert torch.equal(noise, again)
        assert np.array_equal(moved, moved_again)
        assert len(noise.unique()) == noise.numel()
    alone = len(asked)
    course.walk(course.subject.network, 1, walks=[2])
    assert torch.equal(asked[alone][0], asked[0][0][2:3])  # of a walk, whoever else walks


# --- statistics against plain oracles ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [-0.9, -0.2, 0.0, 0.3, 1.5])
def test_tests_of_a_margin_are_two_t_tests(mean: float) -> None:
    drawn = np.random.default_rng(1).normal(mean, 0.5, 8)
    below = stats.ttest_1samp(drawn, 0.7, alternative="less").pvalue
    above = stats.ttest_1samp(drawn, -0.7, alternative="greater").pvalue
    assert p_within(drawn, 0.7) == pytest.approx(max(below, above))
    over = stats.ttest_1samp(drawn, 0.7, alternative="greater").pvalue
    under = stats.ttest_1samp(drawn, -0.7, alternative="less").pvalue
    assert p_beyond(drawn, 0.7) == pytest.approx(min(1, 2 * min(over, under)))


def test_differences_without_spread_are_decided_by_their_size() -> None:
    same, far = np.zeros(4), np.ones(4)
    assert (p_within(same, 0.1), p_beyond(same, 0.1)) == (0, 1)
    assert (p_within(far, 0.1), p_beyond(far, 0.1)) == (1, 0)
    assert p_within(same, 0.0) == 1  # no margin, nothing shown


def test_tost_errs_as_often_as_it_says() -> None:
    """At the margin itself one in twenty is taken for within."""
    rng = np.random.default_rng(2)
    wrong = sum(p_within(rng.normal(1.0, 0.2, 8), 1.0) < 0.05 for _ in range(2000))
    assert 70 <= wrong <= 130


def test_bounds_are_quantiles_of_all_resamples() -> None:
    parts, wholes = np.array([1.0, 4.0, 2.0]), np.array([100.0, 90.0, 120.0])
    value, low, high = ratio_bounds(parts, wholes)
    every = [
        (parts[list(c)].sum() / wholes[list(c)].sum()) ** 0.5 for c in itertools.product(range(3), repeat=3)
    ]  # all alike likely
    assert value == pytest.approx((7 / 310) ** 0.5)
    assert low == pytest.approx(np.quantile(every, 0.05), rel=0.05)
    assert high == pytest.approx(np.quantile(every, 0.95), rel=0.05)
    assert ratio_bounds(4 * wholes, wholes) == pytest.approx((2, 2, 2))


def test_added_error_and_its_verdicts() -> None:
    exact, real = torch.zeros(4, 3, 2, 2, 2), torch.ones(4, 3, 2, 2, 2)
    assert added_error(exact + 0.05, exact, real).added == pytest.approx(0.05)
    assert added_error(exact, exact, real) == OneStep(0, 0, 0)
    assert added_error(exact / 0, exact, real).verdict == "inferior"
    assert [OneStep(0.02, low, high).verdict for low, high in ((0, 0.019), (0.01, 0.03), (0.02, 0.03))] == [
        "non-inferior",
        "inconclusive",
        "inferior",
    ]


def test_features_by_hand() -> None:
    subject, path = Turned(), torch.randn(2, 4, 2, 3, 5)
    found = features(subject, path, [1, 3])
    for walk, (place, number) in itertools.product(range(2), enumerate([1, 3])):
        before, now = (
            ((subject.pixels(path[walk, n][None])[0].numpy().astype(float) + 1) / 2).clip(0, 1)
            for n in (number - 1, number)
        )
        neighbors = [(now[:, :, 1:] - now[:, :, :-1]).ravel(), (now[:, 1:] - now[:, :-1]).ravel()]
        by_hand = [
            now.mean(),
            now.std(ddof=1),
            (now.max(axis=0) - now.min(axis=0)).mean(),
            np.sqrt(np.mean(np.concatenate(neighbors) ** 2)),
            np.sqrt(np.mean((now - before) ** 2)),
        ]
        assert found[walk, place] == pytest.approx(by_hand, rel=1e-4)


def test_the_frames_that_are_looked_at() -> None:
    assert Looked.of(10) == Looked(tuple(range(1, 11)), 5)
    looked = Looked.of(512)
    assert looked.stretch == 50
    assert looked.numbers[:50] == tuple(range(1, 51))
    assert looked.numbers[-50:] == tuple(range(463, 513))
    assert set(np.diff(looked.numbers[49:-50])) == {32}


def test_a_change_is_held_against_the_margin_of_its_feature() -> None:
    rng = np.random.default_rng(3)
    looked = Looked.of(20)
    exact = rng.uniform(0.4, 0.5, (8, 1, 5)) + 0.001 * rng.normal(size=(8, 20, 5))
    levels = exact.mean(axis=1)
    by_hand = np.maximum(0.05 * levels.mean(axis=0), 0.25 * levels.std(axis=0, ddof=1))
    assert margins(exact, looked) == pytest.approx(by_hand)
    assert judge(compare(exact + 0.2, exact, looked)) == "non-inferior"  # from the start on is no drift
    drifted = exact.copy()
    drifted[:, 10:, 1] += 2 * by_hand[1]
    tests = compare(drifted, exact, looked)
    assert judge(tests) == "inferior"
    assert [test.p_beyond < 0.05 for test in tests] == [False, True, False, False, False]
    assert tests[1].change == pytest.approx(2 * by_hand[1])
    noisy = exact.copy()
    noisy[:, 10:] += rng.normal(0, 3 * by_hand.max(), (8, 1, 5))
    assert judge(compare(noisy, exact, looked)) == "inconclusive"


def test_walks_that_stand_still_have_no_motion() -> None:
    looked, exact = Looked.of(6), np.random.default_rng(4).uniform(0.1, 0.2, (4, 6, 5))
    still = frozen(exact, looked)
    assert np.array_equal(still[:, :3], exact[:, :3])
    assert np.array_equal(still[:, 5, :4], exact[:, 3, :4])
    assert (still[:, 3:, FEATURES.index("motion")] == 0).all()
    assert compare(still, exact, looked)[-1].p_within > 0.05


def test_frames_until_apart() -> None:
    exact = torch.zeros(3, 6, 1, 2, 2)
    exact[:, 1::2] = 1.0  # one frame is 1 from the next
    path = exact.clone()
    path[0, 3:] += 1.1
    path[1, 2:] += 0.9
    path[2, 4] = float("nan")
    assert frames_until_apart(path, exact) == (3, None, 4)
    assert frames_until_apart(path[:, :3], exact) == (None, None, None)
    assert (first_not_finite(path), first_not_finite(exact)) == (4, None)


# --- controls ---------------------------------------------------------------------------------------------------------


def test_three_bits_are_those_of_fp8() -> None:
    values = torch.cat([torch.linspace(2**-6, 440, 4001), torch.zeros(1)])
    for signed in (values, -values):
        assert torch.equal(rounded(signed, 3), signed.to(torch.float8_e4m3fn).float())


def test_fp8_like_noise_is_that_of_every_operation() -> None:
    network, given = Turning(), (torch.randn(4, 2, 8, 8), torch.full((4,), 0.6), torch.full((4,), 0.8))
    with fp8_like(network) as noisy, torch.no_grad():
        made = noisy(*given).float()
    error = (made - network(*given)).norm() / network(*given).norm()
    assert 0.01 < error < 0.06  # a step of 2^-3, uniform and twice or so
    assert torch.equal(made, rounded(made, 3))


def test_perturbations_are_almost_nothing() -> None:
    start = torch.randn(2, 2, 2, 3, 3)
    made = perturbed(start)
    assert len(made) == 4
    for name, one in made.items():
        assert not torch.equal(one, start)
        largest = 1e-5 if "noise" in name else float(start.abs().max()) * 2**-23
        assert float((one - start).abs().max()) <= largest


# --- true walks -------------------------------------------------------------------------------------------------------


def test_true_walks_of_a_store(latents: Path) -> None:
    reader = open_frames(latents)
    truth = store_truth(reader, lambda z: z[:, :3], 2, walks=3, frames=20, device=CPU, places=4)
    assert (truth.walks, truth.places, truth.moved.shape) == (3, 4, (3, 21, 3))
    for number, key in enumerate(reader.keys()):
        assert np.array_equal(truth.latents[number].numpy(), reader.read(key, 0, 6))
        position, yaw = reader.poses(key)
        steps = local_steps(position, yaw)
        assert np.array_equal(truth.moved[number], np.concatenate([steps, steps, steps])[:21])
    assert torch.equal(truth.context(3), truth.latents[:, 3:5])
    with pytest.raises(InputError, match=r"--data-path: has 3 walks of more than 2 frames .* each of 4 seeds"):
        store_truth(reader, lambda z: z, 2, walks=4, frames=20, device=CPU)


def test_true_walks_of_the_toy_world() -> None:
    autoencoder = load_autoencoder("toy")
    truth = toy_truth(autoencoder, 2, walks=2, frames=9, device=CPU, places=3)
    assert truth.latents.shape == (2, 5, 4, 12, 16)
    assert truth.pixels.shape == (2, 5, 3, 96, 128)
    assert truth.moved.shape == (2, 10, 3)
    shown = autoencoder.decode(autoencoder.unscaled(truth.latents[1]))
    assert float((shown - truth.pixels[1]).square().mean()) < 0.02
    again = toy_truth(autoencoder, 2, walks=3, frames=9, device=CPU, places=3)
    assert torch.equal(again.latents[:2], truth.latents)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_toy_world(tmp_path / "world", walks=4, frames=8, size=(64, 48), play=True)
    store = tmp_path / "latents"
    encode([SourceConfig(path=tmp_path / "world")], EncodeOptions(store, size=(32, 32), precision="fp32"))
    train(config(tmp_path, store, model=SMALL_CDIT, **{**WALKS, "len_traj_pred": 2}, steps=2))
    arguments = ["bench", "drift", "--ckpt", tmp_path / "run", "--data-path", store, "--seeds", 4, "--frames", 8]
    assert "inconclusive" in run_cli(*arguments, check=3).stdout
    assert "expected bf16 or fp16" in run_cli(*arguments, "--precisions", "fp8", check=2).stderr
    assert "expected a file .html" in run_cli(*arguments, "-o", tmp_path, check=2).stderr

    for name in ("LEAST_GAIN_DB", "LEAST_CONTEXT", "LEAST_ACTION"):
        monkeypatch.setattr(f"halfstep.live.drift.admission.{name}", -1e9)
    place = tmp_path / "drift.html"
    document = bench_drift(ckpt=tmp_path / "run", data_path=store, seeds=4, frames=8, output=place)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert list(document["precisions"]) == ["bf16", "fp16"]
    assert document["settings"]["places"] == 6
    assert len(document["looked_at"]) == len(document["features_in_fp32"]["mean"]) == 8
    assert all(len(apart) == 4 for apart in document["floor"].values())
    told = as_markdown(document)
    assert f"**{document['verdict']}**" in told
    assert all(f"| {name} |" in told for name in ("bf16", "fp16"))
    text = place.read_text()
    assert all(f"frame {n}" in text for n in Settings(8).shown)
    assert text.count("data:image/svg+xml") == 3
