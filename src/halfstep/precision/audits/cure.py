"""From what a type has no room for to the modules that must be fp32."""

from __future__ import annotations

from collections.abc import Mapping

from halfstep.precision.audits.trace import MIXED, READS, WEIGHTS, Trace
from halfstep.precision.watch import Place

# Names of modules that stay in fp32, and whether they hand on fp32.
Islands = dict[str, bool]


def cured(trace: Trace, islands: Mapping[str, bool], place: Place) -> tuple[Islands, list[set[str]]]:
    """Islands that a trace under `islands` asks for, and of each of its events which.

    A leaf where something is born, or that gets what does not fit, becomes an island. In the code of a container, what
    follows its operands' type is cured where the operand comes from, by a leaf that hands on fp32; a product needs the
    container. Where that was done already the next larger container follows. The module's own name, empty, says that
    all of it must be fp32.
    """
    wanted: Islands = {}

    def add(name: str, hands_on: bool) -> str:
        while name and name in islands and (islands[name] or not hands_on):
            name = place.parents[name]
            hands_on = name in trace.unfit_results
        wanted[name] = hands_on or wanted.get(name, False)
        return name

    cures: list[set[str]] = []
    for number, event in enumerate(trace.events):
        if event.kind == READS and (is_inside(event.module, islands) or is_inside(event.module, wanted)):
            cures.append(set())
            continue
        leaf = trace.followers.get(number)
        if event.kind == MIXED and islands and event.module:
            leaf = None  # what an island handed on: its partners become fp32 together
        if event.kind != WEIGHTS and leaf is not None and not islands.get(leaf, False):
            cures.append({add(leaf, hands_on=True)})
        else:
            cures.append({add(event.module, hands_on=event.module in trace.unfit_results)})
    return wanted, cures


def without_inner(islands: Mapping[str, bool]) -> Islands:
    """Islands that are not part of others."""
    return {name: wide for name, wide in islands.items() if not is_inside(name, islands.keys() - {name})}


def is_inside(name: str, islands: Mapping[str, bool] | set[str]) -> bool:
    """Whether a module is one of the islands or part of one."""
    return any(name == island or name.startswith(f"{island}.") or island == "" for island in islands)
