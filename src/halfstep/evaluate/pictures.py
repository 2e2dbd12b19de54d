"""How alike two pictures are: PSNR and SSIM, and what people see where a library for it is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from halfstep.data.base import Array
from halfstep.errors import InputError

_MOST_DB = 100.0  # so that a mean over frames is finite where nothing moved in one

Metric = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class PictureMetrics:
    """Metrics of pairs of pictures, uint8 [N, H, W, 3]: psnr (dB, at most 100, which equal pictures have) and ssim, by
    torchmetrics; lpips (Zhang et al. 2018,
    by the package lpips) and dreamsim (Fu et al. 2023, by the package dreamsim) where they are installed, else
    `not_measured` says why not. Raises InputError without torchmetrics."""

    def __init__(self, device: torch.device) -> None:
        try:
            from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
        except ImportError as error:
            raise InputError(f"torchmetrics cannot be imported ({error}); pip install 'halfstep[eval]'") from error
        self._device = device
        self.not_measured: dict[str, str] = {}

        def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            each = [peak_signal_noise_ratio(x, y, data_range=1.0) for x, y in zip(a, b, strict=True)]
            return torch.stack(each).clamp(max=_MOST_DB)

        def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            value: Any = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
            return torch.as_tensor(value).reshape(len(a))

        self._metrics: dict[str, Metric] = {"psnr": psnr, "ssim": ssim}
        for name, load in (("lpips", _load_lpips), ("dreamsim", _load_dreamsim)):
            try:
                self._metrics[name] = load(device)
            except (ImportError, OSError) as error:  # not installed, or its weights cannot be had
                self.not_measured[name] = str(error)

    def __call__(self, a: Array, b: Array) -> list[dict[str, float]]:
        """The metrics of each pair."""
        x, y = (torch.from_numpy(p).permute(0, 3, 1, 2).to(self._device).float() / 255 for p in (a, b))
        columns = {name: metric(x, y).tolist() for name, metric in self._metrics.items()}
        return [{name: column[i] for name, column in columns.items()} for i in range(len(a))]


def _load_lpips(device: torch.device) -> Metric:
    import lpips

    network = lpips.LPIPS(net="alex", verbose=False).to(device).eval()

    @torch.no_grad()
    def measure(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        distances: torch.Tensor = network(2 * a - 1, 2 * b - 1)
        return distances.flatten()

    return measure


def _load_dreamsim(device: torch.device) -> Metric:
    from dreamsim import dreamsim

    network, _ = dreamsim(pretrained=True, device=str(device))

    @torch.no_grad()
    def measure(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        sized = [torch.nn.functional.interpolate(x, (224, 224), mode="bicubic").clamp(0, 1) for x in (a, b)]
        distances: torch.Tensor = network(*sized)
        return distances.flatten()

    return measure
