"""Latents on disk: DatasetStore for training, TrajectoryStore for recorded sampling runs. Imports no torch."""

from halfstep.store.dataset import DatasetStore
from halfstep.store.maintenance import RepairReport, VerifyReport, compact, repair, verify
from halfstep.store.manifest import Manifest
from halfstep.store.open import find_trajectory_store, open_trajectories, readable_runs
from halfstep.store.run import Run
from halfstep.store.trajectory import TrajectoryStore
from halfstep.store.trajectory_layout import TrajectoryFormat
from halfstep.store.trajectory_maintenance import repair_trajectories, verify_trajectories
from halfstep.store.trajectory_writer import RunWriter
from halfstep.store.writer import DatasetWriter

__all__ = [
    "DatasetStore",
    "DatasetWriter",
    "Manifest",
    "RepairReport",
    "Run",
    "RunWriter",
    "TrajectoryFormat",
    "TrajectoryStore",
    "VerifyReport",
    "compact",
    "find_trajectory_store",
    "open_trajectories",
    "readable_runs",
    "repair",
    "repair_trajectories",
    "verify",
    "verify_trajectories",
]
