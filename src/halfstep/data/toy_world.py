"""A small first-person world to walk through: demo and test data with known poses, drawn by a ray-caster."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from halfstep.data.walks import POSES_FILE
from halfstep.errors import InputError
from halfstep.files import claim, new_folder

Float = npt.NDArray[np.float64]

CELLS = 16  # the world is CELLS x CELLS meters, walled around
STEP_METRES = 0.25
TURN = 0.15  # radians a frame, of one who holds a key
PLAYGROUND_SIZE = (128, 96)  # width and height of its pictures
_SIDE = 0.3  # meters that one who wanders keeps from a wall ahead
_BODY = 0.4  # meters from the middle of one who plays to each side: walls keep them off
_TOUCH = 1e-6  # meters that are left between them
_FIELD_OF_VIEW = math.radians(75)
_EYE_HEIGHT = 0.5  # of a wall one meter high


@dataclass(frozen=True)
class World:
    """`walls` [cells, cells], each a meter wide, and their `colors` [cells, cells, 3] from 0 to 1; walls have so many
    `courses` of bricks and the floor so many `tiles` a meter."""

    walls: npt.NDArray[np.bool_]
    colors: Float
    courses: int = 5
    tiles: int = 2


@dataclass(frozen=True)
class Walked:
    """A walk: `position` [frames, 2] in meters and `yaw` [frames] in radians, not wrapped. `meant` [frames, 2] is where
    the steps would have led had no wall been in the way, as the wheels of a robot that is held up count on."""

    position: Float
    yaw: Float
    meant: Float


def write_toy_world(
    root: Path,
    *,
    walks: int = 8,
    frames: int = 48,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    play: bool = False,
) -> None:
    """Write `walks` walks of `frames` pictures into `root`, as `walk_000/{0.jpg, ...}` and `traj_data.pkl`.

    With `play` the world is `playground`, the same for every seed, and who walks holds keys for a while: forward, back,
    left, right. Its poses are those that were meant (`Walked.meant`), so that the step between two is what the keys
    asked for, also where a wall was in the way. Pictures are JPEG of `size` (width, height), by default 160 x 120, of
    the playground PLAYGROUND_SIZE; poses are meters and radians. The same arguments write the same bytes. Raises
    InputError when `root` holds something already.
    """
    claim(root, "toy world")
    if walks < 1 or frames < 1:
        raise InputError(f"toy world: got {walks} walks of {frames} frames; expected at least one")
    size = size or (PLAYGROUND_SIZE if play else (160, 120))
    rng = np.random.default_rng(seed)
    world = playground() if play else _make_world(rng, CELLS, 0.16)
    with new_folder(root) as whole:
        for number in range(walks):
            folder = whole / f"walk_{number:03d}"
            folder.mkdir()
            walked = walk(world, frames, rng, play=play)
            for frame in range(frames):
                picture = render(world, walked.position[frame], float(walked.yaw[frame]), size)
                Image.fromarray(picture).save(folder / f"{frame}.jpg", quality=90)
            (folder / POSES_FILE).write_bytes(pickle.dumps({"position": walked.meant, "yaw": walked.yaw}))


def walk(world: World, frames: int, rng: np.random.Generator, *, play: bool) -> Walked:
    """A walk of so many frames: of one who holds keys, or who wanders on."""
    return (_play if play else _wander)(world.walls, frames, rng)


def playground() -> World:
    """A small world of large bricks, which a small network can learn."""
    world = _make_world(np.random.default_rng(7), 9, 0.14)
    return replace(world, courses=2, tiles=1)


def _make_world(rng: np.random.Generator, cells: int, walled: float) -> World:
    walls = rng.random((cells, cells)) < walled
    walls[0], walls[-1], walls[:, 0], walls[:, -1] = True, True, True, True
    hues = np.array([[0.85, 0.32, 0.24], [0.95, 0.72, 0.3], [0.3, 0.6, 0.85], [0.42, 0.7, 0.42], [0.72, 0.52, 0.8]])
    colors = hues[rng.integers(len(hues), size=(cells, cells))] * rng.uniform(0.8, 1.1, (cells, cells, 1))
    return World(walls, colors)


def _play(walls: npt.NDArray[np.bool_], frames: int, rng: np.random.Generator) -> Walked:
    """Keys held for some frames each, by one who turns away from walls sooner or later and slides along them."""
    here, yaw = _start(walls, rng)
    meant = here.copy()
    positions, yaws, meants = [], [], []
    held, forward, turn = 0, 0, 0
    for _ in range(frames):
        positions.append(here)
        yaws.append(yaw)
        meants.append(meant)
        near = _distance(walls, here, np.array([yaw]))[0] < 0.8
        if held == 0 or (near and forward > 0 and rng.random() < 0.25):
            held = int(rng.geometric(0.15))
            forward = int(rng.choice([1, 0, -1], p=[0.1, 0.5, 0.4] if near else [0.72, 0.16, 0.12]))
            turn = int(rng.choice([1, 0, -1], p=[0.45, 0.1, 0.45] if near else [0.3, 0.4, 0.3]))
        held -= 1
        step = forward * STEP_METRES * rng.uniform(0.8, 1.0) * np.array([math.cos(yaw), math.sin(yaw)])
        here, meant = _moved(walls, here, step), meant + step
        yaw += turn * TURN * rng.uniform(0.8, 1.0)
    return Walked(np.array(positions), np.array(yaws), np.array(meants))


def _moved(walls: npt.NDArray[np.bool_], here: Float, step: Float) -> Float:
    """Where a step of less than _BODY leads: a square of _BODY to each side is stopped by walls on one axis after the
    other, and so slides along them."""
    after = here.copy()
    for axis in (0, 1):
        after[axis] += step[axis]
        low, high = np.floor(after - _BODY).astype(int), np.floor(after + _BODY).astype(int)
        if walls[low[0] : high[0] + 1, low[1] : high[1] + 1].any():
            after[axis] = high[axis] - _BODY - _TOUCH if step[axis] > 0 else low[axis] + 1 + _BODY + _TOUCH
    return after


def _start(walls: npt.NDArray[np.bool_], rng: np.random.Generator) -> tuple[Float, float]:
    free = np.argwhere(~walls)
    return free[rng.integers(len(free))] + 0.5, rng.uniform(-math.pi, math.pi)


def _wander(walls: npt.NDArray[np.bool_], frames: int, rng: np.random.Generator) -> Walked:
    """Steps of up to STEP_METRES that steer away from walls."""
    here, yaw = _start(walls, rng)
    turn = 0.0
    positions, yaws = [], []
    for _ in range(frames):
        positions.append(here.copy())
        yaws.append(yaw)
        turn = 0.7 * turn + 0.12 * rng.standard_normal()
        ahead = _distance(walls, here, np.array([yaw]))[0]
        left, right = _distance(walls, here, np.array([yaw + 0.7, yaw - 0.7]))
        if ahead < 1.2:
            turn += 0.35 if left > right else -0.35
        yaw += turn
        room = _distance(walls, here, np.array([yaw]))[0] - _SIDE
        here = here + max(0.0, min(STEP_METRES, room)) * np.array([math.cos(yaw), math.sin(yaw)])
    return Walked(np.array(positions), np.array(yaws), np.array(positions))


def _cast(walls: npt.NDArray[np.bool_], origin: Float, angles: Float) -> tuple[Float, npt.NDArray[np.int64], Float]:
    """Distance to the first wall along each ray, the wall's cell [n, 2] and where along its face the ray meets it."""
    direction = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    direction[np.abs(direction) < 1e-9] = 1e-9
    count = len(walls)
    steps = np.arange(count + 1)
    best = np.full(len(angles), np.inf)
    cells = np.zeros((len(angles), 2), np.int64)
    along = np.zeros(len(angles))
    for axis in (0, 1):
        forward = direction[:, axis] > 0
        first = np.where(forward, np.floor(origin[axis]) + 1, np.floor(origin[axis]))
        lines = first[:, None] + np.where(forward, 1, -1)[:, None] * steps
        distance = (lines - origin[axis]) / direction[:, axis, None]
        other = origin[1 - axis] + distance * direction[:, 1 - axis, None]
        entered = np.where(forward[:, None], lines, lines - 1)
        inside = (entered >= 0) & (entered < count) & (other >= 0) & (other < count)
        cell = np.empty((*lines.shape, 2), np.int64)
        cell[..., axis] = np.clip(entered, 0, count - 1)
        cell[..., 1 - axis] = np.clip(np.floor(other), 0, count - 1)
        hit = np.where(inside & walls[cell[..., 0], cell[..., 1]], distance, np.inf)
        nearest = hit.argmin(axis=1)
        rays = np.arange(len(angles))
        closer = hit[rays, nearest] < best
        best = np.where(closer, hit[rays, nearest], best)
        cells[closer] = cell[rays, nearest][closer]
        along = np.where(closer, other[rays, nearest] % 1, along)
    return best, cells, along


