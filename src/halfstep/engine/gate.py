"""The gate on what a half type computes: half, look, again in fp32 what it spoiled, refuse what fp32 spoils too."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

Outputs = Sequence[torch.Tensor]
Compute = Callable[[torch.Tensor], Outputs]


@dataclass(frozen=True)
class Checked:
    """Tensors [B, ...] that may be used, but for the samples in `refused` (place in the batch -> reason). `retried` are
    the samples that had to be computed again in fp32."""

    outputs: tuple[torch.Tensor, ...]
    retried: frozenset[int] = frozenset()
    refused: dict[int, str] = field(default_factory=dict)


class Gate:
    """Compute batches in half, and again in fp32 the samples that half spoils.

    half: from inputs [B, ...] to tensors [B, ...]. load_exact: makes the same in fp32, when it is first needed; None
    where `half` is fp32 already. largest: the largest value that may pass, and `advice` for what does not. Only the
    spoiled samples are replaced, so that a sample does not depend on its neighbors. Safe to call from several threads
    when `half` is.
    """

    def __init__(
        self,
        half: Compute,
        load_exact: Callable[[], Compute] | None,
        *,
        largest: float = torch.finfo(torch.float32).max,
        advice: str = "",
    ) -> None:
        self._half, self._load_exact, self._largest, self._advice = half, load_exact, largest, advice
        self._exact: Compute | None = None
        self._lock = threading.Lock()

    def __call__(self, inputs: torch.Tensor) -> Checked:
        """What is computed from `inputs`. Waits for the device, which is asked whether all values are fit."""
        outputs = tuple(self._half(inputs))
        bad = self._unfit(outputs)
        if not bad:
            return Checked(outputs)
        if self._load_exact is not None:
            with self._lock:  # rare, so one at a time; also what is loaded may keep state
                if self._exact is None:
                    self._exact = self._load_exact()
                exact = self._exact(inputs)
            outputs = tuple(_replaced(ours, theirs, bad) for ours, theirs in zip(outputs, exact, strict=True))
        refused = {sample: self._reason(outputs, sample) for sample in self._unfit(outputs)}
        return Checked(outputs, frozenset(bad if self._load_exact is not None else ()), refused)

    def _unfit(self, outputs: Outputs) -> list[int]:
        fits = torch.ones(len(outputs[0]), dtype=torch.bool, device=outputs[0].device)
        for tensor in outputs:
            # NaN compares false, so it does not fit either.
            fits &= (tensor.abs() <= self._largest).flatten(1).all(dim=1)
        return [sample for sample, good in enumerate(fits.tolist()) if not good]

    def _reason(self, outputs: Outputs, sample: int) -> str:
        values = [tensor[sample] for tensor in outputs]
        if all(torch.isfinite(value).all() for value in values):
            return (
                f"reach {max(float(value.abs().max()) for value in values):g}, beyond {self._largest:g}{self._advice}"
            )
        return "are not finite, in fp32 too"


def _replaced(half: torch.Tensor, exact: torch.Tensor, samples: list[int]) -> torch.Tensor:
    merged = half.to(exact.dtype, copy=True)
    merged[samples] = exact[samples]
    return merged
