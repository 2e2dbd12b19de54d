"""The gate on every encoded batch: nothing that is not finite, or does not fit the storage type, gets through."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from halfstep.autoencoders.base import Autoencoder, Posterior
from halfstep.precision import PrecisionPolicy


@dataclass(frozen=True)
class Checked:
    """A posterior that may be stored, but for the samples in `refused` (place in the batch -> reason). `retried` are
    the samples that had to be computed again in fp32."""

    posterior: Posterior
    retried: frozenset[int]
    refused: dict[int, str]


class EncodeGate:
    """Encode batches in the half types of a policy, and again in fp32 the samples that those spoil.

    Only the spoilt samples are replaced, so a sample's latents do not depend on its neighbours. The fp32 autoencoder is
    loaded when it is first needed. Safe to call from several threads when the autoencoder is.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        policy: PrecisionPolicy,
        device: torch.device,
        largest: float,
        channels_last: bool | None = None,
    ) -> None:
        self._channels_last = channels_last
        self._autoencoder, self._policy, self._device, self._largest = autoencoder, policy, device, largest
        self._load_fallback: Callable[[], Autoencoder] = autoencoder.reload
        self._fallback: Autoencoder | None = None
        self._lock = threading.Lock()

    def encode(self, pixels: torch.Tensor) -> Checked:
        """`pixels` as in `Autoencoder.encode`. Samples whose latents are not finite, or exceed the largest value of the
        storage type, in fp32 too, are refused."""
        posterior = self._autoencoder.encode(pixels)
        bad = self._bad_samples(posterior)
        if not bad:
            return Checked(posterior, frozenset(), {})
        if self._policy.compute != "fp32":
            with self._lock:  # rare, so one at a time; also the fallback may keep state
                exact = self._fp32().encode(pixels)
            posterior = Posterior(
                self._replaced(posterior.mean, exact.mean, bad),
                None if posterior.logvar is None else self._replaced(posterior.logvar, exact.logvar, bad),
            )
        reasons = {sample: self._reason(posterior, sample) for sample in self._bad_samples(posterior)}
        return Checked(posterior, frozenset(bad if self._policy.compute != "fp32" else ()), reasons)

    def _fp32(self) -> Autoencoder:
        if self._fallback is None:
            self._fallback = self._load_fallback().prepared(
                self._device, PrecisionPolicy(), channels_last=self._channels_last
            )
        return self._fallback

    def _bad_samples(self, posterior: Posterior) -> list[int]:
        fits = torch.ones(len(posterior.mean), dtype=torch.bool, device=posterior.mean.device)
        for tensor in posterior:
            if tensor is not None:
                # NaN compares false, so it does not fit either.
                fits &= (tensor.abs() <= self._largest).flatten(1).all(dim=1)
        return [sample for sample, good in enumerate(fits.tolist()) if not good]

    @staticmethod
    def _replaced(half: torch.Tensor, exact: torch.Tensor | None, samples: list[int]) -> torch.Tensor:
        assert exact is not None  # the same network gives the same kind of posterior
        merged = half.to(exact.dtype, copy=True)
        merged[samples] = exact[samples]
        return merged

    def _reason(self, posterior: Posterior, sample: int) -> str:
        tensors = [t[sample] for t in posterior if t is not None]
        if all(torch.isfinite(t).all() for t in tensors):
            largest = max(float(t.abs().max()) for t in tensors)
            return (
                f"latents reach {largest:g}, beyond {self._largest:g} of the storage type; use --storage bf16 or fp32"
            )
        return "latents are not finite, in fp32 too"
