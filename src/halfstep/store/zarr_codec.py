"""The predictive codec as a Zarr v3 codec, found by `zarr.open` through its entry point when halfstep is installed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer

from halfstep.errors import InputError, StoreError
from halfstep.store.codecs import Fidelity, decode_trajectory, encode_trajectory

NAME = "halfstep.predictive"


@dataclass(frozen=True)
class PredictiveCodec(ArrayBytesCodec):
    """Array-to-bytes codec for float32 arrays [S, ...]; each chunk is one group of steps.

    The zeros with which Zarr fills up an array's last chunk are not coded.

    `max_error` or `fidelity` as in `encode_trajectory`; a bound by `fidelity` is that of each chunk's own values.
    Raises InputError for another type of array.
    """

    max_error: float | None = None
    fidelity: Fidelity | None = "fp16"

    is_fixed_size = False

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        return cls(**data.get("configuration", {}))

    def to_dict(self) -> dict[str, Any]:
        return {"name": NAME, "configuration": {"max_error": self.max_error, "fidelity": self.fidelity}}

    def validate(self, *, shape: Any, dtype: Any, chunk_grid: Any) -> None:
        if dtype.to_native_dtype() != np.dtype(np.float32):
            raise InputError(f"{NAME}: got an array of {dtype.to_native_dtype()}; expected float32")

    async def _encode_single(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        values = np.ascontiguousarray(chunk_array.as_numpy_array())
        used = np.flatnonzero(values.reshape(len(values), -1).view(np.uint32).any(axis=1))  # bits, so -0.0 is used
        values = values[: max(1, used[-1] + 1 if used.size else 0)]
        options: dict[str, Any] = {"max_error": self.max_error, "fidelity": self.fidelity}
        return chunk_spec.prototype.buffer.from_bytes(encode_trajectory(values, group=len(values), **options))

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        values = decode_trajectory(chunk_bytes.to_bytes())
        steps, *step_shape = chunk_spec.shape
        if list(values.shape[1:]) != step_shape or len(values) > steps:
            raise StoreError(
                f"{NAME}: a chunk of {list(values.shape)}, not {list(chunk_spec.shape)}; read another copy"
            )
        if len(values) < steps:
            values = np.concatenate([values, np.zeros((steps - len(values), *step_shape), np.float32)])
        return chunk_spec.prototype.nd_buffer.from_numpy_array(values)

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        raise NotImplementedError(f"{NAME}: the size depends on the values")
