"""The predictive codec as a Zarr v3 codec, found by `zarr.open` through its entry point when halfstep is installed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from zarr.abc.codec import ArrayBytesCodec, ArrayBytesCodecPartialDecodeMixin
from zarr.abc.store import ByteGetter
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer
from zarr.core.indexing import SelectorTuple

from halfstep.errors import InputError, StoreError
from halfstep.store.predictive import (
    Fidelity,
    Promise,
    count_states,
    decode_states,
    decode_trajectory,
    encode_trajectory,
)

NAME = "halfstep.predictive"


@dataclass(frozen=True)
class PredictiveCodec(ArrayBytesCodecPartialDecodeMixin, ArrayBytesCodec):
    """Array-to-bytes codec for float32 arrays [S, ...]; the states of a chunk are coded in groups of 16, and reading
    some of them decodes no more than those that they were predicted from.

    The zeros with which Zarr fills up an array's last chunk are not coded.

    `max_error`, `fidelity` and `strict` as in `Promise`; an error by `fidelity` is that of a group's own values.
    `channel_axis`: that of a state's axes which its channels lie on. Raises InputError for another type of array.
    """

    max_error: float | None = None
    fidelity: Fidelity | None = "fp16"
    strict: bool = False
    channel_axis: int = 0

    is_fixed_size = False

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        return cls(**data.get("configuration", {}))

    def to_dict(self) -> dict[str, Any]:
        configuration = {"max_error": self.max_error, "fidelity": self.fidelity}
        configuration |= {"strict": self.strict, "channel_axis": self.channel_axis}
        return {"name": NAME, "configuration": configuration}

    def validate(self, *, shape: Any, dtype: Any, chunk_grid: Any) -> None:
        if dtype.to_native_dtype() != np.dtype(np.float32):
            raise InputError(f"{NAME}: got an array of {dtype.to_native_dtype()}; expected float32")

    @property
    def promise(self) -> Promise:
        return Promise(self.max_error, self.fidelity, self.strict)

    async def _encode_single(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        values = np.ascontiguousarray(chunk_array.as_numpy_array())
        used = np.flatnonzero(values.reshape(len(values), -1).view(np.uint32).any(axis=1))  # bits, so -0.0 is used
        values = values[: max(1, used[-1] + 1 if used.size else 0)]
        blob = encode_trajectory(values, self.promise, channel_axis=self.channel_axis)
        return chunk_spec.prototype.buffer.from_bytes(blob)

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

    async def _decode_partial_single(
        self, byte_getter: ByteGetter, selection: SelectorTuple, chunk_spec: ArraySpec
    ) -> NDBuffer | None:
        found = await byte_getter.get(prototype=chunk_spec.prototype)
        if found is None:
            return None
        blob = found.to_bytes()
        first, *rest = selection if isinstance(selection, tuple) else (selection,)
        places = np.arange(chunk_spec.shape[0])[first]
        wanted = np.unique(places)
        if wanted.size and int(wanted[-1]) >= count_states(blob):
            raise StoreError(f"{NAME}: a chunk of {count_states(blob)} states, without {wanted[-1]}; read another copy")
        if not wanted.size:
            return chunk_spec.prototype.nd_buffer.from_numpy_array(
                np.empty((0, *chunk_spec.shape[1:]), np.float32)[(slice(None), *rest)]
            )
        states = decode_states(blob, wanted.tolist())
        if list(states.shape[1:]) != list(chunk_spec.shape[1:]):
            raise StoreError(
                f"{NAME}: states of {list(states.shape[1:])}, not {list(chunk_spec.shape[1:])}; read another copy"
            )
        # A slice stays one, so that indices along other axes combine as they would in the whole chunk.
        index: Any = np.searchsorted(wanted, places)
        if isinstance(first, slice):
            index = slice(None) if (first.step or 1) > 0 else slice(None, None, -1)
        return chunk_spec.prototype.nd_buffer.from_numpy_array(states[(index, *rest)])

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        raise NotImplementedError(f"{NAME}: the size depends on the values")
