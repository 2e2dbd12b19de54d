"""What to sample, with which network and how: one frozen value."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from halfstep.errors import InputError
from halfstep.files import claim
from halfstep.store import TrajectoryFormat

FORMATS = ("png", "mp4", "gif", "npy")

# The options that not all families have.
_OWN = {
    "EqM": "step_size momentum guidance_scale guidance_channels labels stop_below start_from start_gamma video "
    "clip_len energy",
    "CDiT": "data_path frames spacing guidance_scale",
    "livestream": "data_path frames spacing",
}


@dataclass(frozen=True)
class SampleOptions:
    """What to make. None leaves the choice to the network.

    `sampler`: gd, ngd (default), euler or heun for EqM; ancestral (default), ddim or dpm++ for CDiT, with `steps` as
    published, 250; euler with 3 for livestream; gd and ngd make one update less. EqM: `labels` in turn, each a class or
    several to be composed; `stop_below` as in `halfstep.sampling`; `start_from`, a store or `.pt` tree whose latents
    are noised, so that `start_gamma` (0.5) is their share; `video` and `clip_len` of a published checkpoint that does
    not say it. CDiT and livestream: `data_path` with walks whose beginnings are context, `frames` to predict. `format`:
    png, mp4, gif, or npy for latents that are not decoded. `record`: keep each step, at the error of `storage`. Samples
    depend on `seed` and their number alone.
    """

    ckpt: Path
    output: Path
    number: int = 16
    model: str | None = None
    autoencoder: str | None = None
    sampler: str | None = None
    steps: int | None = None
    step_size: float = 0.0017
    momentum: float = 0.3
    guidance_scale: float = 1.0
    guidance_channels: int | None = None
    labels: tuple[tuple[int, ...], ...] = ()
    stop_below: float | None = None
    start_from: Path | str | None = None
    start_gamma: float | None = None
    data_path: Path | str | None = None
    frames: int = 8
    spacing: float | None = None
    video: bool = False
    clip_len: int | None = None
    energy: str | None = None
    ema: bool = True
    batch_size: int = 32
    seed: int = 0
    precision: str = "auto"
    device: str = "auto"
    format: str | None = None
    fps: int = 8
    record: bool = False
    storage: str = "fp16"

    def require_sound(self) -> None:
        """Raise InputError for what no network could do, or for a folder of something else."""
        if self.format not in (None, *FORMATS):
            raise InputError(f"--format: got {self.format!r}; expected one of {', '.join(FORMATS)}")
        if min(self.number, self.batch_size, self.frames, self.steps or 1) < 1 or self.steps == 0:
            raise InputError("sample: --number, --batch-size, --frames and --steps are at least 1")
        if self.clip_len is not None and not self.video:
            raise InputError("--clip-len needs --video")
        if self.storage != "fp16" and not self.record:
            raise InputError("--storage needs --record: it is the type of recorded steps")
        TrajectoryFormat(storage=self.storage)  # which refuses what it cannot keep
        claim(self.output, "set of samples", ("samples.json",))

    def require_for(self, family: str) -> None:
        """Raise InputError for an option that is of other families of networks."""
        silent, own = SampleOptions(self.ckpt, self.output), _OWN[family].split()
        for name in (name for names in _OWN.values() for name in names.split() if name not in own):
            if getattr(self, name) != getattr(silent, name):
                flag = name.replace("guidance", "cfg").replace("_", "-")
                raise InputError(f"--{flag} is not an option of {family}")
