"""What a latent is: the facts that must agree before two latents may share a store.

Axes: B batch, C channels, T time, H height, W width.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from halfstep.errors import InputError

Crop = Literal["fill", "4:3"]


@dataclass(frozen=True)
class PixelSpec:
    """How a source picture becomes the autoencoder's input of `width` x `height` pixels, RGB, in [-1, 1].

    `crop="fill"` scales the picture to cover the size and cuts the center (the ADM recipe: box halvings, then bicubic).
    `crop="4:3"` cuts the center to 4:3, padding narrower pictures with black, and then resizes each axis on its own
    (bilinear), which is the recipe of the navigation world models.
    """

    width: int
    height: int
    crop: Crop = "fill"
    clip_length: int = 1

    def __str__(self) -> str:
        clip = f", {self.clip_length} frames" if self.clip_length > 1 else ""
        return f"{self.width}x{self.height} (crop {self.crop}{clip})"


@dataclass(frozen=True)
class LatentSpec:
    """Identity and geometry of latents, and the affine map that makes them model-ready: `(raw - shift) * scale`.

    `scale` and `shift` hold one value for all channels or one value a channel. `weights_sha256` is the digest of the
    autoencoder's parameters as loaded in fp32, so that it does not depend on the file format they came in. Where
    `pixels` do not say it, as for latents that another tool made, `latent_shape` is that of one latent.
    """

    autoencoder: str
    channels: int
    spatial_factor: int
    temporal_factor: int = 1
    scale: tuple[float, ...] = (1.0,)
    shift: tuple[float, ...] = (0.0,)
    weights_sha256: str = ""
    revision: str = ""
    pixels: PixelSpec | None = None
    latent_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("scale", "shift"):
            values = getattr(self, name)
            if len(values) not in (1, self.channels):
                raise InputError(
                    f"LatentSpec.{name}: got {len(values)} values; expected 1 or {self.channels}, one a channel"
                )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LatentSpec:
        """Raise InputError when a field is missing or unknown."""
        try:
            pixels = PixelSpec(**values["pixels"]) if values.get("pixels") else None
            tuples = {name: tuple(values[name]) for name in ("scale", "shift")}
            shape = values.get("latent_shape")
            return cls(**{**values, **tuples, "pixels": pixels, "latent_shape": tuple(shape) if shape else None})
        except (TypeError, KeyError) as error:
            raise InputError(f"latent spec: {error}; the description of these latents is incomplete") from error

    def differences(self, wanted: LatentSpec) -> list[str]:
        """Why latents of this spec and of `wanted` cannot share a store, as `what: this one's, not the wanted one's`.

        The name and revision under which an autoencoder was found do not count: its weights do.
        """
        if self.weights_sha256 != wanted.weights_sha256:
            mine, theirs = (f"{s.autoencoder} (weights {s.weights_sha256[:8] or 'unknown'})" for s in (self, wanted))
            found = [f"autoencoder: {mine}, not {theirs}"]
        else:
            names = ("channels", "spatial_factor", "temporal_factor", "scale", "shift", "latent_shape")
            pairs = [(name, getattr(self, name), getattr(wanted, name)) for name in names]
            found = [f"{name}: {mine}, not {theirs}" for name, mine, theirs in pairs if mine != theirs]
        if self.pixels != wanted.pixels:
            found.append(f"pixels: {self.pixels}, not {wanted.pixels}")
        return found