def _distance(walls: npt.NDArray[np.bool_], origin: Float, angles: Float) -> Float:
    return _cast(walls, origin, angles)[0]


def render(world: World, origin: Float, yaw: float, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """A picture, uint8 [height, width, 3], of brick walls, a checkered floor and a sky. Left is +yaw."""
    width, height = size
    plane = math.tan(_FIELD_OF_VIEW / 2)
    screen = np.linspace(plane, -plane, width)
    angles = yaw + np.arctan(screen)
    distance, cells, along = _cast(world.walls, origin, angles)
    depth = np.maximum(distance * np.cos(angles - yaw), 1e-3)
    focal = width / (2 * plane)
    rows = (np.arange(height) + 0.5 - height / 2)[:, None]  # downwards from the horizon
    level = _EYE_HEIGHT - rows * depth / focal  # height above the floor at which a pixel meets the wall
    on_wall = (level >= 0) & (level <= 1)

    course = np.floor(level * world.courses)
    brick = (along[None, :] * 0.6 * world.courses + 0.5 * (course % 2)) % 1
    mortar = (brick < 0.06) | ((level * world.courses) % 1 < 0.12)
    shade = (1 / (1 + 0.09 * depth**2))[None, :, None]
    wall = world.colors[cells[:, 0], cells[:, 1]][None] * np.where(mortar, 0.55, 1.0)[..., None] * (0.25 + 0.75 * shade)

    below = np.maximum(rows, 0.5)
    floor_depth = _EYE_HEIGHT * focal / below
    floor_x = origin[0] + floor_depth * (math.cos(yaw) - screen * math.sin(yaw))
    floor_y = origin[1] + floor_depth * (math.sin(yaw) + screen * math.cos(yaw))
    tile = (np.floor(floor_x * world.tiles) + np.floor(floor_y * world.tiles)) % 2
    fade = 1 / (1 + 0.06 * floor_depth**2)
    floor = (0.34 + 0.2 * tile * fade)[..., None] * np.array([1.0, 0.96, 0.9])
    sky = (0.62 + 0.3 * np.abs(rows) / height)[..., None] * np.array([0.78, 0.9, 1.05]) * np.ones((1, width, 1))

    picture = np.where(on_wall[..., None], wall, np.where(rows[..., None] > 0, floor, sky))
    return (picture.clip(0, 1) * 255).round().astype(np.uint8)
