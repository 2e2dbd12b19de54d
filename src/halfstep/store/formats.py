"""Number formats on disk, in numpy: fp32, fp16 and bf16 (which numpy lacks: kept as its 16 bits in uint16)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from halfstep.errors import InputError, NumericsError

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]

# The arrays of a shard that are latents, and so in the store's type.
LATENT_ARRAYS = ("latents", "logvar", "latents_mirror", "logvar_mirror")

# The safetensors name of each type that a shard may hold, and the numpy type that carries its bytes.
NUMPY_TYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "I32": np.dtype("<i4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
}
_STORAGE = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
_LARGEST = {"fp32": float(np.finfo(np.float32).max), "fp16": 65504.0, "bf16": 3.3895313892515355e38}


def safetensors_name(storage: str) -> str:
    """`fp16` -> `F16` and so on. Raises InputError for another name."""
    if storage not in _STORAGE:
        raise InputError(f"storage: got {storage!r}; expected one of {', '.join(_STORAGE)}")
    return _STORAGE[storage]


def storage_of(type_name: str) -> str:
    """The inverse of `safetensors_name`."""
    return next(storage for storage, name in _STORAGE.items() if name == type_name)


def largest_finite(storage: str) -> float:
    """The largest value that `storage` can hold."""
    return _LARGEST[storage]


def to_storage(values: Array, storage: str) -> Array:
    """Round float values to nearest even in `storage`: float32, float16, or uint16 holding bf16 bits.

    Arrays that already are in the type pass through. Raises NumericsError when a value is not finite or overflows.
    """
    target = NUMPY_TYPES[safetensors_name(storage)]
    if values.dtype.kind != "f" and values.dtype != target:
        raise InputError(f"latents: got {values.dtype}; expected floating point or {target} for {storage}")
    if values.dtype == target:
        stored = values
    elif storage == "bf16":
        bits = values.astype(np.float32).view(np.uint32)
        stored = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    else:
        with np.errstate(over="ignore"):  # looked at below
            stored = values.astype(target)
    # Before rounding too: a NaN's bits may round to a number.
    finite = values.dtype.kind != "f" or np.isfinite(values).all()
    if not finite or not (((stored & 0x7F80) != 0x7F80) if storage == "bf16" else np.isfinite(stored)).all():
        raise NumericsError(f"latents: some values are not finite in {storage}; see the largest before storing them")
    return stored


def to_float32(stored: Array, type_name: str) -> Float32:
    """The values of stored latents, which are finite, as a new float32 array."""
    if type_name == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if type_name == "F16":
        return _widen_fp16(stored)
    return stored.astype(np.float32)


def _widen_fp16(stored: Array) -> Float32:
    """Exactly `stored.astype(np.float32)` for finite values, three times as fast: numpy converts one value at a time.

    Sign, exponent and fraction move to their places in a float32, which is then 2^-112 of the value because the
    exponents are biased by 127 and by 15.
    """
    bits = stored.view(np.int16).astype(np.int32)
    bits <<= 13
    bits &= -0x70002000  # 0x8FFFE000 as a signed number: the sign, and the 15 bits of exponent and fraction
    values = bits.view(np.float32)
    values *= np.float32(2.0**112)
    return values
