"""The predictive codec for programs that find their codecs in numcodecs: Zarr v2, kerchunk and others."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numcodecs.compat import ensure_bytes, ndarray_copy

from halfstep.errors import InputError
from halfstep.store.predictive import Fidelity, Promise, decode_trajectory, encode_trajectory


@dataclass(frozen=True)
class Predictive:
    """The numcodecs codec `halfstep.predictive`, of float32 arrays [S, ...]; fields as those of PredictiveCodec. Raises
    InputError for another type of array."""

    max_error: float | None = None
    fidelity: Fidelity | None = "fp16"
    strict: bool = False
    channel_axis: int = 0

    codec_id: ClassVar[str] = "halfstep.predictive"

    def encode(self, buf: Any) -> bytes:
        """The bytes of an array that knows its shape."""
        values = np.asarray(buf)
        if values.dtype != np.float32 or values.ndim == 0:
            raise InputError(f"{self.codec_id}: got {values.dtype} {list(values.shape)}; expected float32 [steps, ...]")
        promise = Promise(self.max_error, self.fidelity, self.strict)
        return encode_trajectory(np.ascontiguousarray(values), promise, channel_axis=self.channel_axis)

    def decode(self, buf: Any, out: Any = None) -> Any:
        """The array, or `out` filled with it. Raises StoreError when the bytes are damaged."""
        return ndarray_copy(decode_trajectory(ensure_bytes(buf)), out)

    def get_config(self) -> dict[str, Any]:
        return {"id": self.codec_id, **asdict(self)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(**config)
