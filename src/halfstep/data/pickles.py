"""Read pickles that strangers made: plain data and numeric numpy arrays, nothing that runs code."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, ClassVar

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


_NUMERIC_CODES = frozenset(f"{kind}{size}" for kind in "fiu" for size in (1, 2, 4, 8)) | {"b1"}


class _RestrictedUnpickler(pickle._Unpickler):
    """Finds nothing but `_ALLOWED`. In Python, because the state of a numpy dtype must not be taken from a file: a
    forged one corrupts numpy for the whole process."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise UnsafePickleError(f"asks for {module}.{name}; only plain data and numpy arrays are loaded")
        return _numeric_dtype if (module, name) == ("numpy", "dtype") else super().find_class(module, name)

    def load_build(self) -> None:
        if not isinstance(self.stack[-2], np.dtype):  # type: ignore[attr-defined]
            super().load_build()  # type: ignore[misc]
            return
        state = self.stack.pop()  # type: ignore[attr-defined]
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", "|", "="):
            raise UnsafePickleError("holds numbers of another byte order or structure")

    dispatch[pickle.BUILD[0]] = load_build


def _numeric_dtype(code: object, *_: object) -> np.dtype[Any]:
    if not isinstance(code, str) or code not in _NUMERIC_CODES:
        raise UnsafePickleError(f"holds an array of {code!r}; only numbers are loaded")
    return np.dtype(code)


def load_pickle(path: Path) -> Any:
    """Unpickle `path`. Raises UnsafePickleError when it asks for code, InputError when it is damaged or not there."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        return _RestrictedUnpickler(io.BytesIO(data)).load()
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{path}: {error}") from None
    except Exception as error:  # damaged bytes make a pickle fail in any way
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(f"{path}: damaged pickle ({reason})") from error


def load_poses(path: Path) -> tuple[np.ndarray[Any, np.dtype[np.float64]], np.ndarray[Any, np.dtype[np.float64]]]:
    """`position` [N, 2] meters and `yaw` [N] radians of a `traj_data.pkl`, as float64.

    Accepts yaw as [N] or [N, 1]. Raises InputError when the arrays are missing, not finite or differ in length.
    """
    values = load_pickle(path)
    if not isinstance(values, dict) or not {"position", "yaw"} <= set(values):
        raise InputError(f"{path}: expected a dict with position and yaw")
    try:
        position = np.asarray(values["position"], dtype=np.float64)
        yaw = np.asarray(values["yaw"], dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
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
