"""Noise in the context frames of a training."""

from __future__ import annotations

import torch

from halfstep.models import FAMILIES
from halfstep.models.objectives import with_history_noise

CDIT = {"context_size": 2, "predicted": "velocity", "min_snr": None, "history_noise": None}


def test_its_level_is_what_it_says() -> None:
    torch.manual_seed(0)
    clean = torch.randn(4000, 2, 3, 4, 4)
    noised, level = with_history_noise(clean, 0.5, deviation=2.0)
    assert 0 <= float(level.min()) < 0.01 and 0.49 < float(level.max()) <= 0.5
    found = (noised - clean).flatten(1).std(dim=1)
    # 96 draws a sample give a deviation to 7%
    assert ((found - 2 * level).abs() <= 5 * 0.075 * 2 * level + 1e-6).all()


class _Seen(torch.nn.Module):
    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, context: torch.Tensor, rel_t: torch.Tensor):  # type: ignore[no-untyped-def]
        self.context = context
        return torch.zeros(len(x), 2 * x.shape[1], *x.shape[2:])


def test_a_cdit_gets_it_where_it_is_asked_for() -> None:
    frames, actions, rel_t = torch.randn(3, 4, 1, 4, 4), torch.randn(3, 2, 3), torch.randn(3, 2)
    losses = {}
    for most in (None, 0.0, 0.5):
        torch.manual_seed(1)
        network = _Seen()
        losses[most] = FAMILIES["CDiT"].objective({**CDIT, "history_noise": most})(network, (frames, actions, rel_t))
        moved = (network.context - frames[:, :2].repeat_interleave(2, dim=0)).abs().flatten(1).amax(dim=1)
        assert bool((moved > 0).all()) if most else not moved.any()
    assert torch.equal(losses[None], losses[0.0])  # and draws nothing
