"""The toy world: walks that stay out of walls, and the same bytes for the same arguments."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from halfstep.data.navigation import local_steps
from halfstep.data.pickles import load_poses
from halfstep.data.toy_world import (
    PLAYGROUND_SIZE,
    STEP_METRES,
    TURN,
    _moved,
    playground,
    render,
    walk,
    write_toy_world,
)
from halfstep.errors import InputError


@pytest.mark.parametrize("seed", range(8))
def test_who_plays_holds_keys_and_stays_out_of_walls(seed: int) -> None:
    world = playground()
    walked = walk(world, 200, np.random.default_rng(seed), play=True)
    for corner in ((0.39, 0.39), (0.39, -0.39), (-0.39, 0.39), (-0.39, -0.39)):
        cells = np.floor(walked.position + corner).astype(int)
        assert not world.walls[cells[:, 0], cells[:, 1]].any()
    steps = local_steps(walked.meant, walked.yaw)
    assert np.abs(steps[:, 0]).max() <= STEP_METRES + 1e-9 and np.abs(steps[:, 2]).max() <= TURN + 1e-9
    np.testing.assert_allclose(steps[:, 1], 0, atol=1e-9)  # nobody walks sideways
    assert {-1.0, 0.0, 1.0} <= set(np.sign(np.round(steps[:, 2], 6)))
    assert (steps[:, 0] > 0.1).mean() > 0.1 and (steps[:, 0] < -0.1).any()
    # Where no wall is near, a step goes where it was meant to; at a wall it goes nowhere, or along it.
    went = np.diff(walked.position, axis=0)
    held_up = np.abs(went - np.diff(walked.meant, axis=0)) > 1e-9
    assert 0.02 < held_up.any(axis=1).mean() < 0.6
    cells = np.floor(walked.position).astype(int)
    around = [world.walls[x - 1 : x + 2, y - 1 : y + 2].any() for x, y in cells]
    assert not held_up[~np.array(around[:-1])].any()
    assert (np.hypot(*went.T) <= STEP_METRES + 1e-9).all()


def test_who_holds_a_key_at_a_wall_slides_along_it() -> None:
    walls = np.ones((5, 5), bool)
    walls[1:4, 1:4] = False
    here = np.array([2.5, 2.5])
    for _ in range(8):
        here = _moved(walls, here, np.array([0.2, 0.1]))
    np.testing.assert_allclose(here, [3.6, 3.3], atol=1e-5)
    for _ in range(8):
        here = _moved(walls, here, np.array([0.2, 0.1]))
    np.testing.assert_allclose(here, [3.6, 3.6], atol=1e-5)  # a corner holds
    for _ in range(20):
        here = _moved(walls, here, np.array([-0.2, -0.1]))
    np.testing.assert_allclose(here, [1.4, 1.6], atol=1e-5)


def test_the_playground_is_one_world_for_all_seeds(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_toy_world(tmp_path / str(seed), walks=1, frames=3, seed=seed, play=True)
    poses = [load_poses(tmp_path / str(seed) / "walk_000" / "traj_data.pkl") for seed in (0, 1)]
    assert not np.allclose(poses[0][0], poses[1][0])
    for seed, (meant, yaw) in enumerate(poses):
        walked = walk(playground(), 3, np.random.default_rng(seed), play=True)
        np.testing.assert_array_equal(meant, walked.meant)
        picture = Image.open(tmp_path / str(seed) / "walk_000" / "2.jpg")
        assert picture.size == PLAYGROUND_SIZE
        drawn = render(playground(), walked.position[2], float(yaw[2]), PLAYGROUND_SIZE)
        assert np.abs(np.asarray(picture).astype(float) - drawn).mean() < 6  # JPEG


def test_the_first_world_is_as_ever(tmp_path: Path) -> None:
    write_toy_world(tmp_path / "world", walks=1, frames=4)
    poses = (tmp_path / "world" / "walk_000" / "traj_data.pkl").read_bytes()
    assert hashlib.sha256(poses).hexdigest()[:16] == WANDERED
    with pytest.raises(InputError, match="at least one"):
        write_toy_world(tmp_path / "none", walks=0)


WANDERED = "499251c9c289bc24"
