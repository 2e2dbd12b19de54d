"""EqM against the reference implementation's numbers, and what its variants promise."""

from typing import Any

import pytest
import torch

from halfstep.errors import InputError
from halfstep.models import EqM
from halfstep.precision import PrecisionPolicy, prepare
from tests.support.golden_eqm import CONFIG, NUMBERS, STATE, T, X, Y, golden_model


def test_the_field_is_the_references() -> None:
    with torch.no_grad():
        model = golden_model()
        torch.testing.assert_close(model(X, T, Y), NUMBERS["none.field"], rtol=1e-4, atol=1e-5)
        tokens = model.activations(X, model.modulations(T, Y))
        torch.testing.assert_close(tokens, NUMBERS["none.last_activation"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.guided(X, T, Y, 4.0, 3), NUMBERS["cfg.field"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("energy", ["l2", "dot"])
def test_energies_are_the_references_in_every_grad_mode(energy: Any, grad: Any) -> None:
    model = golden_model(energy=energy)
    with grad():
        value, field = model.energy_and_field(X, T, Y)
        torch.testing.assert_close(model(X, T, Y), field)
    torch.testing.assert_close(value, NUMBERS[f"{energy}.energy"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(field, NUMBERS[f"{energy}.field"], rtol=1e-4, atol=1e-5)
    assert value.requires_grad == (grad is torch.enable_grad)


def test_the_gradient_of_an_energy_can_be_trained_through() -> None:
    model = golden_model(energy="dot")
    model(X, T, Y).square().sum().backward()
    gradient = model.blocks[0].attn.qkv.weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 0


def test_guidance_by_its_definition() -> None:
    model = golden_model()
    with torch.no_grad():
        with_label, without = model(X, T, Y), model(X, T, torch.full_like(Y, CONFIG["num_classes"]))
        torch.testing.assert_close(model.guided(X, T, Y, 2.5), without + 2.5 * (with_label - without))
        torch.testing.assert_close(model.guided(X, T, Y, 1.0), with_label)
        torch.testing.assert_close(model.guided(X, T, Y, 2.5, 1)[:, 1:], with_label[:, 1:])


def test_time_counts_only_when_asked_for() -> None:
    with torch.no_grad():
        assert torch.equal(golden_model()(X, T, Y), golden_model()(X, T + 0.3, Y))
        timed = golden_model(uncond=False)
        assert not torch.equal(timed(X, T, Y), timed(X, T + 0.3, Y))


def test_a_video_model_starts_from_an_image_model() -> None:
    video = golden_model(num_frames=3)
    still = X[:, :, None].repeat(1, 1, 3, 1, 1)
    with torch.no_grad():
        field = video(still, T, Y)
        assert field.shape == still.shape
        assert not torch.allclose(field[:, :, 0], field[:, :, 1])  # frames are told apart
        tokens = video.x_embedder(X) + video.pos_embed
        frames = tokens[:, None] + video.frame_embed[:, None]
        assert torch.equal(frames[:, 0], tokens)  # the first frame is embedded as a picture
        one = EqM(**CONFIG, num_frames=1)
        one.load_state_dict(video.state_dict(), strict=True)
        torch.testing.assert_close(one.eval()(X, T, Y), NUMBERS["none.field"], rtol=1e-4, atol=1e-5)


def test_frames_attend_to_each_other() -> None:
    video, clip = golden_model(num_frames=2), torch.randn(1, 4, 2, 8, 8)
    other = clip.clone()
    other[:, :, 1] += 1
    with torch.no_grad():
        assert not torch.allclose(video(clip, T[:1], Y[:1])[:, :, 0], video(other, T[:1], Y[:1])[:, :, 0])


def test_latents_need_not_be_square() -> None:
    model = EqM((4, 8), 2, 32, 1, 2, 3).eval()
    x = torch.randn(2, 4, 4, 8)
    assert model(x, torch.zeros(2), torch.zeros(2, dtype=torch.long)).shape == x.shape
    # The first half of the width encodes the column: equal down a column, different along a row.
    embedding = model.pos_embed.reshape(2, 4, 32)
    assert torch.equal(embedding[0, :, :16], embedding[1, :, :16])
    assert torch.equal(embedding[:, 0, 16:], embedding[:, 1, 16:])
    assert not torch.equal(embedding[0, 0, :16], embedding[0, 1, :16])


def test_a_new_model_is_zero_and_its_labels_drop_out_in_training_only() -> None:
    model = EqM(8, 2, 32, 2, 2, 3)
    y = torch.zeros(400, dtype=torch.long)
    assert model.eval()(X, T, Y % 3).abs().max() == 0
    assert torch.equal(model.y_embedder(y), model.y_embedder.embedding_table(y))
    model.train()
    dropped = (model.y_embedder(y) == model.y_embedder.embedding_table(torch.tensor(3))).all(dim=1).sum()
    assert 15 <= dropped <= 75


@pytest.mark.parametrize(
    ("size", "parameters"), [("S", 32_963_360), ("B", 130_512_416), ("L", 458_102_816), ("XL", 675_129_632)]
)
def test_the_published_sizes(size: str, parameters: int) -> None:
    with torch.device("meta"):
        model = EqM.named(f"EqM-{size}/2", 32, 1000)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == 12 + 10 * len(model.blocks)


def test_mistakes_are_named() -> None:
    model = golden_model()
    with pytest.raises(InputError, match=r"got latents \[4, 8, 6\]; expected \[4, 8, 8\]"):
        model(X[..., :6], T, Y)
    with pytest.raises(InputError, match=r"labels: got .* expected 0 to 10"):
        model(X, T, Y + 50)
    with pytest.raises(InputError, match="has no energy; build it with l2 or dot"):
        model.energy_and_field(X, T, Y)
    with pytest.raises(InputError, match="expected multiples of the patch, 2"):
        EqM(7, 2, 32, 1, 2, 3)
    with pytest.raises(InputError, match="expected a multiple of 5 heads"):
        EqM(8, 2, 32, 1, 5, 3)
    with pytest.raises(InputError, match="got energy 'cubic'"):
        EqM(8, 2, 32, 1, 2, 3, energy="cubic")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"got 'EqM-M/2'; expected EqM-\{S,B,L,XL\}"):
        EqM.named("EqM-M/2", 8, 3)


@pytest.mark.parametrize("preset", ["bf16-mixed", "bf16-true", "bf16-true,islands=t_embedder|blocks.*.mlp"])
@pytest.mark.parametrize("energy", ["none", "l2", "dot"])
def test_every_use_runs_in_half_near_fp32(preset: str, energy: Any) -> None:
    exact, half = golden_model(energy=energy), golden_model(energy=energy)
    prepare(half, PrecisionPolicy.parse(preset))
    with torch.no_grad():
        pairs = [
            (half(X, T, Y), exact(X, T, Y)),
            (half.guided(X, T, Y, 2.0, 3), exact.guided(X, T, Y, 2.0, 3)),
            (half(X, T, Y, modulations=half.modulations(T, Y)), exact(X, T, Y)),
        ]
        if energy != "none":
            pairs += list(zip(half.energy_and_field(X, T, Y), exact.energy_and_field(X, T, Y), strict=True))
    for ours, expected in pairs:
        assert ours.dtype == torch.float32
        # Two blocks of products rounded to 8 bits; a gradient goes through them twice, guidance by 2 doubles it.
        assert (ours - expected).norm() < 0.04 * expected.norm()


def test_what_must_not_be_half_is_not() -> None:
    model = prepare(golden_model(), PrecisionPolicy.parse("bf16-true")).to(torch.float16)
    kept = {name for name, value in model.state_dict().items() if value.dtype == torch.float32}
    assert kept == {"pos_embed", *(name for name in STATE if name.startswith("t_embedder."))}
    assert torch.equal(model.pos_embed, STATE["pos_embed"])


def test_recomputed_activations_change_nothing() -> None:
    """Same field, same gradients; and the blocks are really run again."""
    results = []
    for recomputed in (0, 2):
        model = golden_model()
        model.recomputed_blocks = recomputed
        runs: list[int] = []
        model.blocks[0].mlp.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        field = model(X, T, Y)
        field.square().mean().backward()
        results.append([field, *(p.grad for p in model.parameters() if p.requires_grad)])
        assert len(runs) == (2 if recomputed else 1)
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)
