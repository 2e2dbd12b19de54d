"""The CDiT of the reference implementation: random weights, inputs, and what came out."""

import json

from safetensors import safe_open
from safetensors.torch import load_file

from halfstep.models import CDiT
from tests.support.arrays import GOLDEN

NUMBERS = load_file(GOLDEN / "cdit_tiny.safetensors")
with safe_open(GOLDEN / "cdit_tiny.safetensors", "pt") as file:
    CONFIG = json.loads(file.metadata()["config"])
INPUTS = [NUMBERS[f"in.{name}"] for name in ("x", "t", "y", "x_cond", "rel_t")]
STATE = {name.removeprefix("weights."): value for name, value in NUMBERS.items() if name.startswith("weights.")}


def golden_model() -> CDiT:
    model = CDiT(**CONFIG, patch_size=2).eval()
    model.load_state_dict(STATE, strict=True)
    return model
