"""Samples of the navigation world models (Bar et al. 2024, arXiv 2412.03572): which frames, which goals, which
actions."""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from typing import Any

import numpy as np
import numpy.typing as npt

from halfstep.errors import InputError

# Action limits in waypoints, x forward and y to the left, that map to [-1, 1].
ACTION_MIN = np.array([-2.5, -4.0])
ACTION_MAX = np.array([5.0, 4.0])

# Meters between waypoints.
METRIC_WAYPOINT_SPACING = {"recon": 0.25, "scand": 0.38, "tartan_drive": 0.72, "go_stanford": 0.12, "sacson": 0.255}

# Offsets in frames are divided by this to give rel_t.
REL_T_FRAMES = 128

Index = npt.NDArray[np.int64]
Float = npt.NDArray[np.float64]


def sample_index(
    lengths: Ordered[int], context_size: int, len_traj_pred: int, min_dist_cat: int, max_dist_cat: int
) -> Index:
    """All samples of walks with `lengths` frames: int64 [M, 4], rows (walk, current frame, smallest goal
    offset, largest goal offset).

    A current frame t has its context behind it and `len_traj_pred` frames ahead: context_size - 1 <= t < N -
    len_traj_pred. Goal offsets are frames in [max(min_dist_cat, -t), min(max_dist_cat, N - t - 1)], both included:
    past, future and zero; a frame without such offsets is no sample.
    """
    rows = []
    for walk, length in enumerate(lengths):
        current = np.arange(context_size - 1, length - len_traj_pred, dtype=np.int64)
        smallest = np.maximum(min_dist_cat, -current)
        largest = np.minimum(max_dist_cat, length - current - 1)
        found = np.stack([np.full_like(current, walk), current, smallest, largest], axis=1)
        rows.append(found[smallest <= largest])
    return np.concatenate(rows) if rows else np.empty((0, 4), np.int64)


def goal_actions(position: Float, yaw: Float, current: int, goal_times: Ordered[int] | Index, spacing: float) -> Float:
    """The actions that lead from frame `current` to the goals: float64 [G, 3] of x, y and change of yaw.

    `position` [N, 2] meters, `yaw` [N] radians, `spacing` meters a waypoint. The offset to a goal is turned into the
    frame of the current pose (rows times [[c, -s], [s, c]]), divided by `spacing` and mapped so that ACTION_MIN..MAX
    become -1..1; goals beyond them leave that range. The change of yaw is radians wrapped to [-pi, pi).
    """
    position, yaw = np.asarray(position, np.float64), np.asarray(yaw, np.float64).reshape(-1)
    goals = np.asarray(goal_times, np.int64)
    cos, sin = np.cos(yaw[current]), np.sin(yaw[current])
    offset = (position[goals] - position[current]) @ np.array([[cos, -sin], [sin, cos]]) / spacing
    scaled = 2 * (offset - ACTION_MIN) / (ACTION_MAX - ACTION_MIN) - 1
    turn = (yaw[goals] - yaw[current] + np.pi) % (2 * np.pi) - np.pi
    actions: Float = np.concatenate([scaled, turn[:, None]], axis=1)
    return actions


def relative_time(current: int, goal_times: Any) -> Float:
    """rel_t of goals: their offsets in frames over REL_T_FRAMES, float64 [G]."""
    return (np.asarray(goal_times, np.float64) - current) / REL_T_FRAMES


def local_steps(position: Float, yaw: Float) -> Float:
    """The steps of a path of N poses: float64 [N - 1, 3], meters forward and to the left and radians to the left, each
    seen from the pose before it. Differences in the frame of the path's start are not these: each must be turned."""
    position, yaw = np.asarray(position, np.float64), np.asarray(yaw, np.float64).reshape(-1)
    moved, cos, sin = np.diff(position, axis=0), np.cos(yaw[:-1]), np.sin(yaw[:-1])
    forward, left = moved[:, 0] * cos + moved[:, 1] * sin, moved[:, 1] * cos - moved[:, 0] * sin
    turn = (np.diff(yaw) + np.pi) % (2 * np.pi) - np.pi
    return np.stack([forward, left, turn], axis=1)


def follow(steps: Float) -> Float:
    """Where steps [..., S, 3] as of `local_steps` lead: poses [..., S, 3] (x, y, yaw) in the frame of the start."""
    after = np.cumsum(steps[..., 2], axis=-1)
    before = after - steps[..., 2]
    x = np.cumsum(steps[..., 0] * np.cos(before) - steps[..., 1] * np.sin(before), axis=-1)
    y = np.cumsum(steps[..., 0] * np.sin(before) + steps[..., 1] * np.cos(before), axis=-1)
    return np.stack([x, y, after], axis=-1)


def waypoint_spacing(given: float | None, trained: float | None) -> float:
    """Meters a waypoint: those that are given, or else those of the training. Raises InputError when nobody says it."""
    spacing = trained if given is None else given
    if spacing is None:
        raise InputError("spacing: the checkpoint does not say the meters of a waypoint; give it")
    if not spacing > 0:
        raise InputError(f"spacing: got {spacing}; expected meters above 0")
    return spacing


def to_actions(steps: Float, spacing: float) -> Float:
    """Steps [..., 3] in meters and radians as a model takes them: see `goal_actions`."""
    scaled = 2 * (steps[..., :2] / spacing - ACTION_MIN) / (ACTION_MAX - ACTION_MIN) - 1
    actions: Float = np.concatenate([scaled, steps[..., 2:]], axis=-1)
    return actions
