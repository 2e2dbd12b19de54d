"""Read a tensor that `torch.save` wrote, without torch and without running anything the file names.

The format: a zip whose `data.pkl` describes the tensor and whose `data/<n>` hold the bytes of the storages.
"""

from __future__ import annotations

import pickle
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from halfstep.errors import StoreError, UnsafePickleError
from halfstep.store.formats import NUMPY_TYPES, Array, to_float32
from halfstep.store.run import Float32

_DAMAGE = (
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    NotImplementedError,
    RuntimeError,
    zlib.error,
)
_STORAGES = {"FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64"}


@dataclass(frozen=True)
class _Storage:
    type_name: str
    values: Array


@dataclass(frozen=True)
class _Tensor:
    type_name: str
    values: Array


def read_torch_tensor(file: IO[bytes], where: str) -> Float32:
    """The one tensor in a file of `torch.save`, as float32. `where` names the file in errors.

    Raises StoreError when the file is damaged or holds something else, UnsafePickleError when it names anything but
    what a tensor is made of.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            described = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(described) != 1:
                raise StoreError(f"{where}: no file of torch.save (1.6 or newer)")
            with archive.open(described[0]) as data:
                tensor = _TensorUnpickler(data, archive, described[0].removesuffix("data.pkl"), where).load()
    except UnsafePickleError:
        raise
    except _DAMAGE as error:
        raise StoreError(f"{where}: damaged ({error})") from error
    if not isinstance(tensor, _Tensor):
        raise StoreError(f"{where}: holds a {type(tensor).__name__}; expected one tensor")
    return to_float32(tensor.values, tensor.type_name)


class _TensorUnpickler(pickle.Unpickler):
    def __init__(self, data: IO[bytes], archive: zipfile.ZipFile, prefix: str, where: str) -> None:
        super().__init__(data)
        self._archive, self._prefix, self._where = archive, prefix, where

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise UnsafePickleError(f"{self._where}: names {module}.{name}; expected a tensor of floating point")

    def persistent_load(self, pid: Any) -> _Storage:
        _, type_name, number, _, _ = pid
        return _Storage(
            type_name, np.frombuffer(self._archive.read(f"{self._prefix}data/{number}"), NUMPY_TYPES[type_name])
        )


def _rebuild(storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> _Tensor:
    if len(size) != len(stride) or min((offset, *size, *stride)) < 0:
        raise ValueError(f"a tensor of size {size} and stride {stride} at {offset}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and last >= len(storage.values):
        raise ValueError(f"the storage ends before the tensor of size {size} does")
    item = storage.values.itemsize
    values = np.lib.stride_tricks.as_strided(
        storage.values[offset:], size, [step * item for step in stride], writeable=False
    )
    return _Tensor(storage.type_name, np.array(values, order="C"))
