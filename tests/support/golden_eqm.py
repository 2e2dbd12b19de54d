"""The EqM of the reference implementation: random weights, inputs, and what came out."""

import json
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file

from halfstep.models import EqM
from tests.support.arrays import GOLDEN

NUMBERS = load_file(GOLDEN / "eqm_tiny.safetensors")
with safe_open(GOLDEN / "eqm_tiny.safetensors", "pt") as file:
    CONFIG = json.loads(file.metadata()["config"])
X, T, Y = (NUMBERS[f"in.{name}"] for name in "xty")
STATE = {name.removeprefix("weights."): value for name, value in NUMBERS.items() if name.startswith("weights.")}


def golden_model(**changes: Any) -> EqM:
    model = EqM(**{**CONFIG, **changes}).eval()
    model.load_state_dict(STATE, strict=True)
    return model
