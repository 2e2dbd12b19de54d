"""CDiT against the reference implementation's numbers."""

from typing import Any

import pytest
import torch

from halfstep.errors import InputError
from halfstep.models import CDiT
from halfstep.precision import PrecisionPolicy, prepare
from tests.support.golden_cdit import CONFIG, INPUTS, NUMBERS, golden_model


def test_the_output_is_the_references() -> None:
    model = golden_model()
    with torch.no_grad():
        torch.testing.assert_close(model(*INPUTS), NUMBERS["out"], rtol=1e-4, atol=1e-5)


def test_every_input_counts() -> None:
    model = golden_model()
    with torch.no_grad():
        plain = model(*INPUTS)
        for i in range(5):
            changed = [value + 1 if i == k else value for k, value in enumerate(INPUTS)]
            assert not torch.allclose(model(*changed), plain, atol=1e-4), i


@pytest.mark.parametrize(
    ("size", "parameters"), [("S", 49_227_680), ("B", 195_284_768), ("L", 686_508_406), ("XL", 1_011_959_456)]
)
def test_the_published_sizes(size: str, parameters: int) -> None:
    with torch.device("meta"):
        model = CDiT.named(f"CDiT-{size}/2", 28, 4)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_latents_need_not_be_square_and_a_new_model_is_zero() -> None:
    model = CDiT((4, 8), 3, 2, 48, 1, 4).eval()
    out = model(torch.randn(2, 4, 4, 8), torch.zeros(2), torch.zeros(2, 3), torch.randn(2, 3, 4, 4, 8), torch.zeros(2))
    assert out.shape == (2, 8, 4, 8)
    assert out.abs().max() == 0


def test_mistakes_are_named() -> None:
    model = CDiT(**CONFIG, patch_size=2)
    with pytest.raises(InputError, match=r"and context \[1, 4, 8, 8\]; expected \[4, 8, 8\] and \[2, 4, 8, 8\]"):
        model(*INPUTS[:3], INPUTS[3][:, :1], INPUTS[4])
    with pytest.raises(InputError, match="expected multiples of the patch"):
        CDiT(7, 2, 2, 48, 1, 4)
    with pytest.raises(InputError, match="expected a multiple of 5 heads"):
        CDiT(8, 2, 2, 48, 1, 5)
    with pytest.raises(InputError, match=r"got 'CDiT-B/4'; expected CDiT-\{S,B,L,XL\}/2"):
        CDiT.named("CDiT-B/4", 8, 2)


@pytest.mark.parametrize("preset", ["bf16-mixed", "bf16-true"])
def test_half_is_near_fp32(preset: str) -> None:
    model = golden_model()
    prepare(model, PrecisionPolicy.parse(preset))
    kept = {name.partition(".")[0] for name, value in model.state_dict().items() if value.dtype == torch.float32}
    assert preset == "bf16-mixed" or kept == {"t_embedder", "time_embedder"}
    with torch.no_grad():
        out = model(*INPUTS)
    assert (out - NUMBERS["out"]).norm() < 0.02 * NUMBERS["out"].norm()  # two blocks of products rounded to 8 bits


def test_scaled_actions_and_sinusoidal_positions_are_heard_from_the_start() -> None:
    """What a turn of 0.1 does to the condition, against its size; and how far apart a frame's positions are."""

    def spread(**options: Any) -> tuple[float, float]:
        torch.manual_seed(0)
        model = CDiT((12, 16), 2, 2, 96, 1, 4, **options).eval()
        with torch.no_grad():
            still, turned = model.y_embedder(torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.1]])).unbind(0)
        places = model.pos_embed[0].detach()
        return float((turned - still).norm() / still.norm()), float(places.std(dim=0).norm())

    published, cured = spread(), spread(action_scale=100.0, positions="sinusoidal")
    assert cured[0] > 10 * published[0]
    assert cured[1] > 10 * published[1]


def test_actions_are_left_out_in_training_where_that_is_asked_for() -> None:
    torch.manual_seed(0)
    model = CDiT(8, 2, 2, 48, 1, 4, action_dropout=0.5)
    actions = torch.randn(1000, 3)
    with torch.no_grad():
        gone = (model.train().y_embedder(actions) == 0).all(dim=1)
        assert 400 < int(gone.sum()) < 600
        assert not (model.eval().y_embedder(actions) == 0).all(dim=1).any()
        known = torch.arange(1000) < 10
        assert (model.y_embedder(actions, known) == 0).all(dim=1).tolist() == (~known).tolist()


def test_sinusoidal_positions_need_a_width_they_fit() -> None:
    with pytest.raises(InputError, match="sinusoidal positions need a multiple of 4"):
        CDiT(8, 2, 2, 54, 1, 6, positions="sinusoidal")
