"""PrecisionPolicy: which number format is used where, as one frozen value that prints and parses."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

from halfstep.errors import InputError

if TYPE_CHECKING:
    import torch

STORAGE_TYPES = ("fp32", "bf16", "fp16")
_ALLOWED = {
    "params": STORAGE_TYPES,
    "compute": ("fp32", "tf32", "bf16", "fp16"),
    "output": STORAGE_TYPES,
    "reduce": STORAGE_TYPES,
    "storage": STORAGE_TYPES,
}
_SPELLINGS = {
    "float32": "fp32",
    "32": "fp32",
    "32-true": "fp32",
    "bf16": "bf16-true",
    "bfloat16": "bf16-true",
    "fp16": "16-true",
    "float16": "16-true",
    "half": "16-true",
    "fp16-true": "16-true",
    "16": "16-mixed",
    "amp": "16-mixed",
    "fp16-mixed": "16-mixed",
}


def torch_dtype(name: str) -> torch.dtype:
    """The torch type behind fp32, tf32 (fp32 tensors, shortened products), bf16 or fp16."""
    import torch

    return {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


@dataclass(frozen=True)
class PrecisionPolicy:
    """The number format at every boundary: weights, arithmetic, results, reductions, files.

    params:  weights, buffers and the inputs of a module.
    compute: the type in which matrix products and convolutions run. When it differs from `params` the module runs under
             autocast (*mixed*); when both are the same half type there is no autocast (*true*). Never both casts.
    output:  what a prepared module returns.
    reduce:  gradient reductions between processes.
    storage: latents on disk.
    islands: names of modules, as shell patterns, that stay in fp32 whatever the rest does; with a `+` at its end they
             also return fp32, for values between modules that the half type cannot hold.
    loss_scale: None, "dynamic" or a fixed factor, for fp16 training.

    A policy prints as the nearest preset and what differs from it, `bf16-true,storage=fp16,islands=*norm*|head`, and
    `PrecisionPolicy.parse(str(policy)) == policy`. `auto` stands for a policy that is still to be chosen on a
    device: see `choose`.
    """

    params: str = "fp32"
    compute: str = "fp32"
    output: str = "fp32"
    reduce: str = "fp32"
    storage: str = "fp32"
    islands: tuple[str, ...] = ()
    loss_scale: float | str | None = None
    reason: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        undecided = self.params == "auto"
        for name, allowed in _ALLOWED.items():
            value = getattr(self, name)
            if value not in allowed and not (undecided and value == "auto"):
                raise InputError(f"precision.{name}: got {value!r}; expected one of {', '.join(allowed)}")
        if not undecided and self.params != "fp32" and self.compute != self.params:
            raise InputError(
                f"precision.compute: got {self.compute!r} with {self.params} weights; half-precision weights compute "
                "in their own type, use fp32 weights for autocast"
            )
        if undecided and self.compute != "auto":
            raise InputError("precision: auto chooses weights and arithmetic together; name a preset to set them")
        if any(set(pattern) & set(",|=") or not pattern.removesuffix("+") for pattern in self.islands):
            raise InputError(
                f"precision.islands: got {self.islands!r}; a pattern is not empty and has no ',', '|' or '='"
            )
        scale = self.loss_scale
        if isinstance(scale, str) and scale != "dynamic":
            raise InputError(f"precision.loss_scale: got {scale!r}; expected none, dynamic or a positive number")
        if isinstance(scale, (int, float)) and not 0 < scale < float("inf"):
            raise InputError(f"precision.loss_scale: got {scale!r}; expected none, dynamic or a positive number")

    @classmethod
    def parse(cls, text: str) -> PrecisionPolicy:
        """Read a preset (`fp32`, `bf16-mixed`, `16-mixed`, `bf16-true`, `16-true`, `auto`), one of the usual spellings
        (`bfloat16`, `float16`, `bf16`, `fp16`: the true presets; `amp`: 16-mixed), and `key=value` after commas.

        Raises InputError naming the part that could not be read.
        """
        head, *parts = (part.strip() for part in text.split(","))
        name = _SPELLINGS.get(head.lower(), head.lower())
        if name not in PRESETS:
            raise InputError(
                f"precision: got {head!r}; expected one of {', '.join(PRESETS)} or {', '.join(_SPELLINGS)}"
            )
        changes: dict[str, object] = {}
        for part in parts:
            key, separator, value = part.partition("=")
            if not separator or (key not in _ALLOWED and key not in ("islands", "loss_scale")):
                expected = ", ".join([*_ALLOWED, "islands", "loss_scale"])
                raise InputError(f"precision: got {part!r}; expected key=value with a key of {expected}")
            if key in changes:
                raise InputError(f"precision.{key}: given twice in {text!r}; keep one")
            if key == "islands":
                changes[key] = tuple(value.split("|")) if value else ()
            elif key == "loss_scale":
                changes[key] = _parse_loss_scale(value)
            else:
                changes[key] = value
        return replace(PRESETS[name], **changes)  # type: ignore[arg-type]

    @property
    def is_auto(self) -> bool:
        return self.params == "auto"

    @property
    def is_mixed(self) -> bool:
        """True when modules run under autocast."""
        return self.params == "fp32" and self.compute in ("bf16", "fp16")

    def explain(self) -> str:
        """What the policy does, in words, and for a measured policy the figures that decided it."""
        if self.is_auto:
            return "auto: the format is measured on the device when it is first needed."
        if self.is_mixed:
            how = f"weights stay fp32 and products run in {self.compute} under autocast"
        elif self.params != "fp32":
            how = f"weights, buffers, inputs and arithmetic are {self.params}, without autocast"
        else:
            how = "weights and arithmetic are fp32" + (", with products in TF32" if self.compute == "tf32" else "")
        lines = [f"{self}: {how}; results are {self.output}; latents are stored in {self.storage}."]
        if self.islands:
            lines.append(f"Kept in fp32: modules named {', '.join(self.islands)}.")
        if self.loss_scale is not None:
            lines.append(f"Loss scale in training: {self.loss_scale}.")
        if self.reason:
            lines.append(self.reason)
        return "\n".join(lines)

    def __str__(self) -> str:
        def changes_from(preset: PrecisionPolicy) -> list[str]:
            return [
                f"{f.name}={_print_value(getattr(self, f.name))}"
                for f in fields(self)
                if f.compare and getattr(self, f.name) != getattr(preset, f.name)
            ]

        candidates = [name for name, preset in PRESETS.items() if preset.is_auto == self.is_auto]
        name = min(candidates, key=lambda preset: len(changes_from(PRESETS[preset])))
        return ",".join([name, *changes_from(PRESETS[name])])


def _parse_loss_scale(value: str) -> float | str | None:
    if value in ("none", "dynamic"):
        return None if value == "none" else value
    try:
        return float(value)
    except ValueError:
        raise InputError(f"precision.loss_scale: got {value!r}; expected none, dynamic or a number") from None


def _print_value(value: object) -> str:
    if isinstance(value, tuple):
        return "|".join(value)
    return "none" if value is None else str(value)


PRESETS = {
    "fp32": PrecisionPolicy(),
    "bf16-mixed": PrecisionPolicy(compute="bf16", storage="bf16"),
    "16-mixed": PrecisionPolicy(compute="fp16", storage="fp16", loss_scale="dynamic"),
    "bf16-true": PrecisionPolicy(params="bf16", compute="bf16", storage="bf16"),
    "16-true": PrecisionPolicy(params="fp16", compute="fp16", storage="fp16"),
    "auto": PrecisionPolicy(params="auto", compute="auto", output="auto", storage="auto"),
}
