"""Training that torchrun's processes share, by copies (DDP) or shards (FSDP2)."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from halfstep.precision import PrecisionPolicy
from halfstep.team import Team
from halfstep.train.data import open_data
from halfstep.train.state import TrainState
from halfstep.train.work import StepWork
from tests.support.cli import run_cli, torchrun
from tests.support.training import SMALL, SMALL_CDIT, WALKS, config, read_state, run_folder

SHARED: dict[str, Any] = {"gradient_accumulation_steps": 2, "ema_decay": 0.5}


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--fsdp"]])
def test_processes_find_a_failure_together(tmp_path: Path, options: list[str]) -> None:
    """Only one of them has the bad item; both stop, with the reason."""
    for walk in range(2):
        (tmp_path / "tree" / str(walk)).mkdir(parents=True)
        for frame in range(4):
            latent = torch.randn(4, 4, 4) * (float("nan") if (walk, frame) == (1, 2) else 1)
            torch.save(latent, tmp_path / "tree" / str(walk) / f"{frame}.pt")
    command = ["train", "eqm", "--data-path", tmp_path / "tree", "-o", tmp_path, "--precision", "fp32", "--steps", 4]
    sizes = [f"--set=model.{name}={value}" for name, value in SMALL.items()]
    result = torchrun(2, *command, *sizes, "--global-batch-size", 4, "--device", "cpu", *options, check=None)
    assert result.returncode != 0
    assert re.search(r"an item of '1' in the data is not finite, in fp32", result.stderr)


@pytest.fixture(scope="module")
def expected(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainState:
    """What two processes learn in four steps of two micro-batches, by one that computes their shares in turn."""
    chosen = config(tmp_path_factory.mktemp("one"), latents, **SHARED)
    data, device = open_data(chosen, 2), torch.device("cpu")
    torch.manual_seed(chosen.global_seed)
    network = chosen.about(data.latent_shape, data.num_classes).build()
    state = TrainState(network, PrecisionPolicy.parse("fp32"), chosen.updates, device)
    objective = chosen.family.objective(chosen.own_settings)
    works = [StepWork(data, objective, Team(rank, 2), device, chosen.global_seed, 2) for rank in range(2)]
    shares = [work.batches(0) for work in works]
    for step in range(4):
        for work, share in zip(works, shares, strict=True):
            items = next(share).items
            for microbatch in work.begin(step, items):
                state.backward(work.losses(state.model, microbatch).mean() / 4)
        state.update()
    return state


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "options"),
    [("fp32", []), ("fp32", ["--fsdp"]), ("bf16-true", []), ("bf16-true", ["--fsdp"]), ("16-mixed", ["--fsdp"])],
)
def test_two_processes_learn_what_one_does(
    tmp_path: Path, latents: Path, options: list[str], precision: str, expected: TrainState
) -> None:
    """Stopped in between; and one process can go on with what two have done."""
    settings = {**{f"model.{name}": value for name, value in SMALL.items()}, **SHARED}
    command = [
        *("--data-path", latents, "-o", tmp_path, "--run-name", "run", "--global-batch-size", 8, "--lr", 1e-3),
        *(f"--set={name}={value}" for name, value in settings.items()),
        *("--quiet", "--num-workers", 0, "--device", "cpu", "--precision", precision),
    ]
    for steps in (2, 4):
        torchrun(2, "train", "eqm", *command, "--steps", steps, *options)
    ours = run_folder(tmp_path)
    for file, theirs, size in (
        ("model.safetensors", expected.full_weights(), 4e-3),  # the first steps of Adam are of the learning rate
        ("ema.safetensors", expected.full_ema(), 4e-3),
        ("optimizer.safetensors", expected.full_moments(), None),
    ):
        assert ours[file].keys() == theirs.keys()
        values = torch.cat([value.flatten() for value in theirs.values()])
        error = torch.cat([ours[file][name].flatten() for name in theirs]) - values
        tolerance = 0.01 if precision == "fp32" else 0.2
        assert error.square().mean().sqrt() <= tolerance * (size or values.square().mean().sqrt()), file
    result = run_cli("train", "eqm", *command, "--steps", 5)
    assert "before with 2" in result.stderr
    assert read_state(tmp_path)["updates"] == 5


@pytest.mark.slow
def test_sharded_half_weights_of_a_cdit(tmp_path: Path, latents: Path) -> None:
    settings = {**{f"model.{name}": value for name, value in SMALL_CDIT.items()}, **WALKS}
    options = [f"--set={name}={json.dumps(value)}" for name, value in settings.items()]
    command = ["train", "cdit", "--data-path", latents, "-o", tmp_path, "--run-name", "run", "--steps", 2, "--fsdp"]
    torchrun(2, *command, *options, "--global-batch-size", 4, "--precision", "bf16-true", "--device", "cpu")
    assert read_state(tmp_path)["updates"] == 2


@pytest.mark.slow
def test_a_team_can_be_joined_again_and_ends_in_order(tmp_path: Path) -> None:
    """More processes than cores: threads that exchange are late, and must not be missed at the end."""
    script = tmp_path / "script.py"
    script.write_text(
        "from halfstep.team import Team, leave\n"
        "for _ in range(3):\n"
        "    with Team.join() as team:\n"
        "        assert team.gather(lambda: team.rank) == list(range(4))\n"
        "leave(0)\n"
    )
    torchrun(4, script)
