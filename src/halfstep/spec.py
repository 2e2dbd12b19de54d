"""What a latent is: the facts that must agree before two latents may share a store.

Axes: B batch, C channels, T time, H height, W width.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from halfstep.errors import InputError

Crop = Literal["fill", "4:3"]


@dataclass(frozen=True)
class PixelSpec:
    """How a source picture becomes the autoencoder's input of `width` x `height` pixels, RGB, in [-1, 1].

    `crop="fill"` scales the picture to cover the size and cuts the centre (the ADM recipe: box halvings, then bicubic).
    `crop="4:3"` cuts the centre to 4:3, padding narrower pictures with black, and then resizes each axis on its own
    (bilinear), which is the recipe of the navigation world models.
    """

    width: int
    height: int
    crop: Crop = "fill"
    clip_length: int = 1


@dataclass(frozen=True)
class LatentSpec:
    """Identity and geometry of latents, and the affine map that makes them model-ready: `(raw - shift) * scale`.

    `scale` and `shift` hold one value for all channels or one value a channel. `weights_sha256` is the digest of the
    autoencoder's parameters as loaded in fp32, so that it does not depend on the file format they came in.
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
            affine = {name: tuple(values[name]) for name in ("scale", "shift")}
            return cls(**{**values, **affine, "pixels": pixels})
        except (TypeError, KeyError) as error:
            raise InputError(f"latent spec: {error}; the description of these latents is incomplete") from error

    def differences(self, other: LatentSpec) -> list[str]:
        """The fields that keep latents of the two specs from sharing a store, as `name: ours, not theirs`.

        The name and revision under which the autoencoder was found do not count: its weights do.
        """
        return [
            f"{f.name}: {getattr(self, f.name)}, not {getattr(other, f.name)}"
            for f in fields(self)
            if f.name not in ("autoencoder", "revision") and getattr(self, f.name) != getattr(other, f.name)
        ]
