"""Read pickles that strangers made: plain data and numeric numpy arrays, nothing that runs code."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from halfstep.errors import InputError, UnsafePickleError

# What pickles of arrays, of all numpy versions, refer to.
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
}


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise UnsafePickleError(f"asks for {module}.{name}; only plain data and numpy arrays are loaded")
        return super().find_class(module, name)


def load_pickle(path: Path) -> Any:
    """Unpickle `path`. Raises UnsafePickleError when it asks for code, InputError when it is damaged or not there."""
    try:
        return _RestrictedUnpickler(io.BytesIO(path.read_bytes())).load()
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise InputError(f"{path}: damaged pickle ({str(error).splitlines()[0] or type(error).__name__})") from error


def load_poses(path: Path) -> tuple[np.ndarray[Any, np.dtype[np.float64]], np.ndarray[Any, np.dtype[np.float64]]]:
    """`position` [N, 2] metres and `yaw` [N] radians of a `traj_data.pkl`, as float64.

    Accepts yaw as [N] or [N, 1]. Raises InputError when the arrays are missing, not finite or differ in length.
    """
    values = load_pickle(path)
    if not isinstance(values, dict) or not {"position", "yaw"} <= set(values):
        raise InputError(f"{path}: expected a dict with position and yaw")
    try:
        position = np.asarray(values["position"], dtype=np.float64)
        yaw = np.asarray(values["yaw"], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: position and yaw must be numbers ({error})") from error
    if yaw.ndim == 2 and yaw.shape[1] == 1:
        yaw = yaw[:, 0]
    if position.ndim != 2 or position.shape[1] < 2 or yaw.shape != position.shape[:1]:
        raise InputError(
            f"{path}: got position {list(position.shape)} and yaw {list(yaw.shape)}; expected [N, 2] and [N]"
        )
    if not (np.isfinite(position).all() and np.isfinite(yaw).all()):
        raise InputError(f"{path}: position or yaw is not finite")
    return position[:, :2], yaw
