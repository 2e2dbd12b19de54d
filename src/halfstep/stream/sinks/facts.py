"""What all sinks say alike of an event: which one it is, when it was taken, and at which photon energy."""

from __future__ import annotations

from collections.abc import Mapping

from halfstep.errors import InputError, printable
from halfstep.stream.events import Fact, Identity

_MOST_SEQUENCE = (1 << 63) - 1
_MOST_WHOLE = (1 << 64) - 1


def check_identity(identity: Identity) -> None:
    """Raises InputError where no file can hold an identity: HDF5's text ends at a zero character, neither it nor
    Parquet has half a surrogate pair, and numbers of a sequence are of 64 bits."""
    for name, text in zip(("run", "source", "event"), identity[:3], strict=True):
        if "\0" in text or printable(text) != text:
            raise InputError(f"{name} {text!a}: cannot be stored; expected text of UTF-8 without zero characters")
    if not -1 <= identity.sequence <= _MOST_SEQUENCE:
        raise InputError(f"sequence {identity.sequence}: cannot be stored; expected -1 to {_MOST_SEQUENCE}")


def timestamps(facts: Mapping[str, Fact]) -> tuple[float | None, int | None]:
    """The timestamp as it was sent: a float, or a whole number of at most 64 bits, and None for the other. Both None
    where it is neither. Never one as the other: a float64 has 53 bits, seconds and nanoseconds take 62."""
    value = facts.get("timestamp")
    if isinstance(value, float):
        return value, None
    return None, value if isinstance(value, int) and 0 <= value <= _MOST_WHOLE else None


def photon_energy(facts: Mapping[str, Fact]) -> float | None:
    """The photon energy in eV; None where nobody told it as a number."""
    value = facts.get("photon_energy_eV")
    return float(value) if isinstance(value, (int, float)) else None
