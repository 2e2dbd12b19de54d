"""A network that does not listen is named."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from halfstep.train.conditions import Conditions, with_others

FRAMES, ACTIONS, REL_T = torch.randn(6, 3, 2, 4, 4), torch.randn(6, 1, 3), torch.ones(6, 1)
CPU = torch.device("cpu")


def conditions(losses: Any) -> Conditions:
    return Conditions("walks", SimpleNamespace(losses=losses, device=CPU))  # type: ignore[arg-type]


def listening(network: Any, items: Any) -> torch.Tensor:
    """The goal is the last context frame moved by the action: right with one's own, wrong with another's."""
    frames, actions, _ = items
    goal = FRAMES[:, 1] + ACTIONS.mean(dim=(1, 2)).reshape(-1, 1, 1, 1)
    return (frames[:, 1] + actions.mean(dim=(1, 2)).reshape(-1, 1, 1, 1) - goal).square().mean(dim=(1, 2, 3)) + 1


def deaf(network: Any, items: Any) -> torch.Tensor:
    """Goes by the context alone, with noise of its own."""
    return (items[0][:, 1] - FRAMES[:, 1]).square().mean(dim=(1, 2, 3)) + torch.rand(6) + 1


def test_others_conditions_are_those_of_the_sample_before() -> None:
    changed = with_others("walks", (FRAMES, ACTIONS, REL_T))
    assert set(changed) == {"action", "context"}
    frames, actions, rel_t = changed["action"]
    assert torch.equal(frames, FRAMES) and torch.equal(actions, ACTIONS[[5, 0, 1, 2, 3, 4]]) and rel_t is REL_T
    frames, actions, _ = changed["context"]
    assert torch.equal(actions, ACTIONS) and torch.equal(frames[:, 2:], FRAMES[:, 2:])
    assert torch.equal(frames[:, :2], FRAMES[[5, 0, 1, 2, 3, 4], :2])
    pictures, labels = torch.randn(3, 2), torch.tensor([0, 1, 0])
    (x, y) = with_others("labeled", (pictures, labels))["label"]
    assert torch.equal(x, pictures) and y.tolist() == [0, 0, 1]
    assert with_others("labeled", (pictures, torch.zeros(3))) == {}  # one class: nothing to be heard


def test_a_network_that_listens_is_not_named() -> None:
    run = conditions(listening)
    for step in range(1000, 1010):
        effects, lines = run.look(step, None, (FRAMES, ACTIONS, REL_T))
        assert effects["action"] > 0.1 and effects["context"] > 0.1 and lines == []


def test_a_network_that_does_not_is_named_once_and_not_while_it_is_young() -> None:
    run, state = conditions(deaf), torch.random.get_rng_state()
    said = [line for step in range(0, 2000, 100) for line in run.look(step, None, (FRAMES, ACTIONS, REL_T))[1]]
    assert said == [
        "step 1000: the action has no effect on the prediction: with the action of another sample the loss changes by "
        "+0.00%"
    ]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_five_looks_are_needed() -> None:
    run = conditions(deaf)
    assert [bool(run.look(step, None, (FRAMES, ACTIONS, REL_T))[1]) for step in range(5000, 5006)] == [
        *[False] * 4,
        True,
        False,
    ]
