"""What several verbs make of their flags."""

from __future__ import annotations

from halfstep.errors import InputError


def precision_of(precision: str | None, use_bf16: bool, use_amp: bool) -> str | None:
    """The precision that is asked for, by name or by one of the published trainer's flags; None when it is not."""
    asked = [precision, "bf16-mixed" if use_bf16 else None, "16-mixed" if use_amp else None]
    given = [name for name in asked if name is not None]
    if len(given) > 1:
        raise InputError("--precision, --use-bf16 and --use-amp say the same thing; give one of them")
    return given[0] if given else None
