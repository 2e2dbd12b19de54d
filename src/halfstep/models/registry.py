"""The networks there are: a row a family. A new one is a file beside this, and its row."""

from __future__ import annotations

from halfstep.errors import InputError
from halfstep.models import cdit, eqm, livestream
from halfstep.models.family import Family

FAMILIES: dict[str, Family] = {family.name: family for family in (eqm.FAMILY, cdit.FAMILY, livestream.FAMILY)}


def family_of(name: str) -> Family:
    """The family of a network by its own name, `EqM`, or by a published one, `EqM-S/2`. Raises InputError when there
    is none."""
    family = FAMILIES.get(name.partition("-")[0])
    if family is None:
        raise InputError(f"model: got {name!r}; expected a network of {' or '.join(FAMILIES)}, such as EqM-S/2")
    return family
